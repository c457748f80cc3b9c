"""Eight bits, emulated: what is converted, how near it stays, and who is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.towers import openclip
from pipeline.models.towers.layers import blocks
from pipeline.shards.storage import Folder
from pipeline.training import fp8
from pipeline.training.checkpoint import load_method, read_weights
from pipeline.training.loop import run_training
from pipeline.training.run import Run, prepare

CPU = torch.device("cpu")
# torchao's own remarks about newer versions of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """To e4m3 with one scale for all, by hand."""
    scale = torch.finfo(torch.float8_e4m3fn).max / tensor.abs().max()
    return (tensor * scale).to(torch.float8_e4m3fn).float() / scale


def test_a_layer_multiplies_what_is_rounded_to_eight_bits() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 48))
    weight, bias = block[0].weight.detach().clone(), block[0].bias.detach().clone()
    inputs = torch.randn(5, 32)
    assert fp8.convert([block], emulate=True) == 1
    torch.testing.assert_close(block(inputs), rounded(inputs) @ rounded(weight).T + bias, rtol=1e-4, atol=1e-4)


def test_the_linear_layers_of_blocks_are_converted() -> None:
    """Two MLPs of two layers in each tower; attention, embeddings and projections are left."""
    method = Clip(Clip.smallest())
    names, weights = set(method.state_dict()), {name: value.clone() for name, value in method.state_dict().items()}
    assert fp8.convert(method.blocks(), emulate=True) == 8
    assert set(method.state_dict()) == names
    assert all(torch.equal(value, weights[name]) for name, value in method.state_dict().items())


def test_layers_of_odd_widths_are_left() -> None:
    assert fp8.convert([nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 10))], emulate=True) == 0


def test_a_tower_of_timm_is_converted_whole() -> None:
    model = openclip.create("vit_medium_patch16_gap_256")
    found = {name: block for name, block in blocks(model).items() if name.startswith("visual.")}
    assert len(found) == 12 and fp8.convert(found.values(), emulate=True) == 12 * 4  # qkv, proj, fc1, fc2


@pytest.mark.parametrize("again", [False, True])
def test_a_run_stays_near_float32_and_saves_float32(
    run: Callable[..., Run],
    tiny_config: Config,
    remember: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    again: bool,
) -> None:
    exact, rough = remember(), remember()
    run_training(prepare(tiny_config, run(steps=4))[0], CPU, exact)
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    monkeypatch.setattr(fp8, "convert", partial(fp8.convert, emulate=True))
    settings = run(steps=4, precision="fp8", output_folder=str(tmp_path / "b"), checkpoint_activations=again)
    outcome = run_training(prepare(tiny_config, settings)[0], CPU, rough)
    losses = exact.series("train/loss"), rough.series("train/loss")
    assert losses[0] != losses[1]
    assert all(losses[1][step] == pytest.approx(losses[0][step], rel=0.05) for step in losses[0])
    assert load_method(outcome.checkpoint).logit_scale.dtype == torch.float32
    assert {value.dtype for value in read_weights(Folder(outcome.checkpoint)).values()} == {torch.float32}


def test_a_device_without_eight_bits_is_refused(run: Callable[..., Run], tiny_config: Config, remember: Any) -> None:
    plan = prepare(tiny_config, run(precision="fp8"))[0]
    with pytest.raises(SettingError, match="precision: got .fp8., expected auto, bf16 or fp32 on a CPU"):
        run_training(plan, CPU, remember())


def test_a_missing_library_is_told_before_anything_starts(
    run: Callable[..., Run], tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"without torchao \(clipmill\[fp8\]\)"):
        prepare(tiny_config, run(precision="fp8"))
