"""VQGAN-CLIP: starts, the quantiser in use, limits, clamps, averages and masks; images that become their prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.generation.loop import LoopConfig, Optimization
from pipeline.generation.method import Subject, generation_class
from pipeline.generation.methods.vqgan_clip import (
    CodePicture,
    Config,
    VqganClip,
    clamp_with_gradient,
    gradients,
    start_codes,
)
from pipeline.generation.prompts import parse_prompts
from pipeline.generation.streams import Draw, generators
from pipeline.models.towers.image_codes import ImageCodes, quantised, straight_through
from pipeline.models.vqgan import Vqgan
from tests.generation.toy_clip import colour_guide

LEVELS = (0.0, 0.3, 0.7, 1.2)


class ColourCodes(nn.Module):
    """A code is a colour of 4 x 4 pixels: each channel has one of four levels, of which 1.2 is clamped."""

    downsampling = 4

    def __init__(self) -> None:
        super().__init__()
        self.codebook = torch.cartesian_prod(*[torch.tensor(LEVELS)] * 3)

    def encode(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, 4)

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes, numbers = quantised(latents, self.codebook)
        return straight_through(latents, codes), numbers

    def decode(self, codes: Tensor) -> Tensor:
        return functional.interpolate(codes, scale_factor=4)


def small(**changed: object) -> Config:
    loop = LoopConfig(steps=30, evaluate_every=10, checkpoint_every=7)
    usual = {"codes": "codes", "clips": ("toy",), "size": (24, 16), "views": 3, "loop": loop}
    return Config(**{**usual, **changed})  # type: ignore[arg-type]


def optimization(
    texts: list[str], seeds: list[int], codes: ImageCodes | None = None, **changed: object
) -> Optimization:
    method = VqganClip(small(**changed))
    subjects = [Subject(prompts=parse_prompts(text)) for text in texts]
    picture, objective = method.start(subjects, seeds, {"toy": colour_guide()}, {"codes": codes or ColourCodes()})
    return Optimization(picture, objective, method.loop, seeds, colour_guide(12))


def test_the_method_is_found_and_codes_are_colours() -> None:
    assert generation_class("vqgan_clip") is VqganClip and isinstance(ColourCodes(), ImageCodes)
    assert VqganClip(small()).codes == ("codes",) and VqganClip(small()).models == ("toy",)


def test_a_clamp_passes_gradients_that_lead_back() -> None:
    """By hand: value, gradient of the output, and what the value gets; a step is against the gradient."""
    table = [
        *((-0.5, 1.0, 0.0), (-0.5, -1.0, -1.0)),  # below: only an increase leads back
        *((0.5, 1.0, 1.0), (0.5, -1.0, -1.0), (0.0, 2.0, 2.0), (1.0, -2.0, -2.0)),
        *((1.5, 1.0, 1.0), (1.5, -1.0, 0.0)),
    ]
    values = torch.tensor([value for value, _, _ in table], requires_grad=True)
    clamped = clamp_with_gradient(values, 0, 1)
    assert torch.equal(clamped, values.detach().clamp(0, 1))
    clamped.backward(torch.tensor([given for _, given, _ in table]))
    assert values.grad is not None and values.grad.tolist() == [wanted for _, _, wanted in table]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_an_image_is_made_of_its_nearest_codes_and_z_has_their_gradient(average: float) -> None:
    z = torch.rand(2, 3, 4, 6) * 1.2
    picture = CodePicture(ColourCodes(), z, average=average)
    image = picture.render()
    levels = torch.tensor(LEVELS)
    nearest = levels[(z[..., None] - levels).abs().argmin(-1)].clamp(max=1)
    assert torch.allclose(image, nearest.repeat_interleave(4, 2).repeat_interleave(4, 3))
    weights = torch.randn_like(image)
    (image * weights).sum().backward()
    level = functional.interpolate(levels[(z[..., None] - levels).abs().argmin(-1)], scale_factor=4)
    passed = torch.where((level > 1) & (weights < 0), 0, weights)  # those lead further outside
    assert picture.z.grad is not None and torch.allclose(picture.z.grad, functional.avg_pool2d(passed, 4) * 16)


def test_z_stays_within_the_codes_of_each_channel() -> None:
    codes = ColourCodes()
    codes.codebook = codes.codebook * torch.tensor([1.0, 0.5, -1.0])
    picture = CodePicture(codes, torch.zeros(1, 3, 2, 2))
    with torch.no_grad():
        picture.z += torch.tensor([-9.0, 0.25, 9, -0.5]).view(1, 1, 2, 2)
    picture.after_step()
    wanted = [[0, 0.25, 1.2, 0], [0, 0.25, 0.6, 0], [-1.2, 0, 0, -0.5]]
    assert torch.allclose(picture.z[0].flatten(1), torch.tensor(wanted))


def test_the_init_term_falls_with_the_steps() -> None:
    z = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    picture = CodePicture(ColourCodes(), z, init_weight=0.4)
    for step in (0, 1, 7):
        wanted = [0.4 * square / (2 * (2 * step + 1)) for square in (1, 9)]
        assert picture.penalties(step)["init"].tolist() == pytest.approx(wanted)
    assert CodePicture(ColourCodes(), z).penalties(3) == {}


def test_the_shown_image_is_the_average_of_codes_without_bias() -> None:
    """Against the weighted mean of all states by hand, the start among them."""
    states = torch.rand(5, 1, 3, 2, 2)
    picture = CodePicture(ColourCodes(), states[0], average=0.6)
    assert torch.allclose(picture.shown(), picture.render())
    for state in states[1:]:
        with torch.no_grad():
            picture.z.copy_(state)
        picture.after_step()
    weights = torch.tensor([0.6 ** (4 - place) for place in range(5)])
    mean = (states * (weights / weights.sum()).view(-1, 1, 1, 1, 1)).sum(0)
    codes = ColourCodes()
    wanted = codes.decode(codes.quantise(mean)[0]).clamp(0, 1)
    assert torch.allclose(picture.shown(), wanted) and not torch.allclose(picture.shown(), picture.render())


def photo(folder: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> str:
    """Left half red, right half green or, with alpha, transparent."""
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[:, : size[0] // 2] = (255, 0, 0, 255)
    pixels[:, size[0] // 2 :] = (0, 255, 0, 0 if mode == "RGBA" else 255)
    place = folder / "photo.png"
    Image.fromarray(pixels).convert(mode).save(place)
    return str(place)


def test_images_start_from_codes_noise_or_gradients_by_seed() -> None:
    codes, size = ColourCodes(), (16, 24)
    for kind in ("codes", "noise", "gradient"):
        start = start_codes(codes, kind, [5, 6], size)
        assert tuple(start.shape) == (2, 3, 4, 6)
        assert torch.equal(start, quantised(start, codes.codebook)[0])  # entries of the codebook
        assert torch.equal(start_codes(codes, kind, [6], size)[0], start[1])
        assert not torch.equal(start[0], start[1])
    many = start_codes(codes, "codes", [1], (256, 256))
    numbers = quantised(many, codes.codebook)[1].flatten()
    assert torch.bincount(numbers, minlength=64).min() > 30  # 64 expected of each of 64 codes
    ramps = gradients(generators(list(range(40)), 0, Draw.START), (8, 5)).flatten(0, 1)
    down, right = ramps.diff(dim=1), ramps.diff(dim=2)
    assert bool(((down.abs().amax((1, 2)) < 1e-6) ^ (right.abs().amax((1, 2)) < 1e-6)).all())
    assert torch.allclose(down[:, :1], down[:, -1:], atol=1e-6) and 0 <= ramps.min() and ramps.max() <= 1
    assert 40 < int((right.abs().amax((1, 2)) < 1e-6).sum()) < 80


def test_a_start_image_of_another_size_is_resized_and_alpha_is_white(tmp_path: Path) -> None:
    for mode, right in (("RGB", (0.0, 1.0, 0.0)), ("RGBA", (1.0, 1.0, 1.0))):
        place = photo(tmp_path, mode)
        run = optimization(["blue"], [1], start="image", start_image=place)
        image = run.picture.render()[0]
        assert tuple(image.shape) == (3, 16, 24)
        assert torch.allclose(image[:, :, :8].mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.05)
        assert torch.allclose(image[:, :, -8:].mean((1, 2)), torch.tensor(right), atol=0.05)


def test_a_mask_keeps_the_pixels_where_it_is_dark(tmp_path: Path) -> None:
    place, mask = photo(tmp_path), np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    settings: dict[str, Any] = {"start": "image", "start_image": place, "edit_mask": str(tmp_path / "mask.png")}
    run = optimization(["blue"], [1], **settings)
    run.run()
    image = run.picture.render()[0]
    assert torch.allclose(image[:, :, :11], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 11), atol=1e-4)
    assert image[2, :, 14:].mean() > 0.8 and image[1, :, 14:].mean() < 0.3
    for other, sentence in ((mask[:, :9], "the size of"), (mask * 0, "a light part")):
        Image.fromarray(other).save(tmp_path / "mask.png")
        with pytest.raises(SettingError, match=f"edit_mask: .*{sentence}"):
            optimization(["blue"], [1], **settings)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"augmentation": "squares", "cut_power": 2.0},
        {"average": 0.8, "start": "noise", "augmentation": "none"},
        {"init_weight": 0.1, "start": "gradient", "augmentation": "perspective"},
    ],
)
def test_images_become_their_prompts(changed: dict[str, Any], tmp_path: Path) -> None:
    """Texts, sums of weighted texts, and an image; under a judge of another size."""
    Image.new("RGB", (9, 9), (0, 255, 0)).save(tmp_path / "green.png")
    texts = ["blue", "red:2|blue:-0.5", f"image={tmp_path}/green.png"]
    run = optimization(texts, [1, 2, 3], **changed)
    history = run.run().history
    means = run.picture.shown().mean((2, 3))
    assert means.argmax(1).tolist() == [2, 0, 1]
    assert min(history[-1]["judge"]) > 0.85 and bool((run.picture.shown() >= 0).all())


@pytest.mark.parametrize("real", [False, True])
def test_an_image_is_the_same_alone_in_a_batch_and_after_a_break(real: bool) -> None:
    """With averages, and with a VQGAN of random weights."""
    torch.manual_seed(0)
    codes: Any = Vqgan(Vqgan.smallest()).eval().requires_grad_(False) if real else ColourCodes()
    texts, seeds, settings = ["red", "blue:2|green:-1"], [4, 5], {"average": 0.5, "init_weight": 0.2}
    loop = LoopConfig(steps=9, evaluate_every=3, checkpoint_every=4)
    batch, kept = optimization(texts, seeds, codes, loop=loop, **settings), list[bytes]()
    begin = batch.picture.render().detach()
    batch.run(kept.append)
    assert not torch.equal(batch.picture.render(), begin)
    for number in range(2):
        alone = optimization(texts[number : number + 1], seeds[number : number + 1], codes, loop=loop, **settings)
        alone.run()
        assert torch.allclose(alone.picture.shown()[0], batch.picture.shown()[number], atol=1e-4)
    again = optimization(texts, seeds, codes, loop=loop, **settings)
    again.resume(kept[0])
    assert again.progress.step == 4
    again.run()
    assert torch.equal(again.picture.shown(), batch.picture.shown())
    assert again.progress.history == batch.progress.history
    assert len(kept[0]) < 60_000  # the frozen VQGAN is no part of a checkpoint


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"clips": ()}, "clips"),
        ({"size": (24, 8)}, "size"),
        ({"size": (24, 18)}, "size: .*multiples of 4"),
        ({"views": 0}, "views"),
        ({"rate": 0.0}, "rate"),
        ({"cut_power": 0.0}, "cut_power"),
        ({"init_weight": -1.0}, "init_weight"),
        ({"average": 1.0}, "average"),
        ({"start": "image"}, "start_image"),
        ({"start_image": "a.png"}, "start_image"),
        ({"edit_mask": "a.png"}, "edit_mask"),
        ({"start": "image", "start_image": "none.png"}, "image: .*no such file"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}"):
        optimization(["red"], [1], **changed)
