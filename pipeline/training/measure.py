"""What a run costs: where its time goes, how much of the device it uses, its memory, and a trace of some steps.

Nothing here makes a step wait for the device. On a GPU the parts of a step are measured by events in the device's own
queue, read when metrics are logged, which waits for the device anyway: so ``perf/data_wait`` is the time in which a GPU
has nothing to do until the next batch is there. On CPUs it is the clock.
"""

import contextlib
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, record_function

from pipeline.config import require
from pipeline.loaders.batches import Batch
from pipeline.models.method import Method
from pipeline.training.flops import Work, device_name, peak_of, precision
from pipeline.training.tracker import Tracker

logger = logging.getLogger(__name__)

PHASES = ("data_wait", "copy", "forward", "backward", "exchange", "optimizer", "save")
"""Parts of a step. On GPUs gradients are exchanged within the backward pass, unless a step has several of these."""
SAMPLED = 50  # steps between two logs whose parts are measured on a GPU, where each part takes two events
GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """What is measured besides; nothing here changes the result."""

    peak_tflops: float | None = None
    """What a device could do at most, in dense TFLOP/s, for perf/mfu; none: looked up by the name of the GPU."""
    profile_steps: str = ""
    """START:END, both included: steps of which rank 0 keeps a trace, profiles/*.json.gz, with the tracked run."""

    def __post_init__(self) -> None:
        peak = self.peak_tflops
        require(peak is None or peak > 0, "peak_tflops", peak, "more than 0, or none")
        allowed = "START:END with START 1 or more and END no less, or nothing"
        require(not self.profile_steps or bool(self.profiled()), "profile_steps", self.profile_steps, allowed)

    def profiled(self) -> range:
        """The steps to trace, counted from 1; empty where the setting is, or says none."""
        start, _, end = self.profile_steps.partition(":")
        whole = start.isdecimal() and end.isdecimal() and int(start) >= 1
        return range(int(start), int(end) + 1) if whole else range(0)


class Clock:
    """Where the time goes, between two calls of :meth:`interval`.

    ``work`` counts what this process's batches need, ``peak`` is what its device could do, in TFLOP/s.
    """

    def __init__(
        self, batch_size: int, device: torch.device, work: Work | None = None, peak: float | None = None
    ) -> None:
        self.batch_size, self.device, self.work, self.peak = batch_size, device, work, peak
        self.unreadable = 0
        self.traced = False
        self._on_gpu = device.type == "cuda"
        self._spans: list[Span] = []
        self._flops: float | None = 0.0
        self._steps = self._counted = 0
        self._began: float | None = None
        self._since = self._saved = time.perf_counter()

    def waited(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it comes counts as waiting for data."""
        self._steps += 1
        with self.phase("data_wait"):
            return next(batches)

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Counts what is done inside as this part of a step, one of :data:`PHASES`; a trace names it too."""
        if self._on_gpu and self._steps > SAMPLED and name != "save":
            return contextlib.nullcontext()
        span = Span(name, self._on_gpu and name != "save", self.traced)
        self._spans.append(span)
        return span

    def worked(self, batch: Mapping[str, Tensor]) -> None:
        """Count the work of a step with this rank's ``batch``."""
        flops = self.work.of(batch) if self.work else None
        if self._began is None and self._steps == 1 and flops:
            self._announce(flops, batch)
        self._flops = None if flops is None or self._flops is None else self._flops + flops

    def interval(self) -> dict[str, float]:
        """Speed since the last call; empty on the first call, since the interval includes start and warm-up."""
        now = time.perf_counter()
        seconds, steps, spans, flops = now - self._since, self._steps, self._spans, self._flops
        self._since, self._steps, self._spans, self._flops = now, 0, [], 0.0
        if self._began is None:
            self._began = now
            return {}
        self._counted += steps
        speed = {"perf/samples_per_second": steps * self.batch_size / seconds, "perf/step_seconds": seconds / steps}
        return speed | self._parts(spans, steps, seconds) | self._utilisation(flops, seconds)

    def overall(self) -> float:
        """Samples per second between the first and the last call of :meth:`interval`; 0 if there was but one."""
        if self._began is None or not self._counted:
            return 0.0
        return self._counted * self.batch_size / (self._since - self._began)

    def minutes_since_save(self) -> float:
        """Minutes since the start or the last checkpoint."""
        return (time.perf_counter() - self._saved) / 60

    def saved(self) -> None:
        """A checkpoint is written now."""
        self._saved = time.perf_counter()

    def _announce(self, flops: float, batch: Mapping[str, Tensor]) -> None:
        rows, name = len(next(iter(batch.values()))), device_name(self.device)
        lengths = self.work.lengths(batch) if self.work else {}
        of = "".join(f", {length} {unit}" for unit, length in lengths.items())
        known = f"perf/mfu is the share of {self.peak} TFLOP/s, the peak of {name}" if self.peak else ""
        unknown = f"no perf/mfu, since the peak of {name} is not known; --peak-tflops gives it"
        gigaflops = flops / rows / 1e9
        logger.info("%.4g GFLOP a sample%s, forward and backward; %s", gigaflops, of, known or unknown)

    def _parts(self, spans: "list[Span]", steps: int, seconds: float) -> dict[str, float]:
        """Each part's share of the time."""
        spent = dict.fromkeys(PHASES, 0.0)
        for span in spans:
            sampled = min(steps, SAMPLED) if span.on_gpu else steps
            spent[span.name] += span.seconds() * steps / sampled
        return {f"perf/{name}": value / seconds for name, value in spent.items()}

    def _utilisation(self, flops: float | None, seconds: float) -> dict[str, float]:
        if not flops:
            return {}
        tflops = flops / seconds / 1e12
        return {"perf/tflops": tflops, **({"perf/mfu": tflops / self.peak} if self.peak else {})}


def make_clock(
    batch_size: int, measuring: MeasurementConfig, method: Method, device: torch.device, *, bf16: bool, counts: bool
) -> Clock:
    """The clock of a run; one process ``counts`` its work. To be made before ``method`` is wrapped or compiled."""
    peak = measuring.peak_tflops or peak_of(device_name(device), precision(device, bf16))
    return Clock(batch_size, device, Work(method) if counts else None, peak)


class Span:
    """A stretch of time, by the clock or by the GPU's queue."""

    def __init__(self, name: str, on_gpu: bool, traced: bool) -> None:
        self.name, self.on_gpu = name, on_gpu
        self._traced = record_function(f"clipmill/{name}") if traced else None
        self._began = self._ended = 0.0
        if on_gpu:
            self._first, self._last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> "Span":
        if self._traced:
            self._traced.__enter__()
        if self.on_gpu:
            self._first.record()
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on_gpu:
            self._last.record()
        else:
            self._ended = time.perf_counter()
        if self._traced:
            self._traced.__exit__(kind, error, trace)

    def seconds(self) -> float:
        """How long it took; waits until the GPU is past its end."""
        if not self.on_gpu:
            return self._ended - self._began
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1000


class Profile:
    """Traces some steps with torch's profiler, and hands the trace to the tracker."""

    def __init__(self, steps: range, clock: Clock, tracker: Tracker) -> None:
        self.steps, self.clock, self.tracker = steps, clock, tracker
        self._profiler: torch.profiler.profile | None = None
        self._first = 0

    def before_step(self, step: int) -> None:
        """Begin if ``step``, counted from 1, is among those to trace."""
        if step not in self.steps or self._profiler is not None:
            return
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
        self._profiler.start()
        self._first, self.clock.traced = step, True

    def after_step(self, step: int) -> None:
        """End after the last one."""
        if self._profiler is not None and step + 1 not in self.steps:
            self._end(step)

    def close(self, step: int) -> None:
        """End where the training does, after ``step``."""
        if self._profiler is not None:
            self._end(step)

    def _end(self, step: int) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        name = f"profiles/steps-{self._first:08d}-{step:08d}.json.gz"
        with tempfile.TemporaryDirectory(prefix="clipmill-profile-") as folder:
            path = Path(folder) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(path))
            content = path.read_bytes()
        self._profiler, self.clock.traced = None, False
        self.tracker.log_file(name, content)
        megabytes = len(content) / 1e6
        logger.info("steps %d to %d: a trace of %.1f MB, %s of the tracked run", self._first, step, megabytes, name)


def memory(device: torch.device) -> dict[str, float]:
    """This process's RAM in GiB; on a GPU also the most that tensors took since the last call, and what torch holds."""
    metrics = {"perf/memory_gb": psutil.Process().memory_info().rss / GIBIBYTE}
    if device.type == "cuda":
        metrics["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / GIBIBYTE
        metrics["perf/gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / GIBIBYTE
        torch.cuda.reset_peak_memory_stats(device)
    return metrics


def towers(method: Method) -> dict[str, str]:
    """Where each parameter is, by its name: in ``image`` or ``text``, or ``logit_scale``, ``head`` and the like."""
    layers = method.layers()
    names = [name for name, _ in method.named_parameters()]
    return {name: layers[name].tower if name in layers else _part(name) for name in names}


def _part(name: str) -> str:
    return name.removeprefix("model.").partition(".")[0]


def tower_norms(method: Method, places: Mapping[str, str]) -> dict[str, Tensor]:
    """The norm of the gradient in each of the ``places`` that :func:`towers` gives; all ranks must call."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(places[name], []).append(parameter.grad)
    norms = {place: torch.nn.utils.get_total_norm(values) for place, values in gradients.items()}
    return {place: norm.full_tensor() if isinstance(norm, DTensor) else norm for place, norm in norms.items()}


def sizes(method: Method, places: Mapping[str, str]) -> str:
    """How many parameters there are, and which of them are not trained."""
    frozen: Counter[str] = Counter()
    for name, parameter in method.named_parameters():
        frozen[places[name]] += 0 if parameter.requires_grad else parameter.numel()
    total = sum(parameter.numel() for parameter in method.parameters())
    # Of a frozen scale alone nobody wants to read "0.0 million".
    locked = [f"{count / 1e6:.1f} million of {place} frozen" for place, count in frozen.items() if count >= 50_000]
    return ", ".join([f"{total / 1e6:.1f} million parameters", *locked])
