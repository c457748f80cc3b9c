"""Steps that are left out: a run with a poisoned batch against one whose update was left away by hand.

Run as a script, this file is one of two ranks; the second gets the bad batch.
"""

import json
import os
import pickle
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

from pipeline.errors import SettingError
from pipeline.models import clip
from pipeline.models.clip import Config
from pipeline.models.slip import Slip
from pipeline.training import loop
from pipeline.training.checkpoint import Checkpoints, read_weights
from pipeline.training.loop import run_training
from pipeline.training.optimizer import take_step
from pipeline.training.run import Run, RunPlan, prepare
from pipeline.training.skipping import Skipping

CPU = torch.device("cpu")
NAN, ONE = torch.tensor(torch.nan), torch.tensor(1.0)
MakeRun = Callable[..., Run]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str = "loss") -> None:
    """Spoil the losses of ``steps``, or their gradients alone: the root of 0 is 0, with an infinite slope."""
    calls, sound = 0, clip.contrastive_loss

    def spoilt(images: Tensor, *others: Any) -> Tensor:
        nonlocal calls
        calls += not isinstance(images, FakeTensor)  # which only count a step's work
        loss = sound(images, *others)
        if calls not in steps:
            return loss
        return loss * torch.nan if what == "loss" else loss + (images.sum() * 0).sqrt() * 0

    monkeypatch.setattr("pipeline.models.clip.contrastive_loss", spoilt)


def leave_out(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Run sound batches, and leave out one update by hand."""
    calls = 0

    def stepped(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
        nonlocal calls
        calls += 1
        assert not skipped
        optimizer.zero_grad() if calls == step else take_step(optimizer, skipped)

    monkeypatch.setattr(loop, "take_step", stepped)


def saved(plan: RunPlan) -> dict[str, Any]:
    """Weights and the optimiser's state at the end."""
    folder = Checkpoints(plan.run.output_folder).at(plan.steps)
    state = torch.load(f"{folder.path}/state.pt", weights_only=True)["optimizer"]
    flat = {f"{number}/{key}": value for number, one in state["state"].items() for key, value in one.items()}
    return {**read_weights(folder), **flat}


@pytest.mark.parametrize(("what", "clip_norm"), [("loss", None), ("gradient", 0.5)])
def test_a_poisoned_batch_is_an_update_left_out(
    run: MakeRun, dropout_config: Config, remember: Any, tmp_path: Path, what: str, clip_norm: float | None
) -> None:
    """Bit for bit, in weights and in the optimiser's state, with dropout and gradients that are clipped."""
    plan = prepare(dropout_config, run(steps=6, clip_grad_norm=clip_norm))[0]
    other = replace(plan, run=replace(plan.run, output_folder=str(tmp_path / "other")))
    poisoned, left_out = remember(), remember()
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {3}, what)
        run_training(plan, CPU, poisoned)
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, 3)
        run_training(other, CPU, left_out)
    expected, found = saved(other), saved(plan)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert poisoned.series("train/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    sound = {step: loss for step, loss in left_out.series("train/loss").items() if step != 3}
    assert {step: poisoned.history[step]["train/loss"] for step in sound} == sound


def test_the_moving_average_leaves_it_out_too(
    run: MakeRun, tiny_config: Config, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run(steps=3, ema_decay=0.5, checkpoint_every_steps=1, keep_checkpoints=9)
    poison(monkeypatch, {2})
    run_training(prepare(tiny_config, settings)[0], CPU, remember())
    averages = [read_weights(one.folder, ema=True) for one in Checkpoints(settings.output_folder).whole()]
    same = [{name for name in averages[0] if torch.equal(averages[0][name], later[name])} for later in averages[1:]]
    assert same[0] == set(averages[0]) and len(same[1]) < len(averages[0])


def test_more_in_a_row_than_allowed_end_the_run(
    run: MakeRun, tiny_config: Config, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a row are allowed, as often as they come; three are not, though seen at the next log only."""
    poison(monkeypatch, {2, 3, 5, 6, 8, 9, 10})
    settings = run(steps=20, max_skipped_steps=2, log_every_steps=4, checkpoint_every_steps=7)
    outcome = run_training(prepare(tiny_config, settings)[0], CPU, remember())
    assert outcome.steps == 12 and "the loss or its gradient is not finite at step 8" in outcome.problem
    last = Checkpoints(settings.output_folder).latest()
    assert last is not None and (last.meta.step, last.meta.skipped_steps, last.meta.skipped_in_row) == (7, 4, 0)


def test_a_row_goes_on_after_a_resume(tiny_config: Config) -> None:
    method = clip.Clip(tiny_config)
    skipping = Skipping(method, 2, CPU, total=7, row=2)
    assert skipping.too_many_since() is None
    assert skipping.after_backward(11, ONE, NAN) == 1
    assert skipping.too_many_since() == 9 and skipping.counts() == (8, 3)
    assert skipping.after_backward(12, ONE, ONE) == 0
    assert skipping.too_many_since() == 9 and skipping.counts() == (8, 0)


def test_running_statistics_are_put_back() -> None:
    """A forward pass that is no number would stay in them for good."""
    method = Slip(Slip.smallest())
    buffers = dict(method.head.named_buffers())
    assert buffers
    skipping, before = Skipping(method, 9, CPU), {name: buffer.clone() for name, buffer in buffers.items()}
    for norm, stay in ((NAN, True), (ONE, False)):
        skipping.before_step()
        method.head(torch.randn(4, method.head.first.in_features) * (torch.nan if stay else 1))
        skipping.after_backward(1, ONE, norm)
        assert all(torch.equal(buffers[name], kept) == stay for name, kept in before.items())


@pytest.mark.slow
def test_what_one_rank_meets_all_leave_out(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    plan = prepare(tiny_config, run(steps=4))[0]
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    ranks = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    logged, weights = (
        json.loads((tmp_path / "log.json").read_text()),
        [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)],
    )
    assert [metrics["train/skipped_steps"] for metrics in logged] == [0, 1, 1, 1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(weight.isfinite().all() for weight in weights[0].values())


def test_bad_limits() -> None:
    with pytest.raises(SettingError, match="max_skipped_steps"):
        Run(max_skipped_steps=-1)


class _Keep:
    def __init__(self, path: Path) -> None:
        self.path, self.logged = path, list[dict[str, float]]()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append(dict(metrics))

    def flush(self, seconds: float) -> None: ...

    def close(self) -> None:
        self.path.write_text(json.dumps(self.logged))


def _rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    plan: RunPlan = pickle.loads((folder / "plan.pickle").read_bytes())
    training = loop._TrainingState(plan, CPU, _Keep(folder / "log.json"), lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        # The loss alone, without a trace in the gradient that the ranks share anyway.
        finite = Tensor.isfinite
        calls = 0

        def isfinite(value: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return finite(value) & (rank == 0 or calls != 3)  # the loss of step 2, after loss and norm of step 1

        patch.setattr(Tensor, "isfinite", isfinite)
        training.run()
    training.writer.close()
    training.tracker.close() if rank == 0 else None
    torch.save(training.method.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    _rank(Path(sys.argv[1]), int(sys.argv[2]))
