"""Five steps of a method's smallest config on the device (two in a dry run), held against those on the CPU in float32.

Methods are found by name, and their batch is the contract's (tests/models/test_method_contract.py), so a new method is
checked here without a new line. Checks of each:

- ``fp32``: losses without TF32 are within ``EXACT`` of the CPU's at the first step, within ``DRIFT`` after it
- ``bf16``: losses are within ``ROUGH`` of the CPU's, and no operation of a step makes the CPU wait for the GPU; places
  that do are listed under ``synchronisations``, and the peak of the memory is reported
- ``checkpoint``: what is saved on the device is loaded on the CPU with equal weights, and its loss agrees
- ``recomputed``: with activation checkpointing in float32, as ``fp32``
- ``compiled``: with compiled blocks in bfloat16, as ``bf16``

The tolerances are relative, with a floor of 1 for losses near 0. Rounding differs between devices, and AdamW turns the
sign of a tiny gradient into a whole step, so later steps differ more.
"""

import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.method import Method
from pipeline.training.blocks import compile_each, recompute_each
from pipeline.training.checkpoint import Checkpoints, Meta, load_method, load_optimizer
from pipeline.training.measure import GIBIBYTE
from pipeline.training.optimizer import AdamW, make_optimizer, take_step
from pipeline.training.skipping import Skipping
from pipeline.training.writer import CheckpointWriter, Saving
from tests.conftest import publish_coloured
from tests.gpu.child import Emit, explained
from tests.gpu.plan import Setting
from tests.models.test_method_contract import BATCH, build, first_batch, make_data

STEPS, DRY_STEPS = 5, 2
RECIPE = AdamW(learning_rate=1e-4)
EXACT, DRIFT, ROUGH = 1e-3, 2e-2, 5e-2
WARM_UP = 2  # steps before those that must not wait for the device: their first calls allocate and choose kernels
WAITS = "called a synchronizing CUDA operation"  # in torch's warning

ROOT = str(Path(__file__).resolve().parent.parent.parent)
CPU = torch.device("cpu")
NAMES = ("fp32", "bf16", "checkpoint", "recomputed", "compiled")

Change = Callable[[Method], object]


@dataclass
class Steps:
    """Losses of each step, and the places of the steps after the warm-up that wait for the device."""

    method: Method
    optimizer: torch.optim.Optimizer
    losses: list[float]
    waits: Counter[str] = field(default_factory=Counter)


def train(
    name: str,
    batch: Mapping[str, Tensor],
    device: torch.device,
    *,
    bf16: bool = False,
    change: Change | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> Steps:
    """The step of ``pipeline.training.loop`` without its logging, on one batch."""
    method = build(name)
    method.prepare_training()
    method = method.to(device).to(memory_format=torch.channels_last).train()
    if change is not None:
        change(method)
    optimizer = make_optimizer(RECIPE, method)
    skipping = Skipping(method, 1, device)
    waits: Counter[str] = Counter()
    losses = []
    for step in range(1, steps + 1):
        torch.manual_seed(seed + step)
        with watched(device, waits if step > WARM_UP else Counter()):
            on_device = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            skipping.before_step()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = method.training_step(on_device)
            total = torch.stack(list(found.values())).sum()
            total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
            take_step(optimizer, skipping.after_backward(step, total, norm))
            method.after_step()
        losses.append(float(total.detach()))
    return Steps(method, optimizer, losses, waits)


@contextmanager
def watched(device: torch.device, waits: Counter[str]) -> Iterator[None]:
    """Count, by place, the operations inside that make the CPU wait for the GPU."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if WAITS in str(message):
            waits[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # restored with the filters
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """The innermost line of this checkout, outside of this file, that is being executed."""
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT + "/pipeline")]
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "the step itself"


def compared(losses: Sequence[float], exact: Sequence[float], first: float, later: float) -> dict[str, Any]:
    """Whether ``losses`` are within the tolerances of ``exact``: that of the first step, and that of later ones."""
    apart = [abs(one - other) / max(1.0, abs(other)) for one, other in zip(losses, exact, strict=True)]
    passed = apart[0] <= first and all(one <= later for one in apart)  # false for what is not a number
    return {"passed": passed, "losses": losses, "apart": [apart[0], max(apart)], "allowed": [first, later]}


@dataclass
class Checks:
    """The checks of one method; each gives its line."""

    name: str
    batch: Mapping[str, Tensor]
    snapshot: str
    setting: Setting

    def __post_init__(self) -> None:
        """The steps on the CPU, to which all others are compared."""
        self.device = torch.device(self.setting.device)
        steps = DRY_STEPS if self.setting.dry else STEPS
        self.train = partial(train, self.name, self.batch, steps=steps)
        self.exact = self.train(CPU).losses
        other = self.train(CPU, steps=1, seed=100).losses
        assert other[0] == self.exact[0], "its losses depend on torch's generator, which differs between devices"

    def fp32(self) -> dict[str, Any]:
        """Float32."""
        with full_float32():
            return compared(self.train(self.device).losses, self.exact, EXACT, DRIFT)

    def recomputed(self) -> dict[str, Any]:
        """Float32 with activation checkpointing."""
        with full_float32():
            found = self.train(self.device, change=lambda method: recompute_each(method.blocks()))
        return compared(found.losses, self.exact, EXACT, DRIFT)

    def bf16(self) -> dict[str, Any]:
        """Bfloat16: losses, waits and memory."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found = self.train(self.device, bf16=True)
        peak = torch.cuda.max_memory_allocated() / GIBIBYTE if on_gpu else None
        line = compared(found.losses, self.exact, ROUGH, ROUGH) | {"peak_memory_gb": peak}
        waits = dict(found.waits.most_common(10)) if on_gpu else None
        return line | {"passed": line["passed"] and not waits, "synchronisations": waits}

    def compiled(self) -> dict[str, Any]:
        """Bfloat16 with compiled blocks; a dry run traces them without generating code."""
        backend = "eager" if self.setting.dry else "inductor"
        change = partial(_compile, backend=backend)
        found = self.train(self.device, bf16=True, change=change)
        return compared(found.losses, self.exact, ROUGH, ROUGH)

    def checkpoint(self) -> dict[str, Any]:
        """A checkpoint of the device, loaded on the CPU."""
        with full_float32(), tempfile.TemporaryDirectory(prefix="clipmill-gpu-") as folder:
            trained = self.train(self.device, steps=2)
            saved = Checkpoints(folder)
            writer = CheckpointWriter(saved, Saving(), 1, 1)
            meta = Meta(step=2, samples_seen=2 * BATCH, batch_size=BATCH, lanes=2, seed=0, snapshot=self.snapshot)
            writer.save(trained.method, trained.method.state_dict(), trained.optimizer.state_dict(), meta)
            writer.finish()
            latest = saved.latest()
            assert latest is not None
            loaded = load_method(latest.folder.uri)
            load_optimizer(make_optimizer(RECIPE, loaded), latest.folder)
        weights = trained.method.state_dict()
        same = all(torch.equal(value, weights[key].cpu()) for key, value in loaded.state_dict().items())
        losses = [self._loss(method, device) for method, device in ((trained.method, self.device), (loaded, CPU))]
        line = compared(losses[:1], losses[1:], EXACT, EXACT)
        return line | {"passed": line["passed"] and same and loaded.state_dict().keys() == weights.keys()}

    def _loss(self, method: Method, device: torch.device) -> float:
        batch = {key: value.to(device) for key, value in self.batch.items()}
        with full_float32(), torch.no_grad():
            return float(torch.stack(list(method.eval()(batch).values())).sum())


def _compile(method: Method, backend: str) -> None:
    compile_each(method.compiled_blocks(), backend)
    method.compiled = backend == "inductor"


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def check_method(name: str, setting: Setting, emit: Emit) -> None:
    """All checks of a method, a line for each; one that raises fails, and the next ones go on.

    Raises:
        SystemExit: a check has failed.
    """
    torch.set_float32_matmul_precision("high")  # as the loop does on GPUs
    with tempfile.TemporaryDirectory(prefix="clipmill-gpu-") as folder:
        snapshot = make_data(partial(publish_coloured, Path(folder)))
        checks = Checks(name, first_batch(build(name), snapshot), snapshot.digest, setting)
        if setting.device == "cuda":
            checks.batch = {key: value.pin_memory() for key, value in checks.batch.items()}
        passed = True
        for check in NAMES:
            try:
                line = getattr(checks, check)()
            except Exception as error:
                traceback.print_exc()
                line = {"passed": False, "error": explained(error)}
            emit({"check": check, **line})
            passed = passed and line["passed"]
    if not passed:
        raise SystemExit(1)
