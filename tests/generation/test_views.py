"""Augmented views against torchvision's functions with the same parameters, and their random numbers."""

import cmath
import colorsys
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2_functional

from pipeline.generation.streams import Draw, generators
from pipeline.generation.views import (
    Cutouts,
    PerspectiveCrops,
    RandomSquares,
    Unchanged,
    ViewMaker,
    affine,
    coloured,
    perspective,
    sampled,
)


def smooth(images: int, side: int = 48) -> Tensor:
    """Images without sharp edges, so that one or two interpolations hardly differ."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(images, 3, 4, 4, generator=random)
    return functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def test_perspective_is_torchvisions() -> None:
    image, inwards = smooth(1), torch.tensor([[0.1, 0.05, 0.2, 0, 0.03, 0.15, 0.08, 0.12]])
    square = [[0, 0], [48, 0], [48, 48], [0, 48]]
    signs = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    moves = (inwards.view(4, 2) * 48).tolist()
    ends = [[x + sx * dx, y + sy * dy] for (x, y), (sx, sy), (dx, dy) in zip(square, signs, moves, strict=True)]
    theirs = v2_functional.perspective(image, square, ends, fill=[1.0])
    ours = sampled(image, perspective(inwards), (48, 48), fill=1)
    inner = slice(11, -11)  # torchvision blends with the fill at the border in its own way
    assert torch.allclose(ours[..., inner, inner], theirs[..., inner, inner], atol=2e-3)
    assert (ours - theirs).abs().mean() < 5e-3


def test_a_crop_is_torchvisions_resized_crop() -> None:
    views, image = PerspectiveCrops(count=1, distortion=0), smooth(1)
    numbers = torch.tensor([[[0.0] * 8 + [0.5, 0.4, 0.25, 0.75]]])
    area = 0.8
    ratio = math.exp(math.log(area) + 0.4 * (math.log(1 / area) - math.log(area)))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    ours = views.apply(image, numbers, (40, 40))
    left, top = 0.25 * (1 - width), 0.75 * (1 - height)
    theirs = v2_functional.resized_crop(
        functional.interpolate(image, scale_factor=16, mode="bilinear"),
        *(round(768 * one) for one in (top, left, height, width)),
        [40, 40],
        antialias=False,
    )
    assert torch.allclose(ours, theirs, atol=0.01)


def test_crops_have_the_asked_areas_and_stay_inside() -> None:
    views = PerspectiveCrops(count=500)
    numbers = views.draw(generators([3], 0, Draw.VIEWS))[0]
    maps = views.crop(numbers[:, 8:])
    sides, corner = torch.stack([maps[:, 0, 0], maps[:, 1, 1]], 1), maps[:, :2, 2]
    areas, ratios = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert 0.7 <= areas.min() < 0.72 and 0.88 < areas.max() <= 0.9001
    assert ratios.min() >= 0.7 - 1e-4 and ratios.max() <= 1 / 0.7 + 1e-4
    assert corner.min() >= 0 and (corner + sides).max() <= 1 + 1e-6


def test_affine_is_torchvisions() -> None:
    """Rotation, shift and shear, black outside; a map from the view to the image is the inverse of torchvision's."""
    image, bilinear = smooth(1), v2.InterpolationMode.BILINEAR
    for numbers, angle, shift, shear in (
        ([0.8, 0, 0, 0], -12.0, [0, 0], 0.0),
        ([0, 0.625, -0.625, 0], 0.0, [-3, 3], 0.0),
        ([0, 0, 0, 0.9], 0.0, [0, 0], 4.5),
    ):
        ours = sampled(image, affine(torch.tensor([numbers])), (48, 48))
        theirs = v2_functional.affine(image, angle, shift, 1.0, [shear, 0.0], bilinear)
        assert (ours - theirs).abs()[..., 8:-8, 8:-8].max() < 5e-3, numbers
        assert not torch.allclose(theirs[..., 8:-8, 8:-8], image[..., 8:-8, 8:-8], atol=0.01)


def test_cutouts_are_black_where_an_affine_leaves_the_image() -> None:
    """As the authors' (padding with zeros); the map of each view is made of its own random numbers."""
    views, image = Cutouts(count=8, part=1, noise=0), torch.full((1, 3, 32, 32), 0.9)
    drawn = views.draw(generators([4], 0, Draw.VIEWS))
    drawn[..., 7:15] = 0  # no perspective
    drawn[..., 15:19] = 0.5  # no colours
    drawn[..., 22] = 1  # nothing is erased
    seen = views.apply(image, drawn, (32, 32))
    for view, numbers in zip(seen, drawn[0], strict=True):
        wanted = sampled(image, affine(2 * numbers[None, 3:7] - 1), (32, 32))[0]
        assert torch.allclose(view, wanted, atol=1e-4) and 0 < float((view == 0).float().mean()) < 0.5


def test_colours_are_torchvisions() -> None:
    images = smooth(2)
    jitter = torch.tensor([[0.1, 0, 0, 0], [0, 0, -0.1, 0]])
    wanted = [v2_functional.adjust_brightness(images[0], 1.1), v2_functional.adjust_saturation(images[1], 0.9)]
    for ours, theirs in zip(coloured(images, jitter), wanted, strict=True):
        assert torch.allclose(ours.clamp(0, 1), theirs, atol=2e-3)
    contrast = coloured(images[:1], torch.tensor([[0, 0.1, 0, 0]]))[0].clamp(0, 1)
    assert torch.allclose(contrast, v2_functional.adjust_contrast(images[0], 1.1), atol=2e-3)
    whole = coloured(images, torch.tensor([[0, 0, 0, 1.0]]).expand(2, 4))  # once around
    assert torch.allclose(whole, images, atol=1e-3)


@pytest.mark.parametrize("turns", [0.1, -0.1, 1 / 3])
def test_hues_turn_in_the_plane_of_yiqs_colours(turns: float) -> None:
    """By Python's YIQ, whose numbers are rounded: the same brightness and saturation, another angle from I to Q."""
    for colour in ((0.9, 0.2, 0.1), (0.2, 0.6, 0.3), (0.1, 0.3, 0.8)):
        found = coloured(torch.tensor(colour).view(1, 3, 1, 1), torch.tensor([[0, 0, 0, turns]])).flatten().tolist()
        (y, i, q), (luma, in_phase, quadrature) = colorsys.rgb_to_yiq(*colour), colorsys.rgb_to_yiq(*found)
        turned = complex(i, q) * cmath.exp(2j * math.pi * turns)
        assert abs(luma - y) < 0.02 and abs(complex(in_phase, quadrature) - turned) < 0.02 and abs(turned) > 0.1


KINDS: list[ViewMaker] = [
    PerspectiveCrops(count=3),
    PerspectiveCrops(count=2, scale=(0.8, 0.8), ratio=(1, 1)),
    Cutouts(count=3),
    RandomSquares(count=3),
    Unchanged(),
]


@pytest.mark.parametrize("views", KINDS, ids=lambda one: type(one).__name__)
def test_views_of_a_batch_are_those_of_its_images(views: ViewMaker) -> None:
    """By their seeds, in order, with gradients of every image; another step has other views."""
    images = smooth(3).requires_grad_()
    drawn = views.draw(generators([5, 6, 7], 2, Draw.VIEWS))
    together = views.apply(images, drawn, (32, 24))
    assert tuple(together.shape) == (3 * views.count, 3, 32, 24) and bool(together.isfinite().all())
    alone = views.apply(images[1:2], views.draw(generators([6], 2, Draw.VIEWS)), (32, 24))
    assert torch.allclose(together.unflatten(0, (3, -1))[1], alone, atol=1e-6)
    if views.count > 1:
        later = views.apply(images[1:2], views.draw(generators([6], 3, Draw.VIEWS)), (32, 24))
        assert not torch.allclose(alone, later, atol=1e-3)
        assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    (slope,) = torch.autograd.grad(together.sum(), images)
    assert slope.flatten(1).abs().sum(1).min() > 0


def test_cutouts_pool_and_erase_a_box_of_the_images_views_alike() -> None:
    views = Cutouts(count=4, part=0, noise=0)
    images = smooth(2)
    drawn = views.draw(generators([1, 2], 0, Draw.VIEWS))
    pooled = (functional.adaptive_avg_pool2d(images, 16) + functional.adaptive_max_pool2d(images, 16)) / 2
    assert torch.allclose(views.apply(images, drawn, (16, 16)).unflatten(0, (2, 4)), pooled[:, None], atol=1e-5)
    erased = Cutouts(count=4, part=1, noise=0)
    hidden = erased.apply(torch.ones(1, 3, 64, 64) * 0.9, drawn[:1], (64, 64)) == 0
    black = hidden.all(1).float().mean((1, 2))
    assert 0.08 < float(black.min())
    same = hidden.all(1).all(0).float().mean()
    assert 0.08 < float(same) < 0.42
