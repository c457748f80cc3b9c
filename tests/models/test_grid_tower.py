"""Grids of image towers against open_clip's own features, and their input."""

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.models.class_vectors import untrained
from pipeline.models.clip import Clip, Config
from pipeline.models.towers.grid import GridTower, fold_norms, grid_features, resized_positions

SMALL: dict[str, Any] = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16}


def resnet() -> Any:
    text = {"width": 16, "heads": 1, "layers": 1, "vocab_size": 100}
    torch.manual_seed(0)
    model = open_clip.CLIP(32, SMALL, text)
    model.visual.preprocess_cfg = {
        "size": (64, 64),
        "mean": (0.48, 0.46, 0.41),
        "std": (0.27, 0.26, 0.28),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return model.eval()


def random_norms(module: torch.nn.Module) -> None:
    """Batch normalisation that changes every activation; open_clip's weights of 0 would hide the residual blocks."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.2)
            torch.nn.init.normal_(norm.running_mean, std=0.2)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)


def images(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@torch.no_grad()
def test_a_resnet_gives_its_last_stage() -> None:
    model, pixels = resnet(), images(64, 96)
    seen: list[Tensor] = []
    model.visual.layer4.register_forward_hook(lambda *args: seen.append(args[-1]))
    whole = torch.randn(2, 3, 64, 64)
    model.visual(whole)
    torch.testing.assert_close(grid_features(model.visual, whole), seen[-1])
    theirs = model.visual.forward_intermediates(whole, indices=1, intermediates_only=True)["image_intermediates"][0]
    torch.testing.assert_close(grid_features(model.visual, whole), theirs)
    tower = GridTower(model).eval()
    assert (tower.stride, tower.width) == (32, 16 * 8 * 4)
    assert tower(pixels).shape == (2, tower.width, 2, 3)
    normalised = (pixels.float() / 255 - torch.tensor((0.48, 0.46, 0.41)).view(3, 1, 1)) / torch.tensor(
        (0.27, 0.26, 0.28)
    ).view(3, 1, 1)
    torch.testing.assert_close(tower(pixels), grid_features(tower.visual, normalised), rtol=1e-4, atol=1e-4)
    tower.train()
    assert not any(module.training for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d))


@torch.no_grad()
def test_a_vision_transformer_gives_its_normalised_patches_without_the_class_token() -> None:
    clip = untrained("clipmill-tiny")
    image = torch.randn(2, 3, 64, 64)
    settings: dict[str, Any] = {"indices": 1, "normalize_intermediates": True, "intermediates_only": True}
    theirs = clip.model.visual.forward_intermediates(image, **settings)["image_intermediates"][0]
    torch.testing.assert_close(grid_features(clip.model.visual, image), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_size_interpolates_positions_as_open_clip_does() -> None:
    """A square of 96 pixels, with the weights that open_clip resizes for it when it loads them."""
    clip = untrained("clipmill-tiny")
    larger = Clip(replace(Config(architecture="clipmill-tiny"), image_size=96)).eval()
    state = clip.model.state_dict()
    open_clip.model.resize_pos_embed(state, larger.model, interpolation="bicubic", antialias=True)
    larger.model.load_state_dict(state)
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(
        grid_features(clip.model.visual, image), grid_features(larger.model.visual, image), rtol=1e-4, atol=1e-4
    )
    wide = resized_positions(clip.model.visual.positional_embedding, (4, 6))
    assert wide.shape == (25, 64) and torch.equal(wide[0], clip.model.visual.positional_embedding[0])


def test_all_weights_of_the_tower_have_gradients() -> None:
    for model in (resnet(), untrained("clipmill-tiny").model, untrained("clipmill-small").model):
        tower = GridTower(model).train()
        tower.requires_grad_(True)
        tower(images(64, 96)).square().sum().backward()
        assert [name for name, value in tower.named_parameters() if value.grad is None] == []


@torch.no_grad()
def test_folded_norms_change_no_feature() -> None:
    for model, kept in ((resnet(), 0), (untrained("clipmill-small").model, 0), (untrained("clipmill-tiny").model, 0)):
        tower = GridTower(model).eval()
        random_norms(tower)
        pixels = images(64, 96)
        before = tower(pixels)
        fold_norms(tower)
        assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in tower.modules()) == kept
        torch.testing.assert_close(tower(pixels), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_every_convolution_of_a_block_counts() -> None:
    """What the test of folded norms needs to be able to fail."""
    model, pixels = resnet(), images(64, 64)
    tower = GridTower(model).eval()
    random_norms(tower)
    before = tower(pixels)
    for name, norm in tower.named_modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.bias.add_(0.5)
            assert not torch.allclose(tower(pixels), before, rtol=1e-3, atol=1e-3), name
            norm.bias.sub_(0.5)


def test_the_digest_is_of_weights_and_input() -> None:
    tower, other = GridTower(untrained("clipmill-tiny").model), GridTower(untrained("clipmill-small").model)
    assert tower.digest((64, 64)) == GridTower(untrained("clipmill-tiny").model).digest((64, 64))
    assert len({tower.digest((64, 64)), tower.digest((64, 96)), other.digest((64, 64))}) == 3


@pytest.mark.parametrize("size", [(60, 64), (64, 8), (0, 64)])
def test_sizes_that_are_no_multiples_of_a_cell_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match="image_size"):
        GridTower(untrained("clipmill-tiny").model).check_size(size)
