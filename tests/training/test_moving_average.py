"""The moving average of weights: against torch's own and a sum written out, alone and through a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import DataError, SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.method import build_method
from pipeline.training.checkpoint import Checkpoints, load_method, read_weights
from pipeline.training.loop import run_training
from pipeline.training.moving_average import MovingAverage, decay_at
from pipeline.training.run import Run, prepare

CPU, TAKEN, SKIPPED = torch.device("cpu"), torch.zeros(()), torch.ones(())


@pytest.fixture
def tiny() -> Clip:
    torch.manual_seed(0)
    return Clip(Clip.smallest())


def move(method: Clip) -> None:
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_decay_rises_to_what_was_asked() -> None:
    assert [decay_at(step, 0.999) for step in (1, 2, 10**6)] == [2 / 11, 3 / 12, 0.999]


def test_it_is_torchs_average_once_the_decay_has_risen(tiny: Clip) -> None:
    """The same as ``AveragedModel``, which copies the weights in its first update."""
    reference = AveragedModel(tiny, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(tiny)
    average = MovingAverage(tiny, 0.9)
    for step in range(100, 104):
        move(tiny)
        reference.update_parameters(tiny)
        average.update(step, TAKEN)
    expected, found = reference.module.state_dict(), average.state_dict()
    assert found.keys() == tiny.state_dict().keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_a_skipped_step_leaves_it_bit_for_bit(tiny: Clip) -> None:
    average = MovingAverage(tiny, 0.5)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    move(tiny)
    average.update(50, SKIPPED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())
    average.update(50, TAKEN)
    assert not torch.equal(average.state_dict()["model.logit_scale"], before["model.logit_scale"])


def test_what_is_locked_is_not_averaged(tiny: Clip) -> None:
    tiny.model.visual.requires_grad_(False)
    average = MovingAverage(tiny, 0.5)
    locked = {name for name, tensor in average.state_dict().items() if tensor.data_ptr() == tensors(tiny)[name]}
    assert locked and all("visual" in name for name in locked)
    assert {name for name in average.state_dict() if "visual" in name} == locked


def tensors(method: Clip) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in method.state_dict().items()}


def test_a_run_keeps_it_beside_the_weights(
    run: Callable[..., Run], tiny_config: Config, remember: Any, tmp_path: Path
) -> None:
    """Each checkpoint's average is the sum over all checkpoints before it, computed here in float64."""
    settings = run(steps=5, ema_decay=0.3, checkpoint_every_steps=1, keep_checkpoints=9, log_every_steps=5)
    run_training(prepare(tiny_config, settings)[0], CPU, remember())
    torch.manual_seed(settings.seed)
    expected = {name: tensor.double() for name, tensor in build_method(tiny_config).state_dict().items()}
    for found in Checkpoints(settings.output_folder).whole():
        decay = min(0.3, (1 + found.meta.step) / (10 + found.meta.step))
        for name, tensor in read_weights(found.folder).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
        averaged = load_method(f"{found.folder.uri}:ema").state_dict()
        for name, tensor in averaged.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(load_method(settings.output_folder).logit_scale, averaged["model.logit_scale"])


def test_a_resume_has_the_same_average(
    run: Callable[..., Run], dropout_config: Config, remember: Any, tmp_path: Path
) -> None:
    """Bit for bit, as the weights."""
    plan = prepare(dropout_config, run(steps=8, ema_decay=0.9))[0]
    run_training(plan, CPU, remember())
    again = replace(plan, run=replace(plan.run, output_folder=str(tmp_path / "again")))
    with pytest.raises(KeyboardInterrupt):
        run_training(again, CPU, remember(stop_at=6))
    run_training(again, CPU, remember())
    ends = [Checkpoints(one.run.output_folder).at(8) for one in (plan, again)]
    whole, resumed = (read_weights(end, ema=True) for end in ends)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_without_one_is_refused(tiny: Clip) -> None:
    with pytest.raises(DataError, match="moving average holds no"):
        MovingAverage(tiny, 0.5).restore({})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decays(decay: float) -> None:
    with pytest.raises(SettingError, match="ema_decay"):
        Run(ema_decay=decay)
