"""Weights divided between two processes: the same run, and the same checkpoints, as weights copied to both.

Run as a script, this file is one of two ranks that train plans one after the other.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipeline.models import clip
from pipeline.models.clip import Config
from pipeline.models.slip import Slip
from pipeline.training import flops
from pipeline.training.checkpoint import Checkpoints, Meta, load_method, read_weights
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.run import Run, RunPlan, prepare

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
POISONED = 3  # the step whose losses are spoilt in plans that are called so
SHARDED = ("full", "again", "parts", "resumed", "poisoned-full", "bf16", "slip-full", "taught-full")


@pytest.fixture(scope="module")
def plans(
    make_snapshot: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, RunPlan], dict[str, dict[int, dict[str, float]]]]:
    """Plans by name, all of them trained by two ranks, and what these logged."""
    folder = tmp_path_factory.mktemp("sharding")
    data = make_snapshot((14, 9, 17)).folder
    base = Run(
        data=data, batch_size=8, lanes=4, shuffle_block=6, steps=6, warmup_steps=2, log_every_steps=1,
        checkpoint_every_steps=4, ema_decay=0.5, clip_grad_norm=2.0,
    )  # fmt: skip
    base = replace(base, optimizer=replace(base.optimizer, learning_rate=1e-3, layer_decay=0.8))
    base = replace(base, loader=replace(base.loader, loader_workers=0))
    changes: dict[str, dict[str, Any]] = {name: {"sharding": "full"} for name in SHARDED}
    changes |= {"copied": {}, "poisoned-copied": {}, "slip-copied": {}, "taught-copied": {}}
    changes["again"]["checkpoint_activations"] = True
    changes["parts"]["micro_batch"] = 3
    changes["bf16"]["precision"] = "bf16"
    tiny = Config(architecture="clipmill-tiny")
    taught = replace(tiny, teacher=f"clipmill-tiny:{teacher(folder / 'teacher')}")
    found = {}
    for name, change in changes.items():
        config = {"slip": Slip.smallest(), "taught": taught}.get(name.partition("-")[0], tiny)
        found[name] = prepare(config, replace(base, output_folder=str(folder / name), **change))[0]
    order = ["copied", *(name for name in found if name != "copied")]
    return found, train(folder, {name: found[name] for name in order}, {"resumed": "copied"})


def teacher(folder: Path) -> str:
    """The checkpoint of a CLIP with weights of its own."""
    torch.manual_seed(5)
    method = clip.Clip(clip.Clip.smallest())
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    return str(Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.path)


def train(folder: Path, plans: dict[str, RunPlan], copies: dict[str, str]) -> dict[str, dict[int, dict[str, float]]]:
    (folder / "plans.pickle").write_bytes(pickle.dumps((plans, copies)))
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0] + errors[1]
    logged = json.loads((folder / "log.json").read_text())
    return {name: {int(step): metrics for step, metrics in steps.items()} for name, steps in logged.items()}


def state(plan: RunPlan, step: int = 6) -> dict[str, Tensor]:
    """Weights, average and optimiser's state of a checkpoint."""
    folder = Checkpoints(plan.run.output_folder).at(step)
    loaded = torch.load(f"{folder.path}/state.pt", weights_only=True)["optimizer"]["state"]
    moments = {f"{number}/{key}": value for number, one in loaded.items() for key, value in one.items()}
    average = {f"ema/{name}": value for name, value in read_weights(folder, ema=True).items()}
    return {**read_weights(folder), **average, **moments}


def assert_equal_but_for_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Adam's first steps turn the sign of a gradient near zero into a whole step: a few entries may be apart."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and type(tensor) is Tensor, name
        apart = ~torch.isclose(tensor, expected[name], rtol=1e-2, atol=2e-4)
        assert int(apart.sum()) <= max(1, tensor.numel() // 1000), name


@pytest.mark.parametrize(
    ("name", "reference"),
    [("full", "copied"), ("again", "full"), ("parts", "full"), ("poisoned-full", "poisoned-copied"),
     ("slip-full", "slip-copied"), ("taught-full", "taught-copied")],
)  # fmt: skip
def test_divided_weights_train_as_copied_ones(plans: Any, name: str, reference: str) -> None:
    """Losses, norms that decide the clipping, weights, moments and averages."""
    logged = plans[1]
    steps = [step for step in logged[name] if not (name.startswith("poisoned") and step == POISONED)]
    assert steps[-1] == 6
    for step in steps:
        for metric in ("train/loss", "train/grad_norm", "train/skipped_steps", "train/logit_scale"):
            expected = logged[reference][step][metric]
            assert logged[name][step][metric] == pytest.approx(expected, rel=2e-3), (step, metric)
    assert_equal_but_for_rounding(state(plans[0][name]), state(plans[0][reference]))


def test_a_sharded_run_goes_on_from_copied_weights(plans: Any) -> None:
    resumed, whole = plans[1]["resumed"], plans[1]["copied"]
    assert sorted(resumed) == [5, 6]
    for step, metrics in resumed.items():
        assert metrics["train/loss"] == pytest.approx(whole[step]["train/loss"], rel=1e-4)
    assert_equal_but_for_rounding(state(plans[0]["resumed"]), state(plans[0]["copied"]))


def test_one_process_goes_on_from_divided_weights(plans: Any, remember: Any, tmp_path: Path) -> None:
    """The same folder, now without Ray and whole."""
    plan = replace(plans[0]["full"], run=replace(plans[0]["full"].run, output_folder=str(tmp_path)))
    shutil.copytree(Checkpoints(plans[0]["full"].run.output_folder).at(4).path, Checkpoints(tmp_path).at(4).path)
    tracker = remember()
    run_training(plan, CPU, tracker)
    for step, loss in tracker.series("train/loss").items():
        assert loss == pytest.approx(plans[1]["full"][step]["train/loss"], rel=1e-3)
    assert sorted(tracker.history) == [5, 6]
    assert_equal_but_for_rounding(state(plan), state(plans[0]["full"]))


def test_two_ranks_learn_from_a_teacher_as_one(plans: Any, remember: Any, tmp_path: Path) -> None:
    """Both losses and the gradient's norm."""
    plan = replace(plans[0]["taught-copied"], run=replace(plans[0]["taught-copied"].run, output_folder=str(tmp_path)))
    tracker = remember()
    run_training(plan, CPU, tracker)
    for step, metrics in plans[1]["taught-copied"].items():
        for name in ("train/contrastive", "train/distillation", "train/grad_norm"):
            assert metrics[name] == pytest.approx(tracker.history[step][name], rel=1e-3), (step, name)
            assert metrics[name] > 0


def test_a_poisoned_step_is_left_out_by_both_ranks(plans: Any) -> None:
    """One rank's losses are spoilt; at least the checkpoint is sound."""
    assert [metrics["train/skipped_steps"] for metrics in plans[1]["poisoned-full"].values()] == [0, 0, 1, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in state(plans[0]["poisoned-full"]).values())


def test_bfloat16_stays_near(plans: Any) -> None:
    for step, metrics in plans[1]["bf16"].items():
        assert metrics["train/loss"] == pytest.approx(plans[1]["full"][step]["train/loss"], rel=0.05)
    assert {tensor.dtype for tensor in state(plans[0]["bf16"]).values()} == {torch.float32}


def test_the_checkpoints_open_like_any_other(plans: Any) -> None:
    method = load_method(f"{plans[0]['full'].run.output_folder}:ema")
    assert method.encode_text(method.tokenizer(["red"])).shape == (1, 32)


def test_every_rank_holds_a_half(plans: Any) -> None:
    held = json.loads((Path(plans[0]["full"].run.output_folder).parent / "held.json").read_text())
    assert held["full"] < 0.55 * held["copied"]


class _Keep:
    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged[step] = dict(metrics)

    def log_file(self, name: str, content: bytes) -> None: ...

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None: ...


def _rank(folder: Path, rank: int) -> None:
    from tests.conftest import counted_once

    flops.count = counted_once(flops.count)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    plans, copies = pickle.loads((folder / "plans.pickle").read_bytes())
    logged, held = {}, {}
    for name, plan in plans.items():
        if name in copies and rank == 0:
            source = Checkpoints(plans[copies[name]].run.output_folder).at(4).path
            shutil.copytree(source, Checkpoints(plan.run.output_folder).at(4).path)
        torch.distributed.barrier()
        tracker = _Keep()
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("poisoned") and rank == 1:
                _poison(patch)
            _watch(patch, held, name)
            outcome = run_training(plan, CPU, tracker)
        assert outcome.steps == plan.steps and not outcome.problem, (name, outcome)
        logged[name] = tracker.logged
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(logged))
        (folder / "held.json").write_text(json.dumps(held))
    torch.distributed.destroy_process_group()


def _poison(patch: pytest.MonkeyPatch) -> None:
    calls, sound = 0, clip.contrastive_loss

    def spoilt(*inputs: Any) -> Tensor:
        nonlocal calls
        calls += not isinstance(inputs[0], FakeTensor)  # which only count a step's work
        return sound(*inputs) * (torch.nan if calls == POISONED else 1)

    patch.setattr(clip, "contrastive_loss", spoilt)


def _watch(patch: pytest.MonkeyPatch, held: dict[str, int], name: str) -> None:
    """Count the numbers in weights and moments that this rank holds at the end."""
    from pipeline.training import distributed, loop

    stepped = loop.take_step

    def counted(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
        stepped(optimizer, skipped)
        states = [value for one in optimizer.state.values() for value in one.values()]
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        held[name] = sum(tensor.numel() for tensor in distributed.local([*states, *parameters]))

    patch.setattr(loop, "take_step", counted)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _rank(Path(sys.argv[1]), int(sys.argv[2]))
