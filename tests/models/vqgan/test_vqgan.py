"""The method: turns, the start of the discriminator, what a step counts, restarts, and weights of the authors."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.image_codes import load_image_codes
from pipeline.models.vqgan import DISCRIMINATOR, GENERATOR, Config, Vqgan
from pipeline.models.vqgan.discriminator import adaptive_weight, generator_loss
from pipeline.models.vqgan.released import load_start, released_sizes

CONFIG = replace(Vqgan.smallest(), image_size=16, resolution=16, attention_at=(4,), discriminator_layers=1)


def built(**changes: Any) -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(replace(CONFIG, **changes))


def batch(rows: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8)}


def with_gradients(method: Vqgan, losses: dict[str, Tensor]) -> set[str]:
    """The parts whose weights get a gradient."""
    method.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return {name.partition(".")[0] for name, one in method.named_parameters() if one.grad is not None}


def test_each_turn_reaches_its_own_weights() -> None:
    method, images = built(), batch()
    assert with_gradients(method, method.turn_losses(images, GENERATOR)) == {"model"}
    assert with_gradients(method, method.turn_losses(images, DISCRIMINATOR)) == {"discriminator"}
    assert with_gradients(method, method(images)) == {"model", "discriminator"}
    assert method(images).keys() == {
        *method.turn_losses(images, GENERATOR),
        *method.turn_losses(images, DISCRIMINATOR),
    }


def test_losses_are_those_of_the_docstring() -> None:
    method = built(pixel_weight=2.0, codebook_weight=0.3, commitment_weight=0.7)
    images = batch()
    found = method.training_step(images)
    x = images["image"].float() / 127.5 - 1
    z = method.model.encode(x)
    distances = (z[:, None] - method.codebook[None, :, :, None, None]).square().sum(2)
    codes = method.codebook[distances.argmin(1)].permute(0, 3, 1, 2)
    y = method.model.decode(codes)
    pixels, squared = 2 * (x - y).abs().mean(), (z - codes).square().mean()
    assert method.discriminator is not None
    logits = method.discriminator(y)
    weight = adaptive_weight(pixels, generator_loss(logits), method.model.decoder.conv_out.weight)
    expected = {
        "pixels": pixels,
        "codebook": 0.3 * squared,
        "commitment": 0.7 * squared,
        "adversarial": -0.8 * weight * logits.mean(),
        "discriminator_real": (1 - method.discriminator(x)).relu().mean() / 2,
        "discriminator_fake": (1 + logits).relu().mean() / 2,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_perceptual_distance_adds_to_what_the_weight_measures() -> None:
    method = built(perceptual="clipmill-tiny:untrained", perceptual_layers=("conv1",), perceptual_weight=0.5)
    assert "perceptual" not in method.training_step(batch())
    method.prepare_training()
    assert method.perceptual is not None
    losses, names = method.training_step(batch()), set(method.state_dict())
    images = batch()["image"].float() / 255
    made = method.decode(method.quantise(method.encode(images))[0])
    torch.testing.assert_close(losses["perceptual"], 0.5 * method.perceptual(made, images).mean(), rtol=1e-4, atol=1e-5)
    assert names == set(built().state_dict())  # no checkpoint has the feature network


def test_the_discriminator_begins_at_its_step() -> None:
    method = built(discriminator_start=2)
    for step in range(4):
        losses = method.training_step(batch())
        assert ("adversarial" in losses) == ("discriminator_real" in losses) == (step >= 2)
        assert bool(method.turn_losses(batch(), DISCRIMINATOR)) == (step >= 2)
        method.after_step()
    resumed = built(discriminator_start=2)
    resumed.load_state_dict(method.state_dict())
    assert "adversarial" in resumed.training_step(batch())
    without = built(discriminator_weight=0.0)
    assert without.discriminator is None and "adversarial" not in without.training_step(batch())


def test_training_counts_codes_and_evaluation_does_not() -> None:
    method = built()
    numbers = method.quantise(method.encode(batch()["image"].float() / 255))[1]
    method.training_step(batch())
    chosen = torch.bincount(numbers.flatten(), minlength=32).float() / numbers.numel()
    torch.testing.assert_close(method.use.shares, 0.01 * chosen)
    method.after_step()
    assert method.measures()["codebook_usage"] == pytest.approx(float((chosen > 0).float().mean()))
    before = {name: one.clone() for name, one in method.use.named_buffers()}
    method.eval().training_step(batch())
    assert all(torch.equal(one, before[name]) for name, one in method.use.named_buffers())


def test_dead_codes_restart_only_where_the_config_says_so() -> None:
    for limit in (None, 1):
        method = built(restart_after=limit)
        before = method.codebook.detach().clone()
        for _ in range(2):
            method.training_step(batch())
            method.after_step()
        changed = (method.codebook != before).any(dim=1)
        assert bool(changed.any()) == (limit is not None)
        assert not changed[method.use.shares > 0].any()


SETTINGS = {
    "base_learning_rate": 4.5e-6,
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "embed_dim": 8,
        "n_embed": 32,
        "ddconfig": {
            "double_z": False, "z_channels": 16, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {}},
    },
}  # fmt: skip


def released(folder: Path, **more: Any) -> str:
    """A checkpoint and settings in the authors' layout, with made-up weights; the place of the former."""
    state = dict(built().model.state_dict())
    state |= {
        "loss.discriminator.main.0.weight": torch.zeros(4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    torch.save({"state_dict": state, "epoch": 9, "callbacks": {}, **more}, folder / "last.ckpt")
    (folder / "last.yaml").write_text(yaml.safe_dump({"model": SETTINGS}))
    return str(folder / "last.ckpt")


def test_the_authors_checkpoints_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place, method = released(tmp_path), built()
    with caplog.at_level(logging.INFO, logger="pipeline.models.vqgan.released"):
        codes = load_image_codes(place, "cpu")
    assert "2 tensors of the loss" in caplog.text
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(codes.decode(codes.encode(images)), method.eval().decode(method.encode(images)))
    (tmp_path / "model.yaml").write_text((tmp_path / "last.yaml").read_text())
    (tmp_path / "last.yaml").unlink()
    assert torch.equal(load_image_codes(f"{place}@{tmp_path}/model.yaml", "cpu").codebook, codes.codebook)
    with pytest.raises(SettingError, match=r"last\.yaml"):
        load_image_codes(place, "cpu")


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    place = released(tmp_path, optimizer_states=Hostile(tmp_path / "run"))
    with pytest.raises(SettingError, match="mkdir"):
        load_start(built().model, place)
    torch.save(Hostile(tmp_path / "run"), tmp_path / "bare.ckpt")
    with pytest.raises(SettingError, match="start_from"):
        load_start(built().model, str(tmp_path / "bare.ckpt"))
    assert not (tmp_path / "run").exists()


def test_weights_and_settings_of_other_models_are_refused(tmp_path: Path) -> None:
    place = released(tmp_path)
    with pytest.raises(SettingError, match="quantize.embedding.weight 32x8 instead of 40x8"):
        load_start(built(codes=40).model, place)
    with pytest.raises(SettingError, match="start_from"):
        load_start(built().model, str(tmp_path / "none.ckpt"))
    parameters: dict[str, Any] = SETTINGS["params"]  # type: ignore[assignment]
    for changes, said in (
        ({"target": "taming.models.vqgan.GumbelVQ"}, "Gumbel"),
        ({"params": {**parameters, "ddconfig": {**parameters["ddconfig"], "double_z": True}}}, "double_z"),
        ({"params": {**parameters, "ddconfig": {**parameters["ddconfig"], "ch": 33}}}, "channels"),
        ({"params": {"ddconfig": {}}}, "ddconfig"),
        ({"params": 7}, "ddconfig"),
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump({"model": {**SETTINGS, **changes}}))
        with pytest.raises(SettingError, match=said):
            released_sizes(str(tmp_path / "other.yaml"))
    (tmp_path / "other.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(SettingError, match="settings"):
        released_sizes(str(tmp_path / "other.yaml"))


def test_the_config_has_the_authors_values() -> None:
    config = Config()
    assert (config.discriminator_start, config.discriminator_weight) == (250_001, 0.8)
    assert (config.channels, config.multipliers, config.attention_at) == (128, (1, 1, 2, 2, 4), (16,))
    assert config.downsampling == 16 and (config.codes, config.code_width) == (1024, 256)
