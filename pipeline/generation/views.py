"""Augmented views of images, in one operation for all images and all views, with gradients.

Random numbers are sampled first and applied then, so that two images can share them, as CLIPasso's sketch and
photo do. A view is a projective map from the unit square of the view to that of the image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.generation.streams import normal, uniform

GREY = (0.299, 0.587, 0.114)
Augmentation = Literal["perspective", "cutouts", "squares", "none"]
CORNERS = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))


class ViewMaker(Protocol):
    """How many views an image has, and how they are made."""

    @property
    def at_input_size(self) -> bool:
        """Whether views are made at the size of a CLIP's input, else at that of the image."""
        ...

    @property
    def count(self) -> int:
        """Views of an image."""
        ...

    def draw(self, random: Sequence[torch.Generator]) -> Tensor:
        """The random numbers of N images: float32 [N, count, K]."""
        ...

    def apply(self, images: Tensor, random_numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Images float [N, 3, H, W] to views [N x count, 3, h, w] of this ``size``, image after image."""
        ...


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """The image itself as its only view."""

    at_input_size: ClassVar[bool] = False

    count: int = 1

    def draw(self, random: Sequence[torch.Generator]) -> Tensor:
        """No numbers."""
        return torch.empty(len(random), 1, 0)

    def apply(self, images: Tensor, random_numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Resized, if its size differs."""
        return resized(images, size)


@dataclass(frozen=True, kw_only=True)
class PerspectiveCrops:
    """A random perspective, then a random crop, as CLIPDraw and CLIPasso have them.

    As torchvision's RandomPerspective and RandomResizedCrop in a row, with one bilinear interpolation instead of two.
    """

    at_input_size: ClassVar[bool] = False

    count: int
    distortion: float = 0.5
    """How far corners move inwards, as a part of half the side."""
    scale: tuple[float, float] = (0.7, 0.9)
    """Area of the crop, as a part of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratios of the crop; of these, those that fit are sampled."""
    fill: float = 1.0
    """Value outside of the image."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "views", self.count, "1 or more")

    def draw(self, random: Sequence[torch.Generator]) -> Tensor:
        """Eight for the corners, four for the crop."""
        return uniform(random, self.count, 12)

    def apply(self, images: Tensor, random_numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """One sampling for both."""
        numbers = random_numbers.flatten(0, 1)
        maps = perspective(numbers[:, :8] * self.distortion / 2) @ self.crop(numbers[:, 8:])
        return sampled(images.repeat_interleave(self.count, 0), maps, size, self.fill)

    def crop(self, numbers: Tensor) -> Tensor:
        """Maps [n, 3, 3] from the crop's unit square to the image's, by four numbers each."""
        low, high = self.scale
        area = low + (high - low) * numbers[:, 0]
        # A box fits the square if its ratio lies between its area and the inverse of it.
        least = torch.maximum(area, torch.full_like(area, self.ratio[0])).log()
        most = torch.minimum(1 / area, torch.full_like(area, self.ratio[1])).log()
        ratio = (least + (most - least) * numbers[:, 1]).exp()
        sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
        return boxes((1 - sides) * numbers[:, 2:4], sides)


@dataclass(frozen=True, kw_only=True)
class Cutouts:
    """VQGAN-CLIP's default: the image pooled to the size of the view, then affine maps, perspectives, colours, erasing.

    Each part applies to 70 % of the views, the erased box to all views of an image alike. Colours are torchvision's
    brightness, contrast and saturation, and a rotation of the hue in YIQ, each up to 10 %.
    """

    at_input_size: ClassVar[bool] = True

    count: int = 32
    part: float = 0.7
    """Probability of each augmentation."""
    noise: float = 0.1
    """Largest standard deviation of the noise."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "views", self.count, "1 or more")

    def draw(self, random: Sequence[torch.Generator]) -> Tensor:
        """By index: 0-2 which parts apply, 3-6 affine, 7-14 perspective, 15-18 colours, 19 seed and 20 strength of the
        noise, 22-26 the erased box. The seed and the box of an image are those of its first view; 21 and 27 are spare.
        """
        return uniform(random, self.count, 28)

    def apply(self, images: Tensor, random_numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """All parts in a row."""
        pools = functional.adaptive_avg_pool2d(images, size), functional.adaptive_max_pool2d(images, size)
        views = ((pools[0] + pools[1]) / 2).repeat_interleave(self.count, 0)
        numbers = random_numbers.flatten(0, 1)
        keep = (numbers[:, :3] >= self.part)[..., None, None]
        same = torch.eye(3)
        turned = torch.where(keep[:, 0], same, affine(2 * numbers[:, 3:7] - 1))
        views = sampled(views, turned, size)
        bent = torch.where(keep[:, 1], same, perspective(numbers[:, 7:15] * 0.35))
        views = sampled(views, bent, size)
        jitter = torch.where(keep[:, 2, 0], 0, 2 * numbers[:, 15:19] - 1) * 0.1
        views = coloured(views, jitter.to(views))
        whole = _erased(random_numbers[:, 0, 22:], self.part, size).repeat_interleave(self.count, 0)
        views = views * whole.to(views)
        seeds = [torch.Generator().manual_seed(int(one)) for one in (random_numbers[:, 0, 19] * 2**31).tolist()]
        strength = self.noise * numbers[:, 20, None, None, None]
        return views + (strength * normal(seeds, self.count, 3, *size).flatten(0, 1)).to(views)


@dataclass(frozen=True, kw_only=True)
class RandomSquares:
    """VQGAN-CLIP's first method: random squares, resized without aliasing."""

    at_input_size: ClassVar[bool] = True

    count: int = 32
    power: float = 1.0
    """Sides are smallest + u^power (largest - smallest) with u from 0 to 1; more than 1 prefers small squares."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "views", self.count, "1 or more")
        require(self.power > 0, "cut_power", self.power, "more than 0")

    def draw(self, random: Sequence[torch.Generator]) -> Tensor:
        """Size, left and top."""
        return uniform(random, self.count, 3)

    def apply(self, images: Tensor, random_numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """One by one, since each has another size."""
        height, width = images.shape[2:]
        most = min(height, width)
        least = min(most, *size)
        found = []
        for image, views in zip(images, random_numbers.tolist(), strict=True):
            for share, left, top in views:
                side = int(share**self.power * (most - least) + least)
                x, y = int(left * (width - side + 1)), int(top * (height - side + 1))
                found.append(resized(image[None, :, y : y + side, x : x + side], size))
        return torch.cat(found)


def views_of(kind: Augmentation, count: int, power: float = 1.0) -> ViewMaker:
    """``count`` views of a kind; ``none`` is the image itself. ``power`` is that of :class:`RandomSquares`."""
    kinds: dict[str, Callable[[], ViewMaker]] = {
        "perspective": lambda: PerspectiveCrops(count=count),
        "cutouts": lambda: Cutouts(count=count),
        "squares": lambda: RandomSquares(count=count, power=power),
        "none": Unchanged,
    }
    return kinds[kind]()


def as_float(pixels: NDArray[np.uint8]) -> Tensor:
    """An image uint8 [H, W, 3] as float32 [3, H, W] from 0 to 1."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic, where the size differs."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def sampled(images: Tensor, maps: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """Bilinear samples of ``images`` [n, 3, H, W] where ``maps`` [n, 3, 3] take the pixels of a view of this size."""
    maps = maps.to(images)
    rows, columns = ((torch.arange(length).to(images) + 0.5) / length for length in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=2) @ maps[:, None].mT
    grid = 2 * places[..., :2] / places[..., 2:] - 1
    found = functional.grid_sample(images - fill, grid, align_corners=False)
    filled: Tensor = found + fill
    return filled


def perspective(inwards: Tensor) -> Tensor:
    """Maps [n, 3, 3] that move the image's corners inwards by [n, 8] parts of the side, x and y of each from 0."""
    square = torch.tensor(CORNERS, dtype=inwards.dtype)
    ends = square + inwards.unflatten(1, (4, 2)) * (1 - 2 * square)
    # From each moved corner to the corner itself: two equations for eight numbers.
    x, y = ends.unbind(2)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = []
    for place, (first, second) in ((square[:, 0], (True, False)), (square[:, 1], (False, True))):
        near = [x, y, one] if first else [zero] * 3
        far = [x, y, one] if second else [zero] * 3
        rows.append(torch.stack([*near, *far, -x * place, -y * place], dim=2))
    wanted = torch.cat([square[:, 0], square[:, 1]]).expand(len(ends), 8)
    found = torch.linalg.solve(torch.cat(rows, dim=1), wanted)
    maps: Tensor = torch.cat([found, torch.ones_like(found[:, :1])], dim=1)
    return maps.view(-1, 3, 3)


def boxes(corner: Tensor, sides: Tensor) -> Tensor:
    """Maps [n, 3, 3] of boxes with this upper left ``corner`` and these ``sides``, [n, 2] as parts of the image."""
    maps = torch.zeros(len(sides), 3, 3, dtype=sides.dtype)
    maps[:, 0, 0], maps[:, 1, 1], maps[:, 2, 2] = sides[:, 0], sides[:, 1], 1
    maps[:, :2, 2] = corner
    return maps


def affine(numbers: Tensor) -> Tensor:
    """Maps [n, 3, 3] of VQGAN-CLIP's affine: up to 15 degrees, a shift by 0.1 of the side, a shear of 5 degrees.

    ``numbers`` are [n, 4] from -1 to 1.
    """
    angle, shear = numbers[:, 0] * math.radians(15), numbers[:, 3] * math.radians(5)
    maps = torch.zeros(len(numbers), 3, 3, dtype=numbers.dtype)
    maps[:, 0, 0], maps[:, 0, 1] = angle.cos(), shear.tan() * angle.cos() - angle.sin()
    maps[:, 1, 0], maps[:, 1, 1] = angle.sin(), shear.tan() * angle.sin() + angle.cos()
    centre = torch.full((2,), 0.5, dtype=numbers.dtype)
    maps[:, :2, 2] = centre - maps[:, :2, :2] @ centre + 0.1 * numbers[:, 1:3]
    maps[:, 2, 2] = 1
    return maps


def coloured(images: Tensor, numbers: Tensor) -> Tensor:
    """Brightness, contrast and saturation times 1 + a number, and the hue turned by a number of turns: [n, 4]."""
    brightness, contrast, saturation, hue = (1 + numbers[:, :, None, None]).unbind(1)
    grey = torch.tensor(GREY).to(images)[:, None, None]
    images = images * brightness[:, None]
    mean = (images * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = mean + (images - mean) * contrast[:, None]
    light = (images * grey).sum(1, keepdim=True)
    images = light + (images - light) * saturation[:, None]
    return torch.einsum("nij,njhw->nihw", _hue_turns(hue[:, 0, 0] - 1), images)


def _hue_turns(turns: Tensor) -> Tensor:
    """Matrices [n, 3, 3] on RGB that turn the plane of the colours in YIQ."""
    to_yiq = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)]).to(turns)
    angle = 2 * math.pi * turns
    middle = torch.zeros(len(turns), 3, 3).to(turns)
    middle[:, 0, 0] = 1
    middle[:, 1, 1] = middle[:, 2, 2] = angle.cos()
    middle[:, 2, 1], middle[:, 1, 2] = angle.sin(), -angle.sin()
    matrices: Tensor = torch.linalg.inv(to_yiq) @ middle @ to_yiq
    return matrices


def _erased(numbers: Tensor, part: float, size: tuple[int, int]) -> Tensor:
    """0 in a box of 0.1 to 0.4 of the area with a ratio from 0.3 to its inverse, 1 elsewhere: [N, 1, *size]."""
    area = 0.1 + 0.3 * numbers[:, 1]
    ratio = (math.log(0.3) * (1 - 2 * numbers[:, 2])).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    corner = (1 - sides) * numbers[:, 3:5]
    axes = [(torch.arange(length) + 0.5) / length for length in size[::-1]]
    within = [
        (axis >= corner[:, n, None]) & (axis < corner[:, n, None] + sides[:, n, None]) for n, axis in enumerate(axes)
    ]
    hidden = within[1][:, :, None] & within[0][:, None] & (numbers[:, 0] < part)[:, None, None]
    return (~hidden)[:, None].float()
