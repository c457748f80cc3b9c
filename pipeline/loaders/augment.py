"""Several random crops of one image, and random parameters for colour augmentation on the training device.

An image is decoded once. All randomness is a pure function of (seed, epoch, sample number, view), as for a single crop:
a resumed run, or one with more workers, sees the same images. The loader crops and resizes. The training device changes
colours and blurs in batches (``pipeline.models.towers.colours``), so the loader sends only uint8 and a few numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import ATTEMPTS, ImageTransform, encoded_image, read_crops
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.shards.sample import Sample

MOST_VIEWS = RandomStream.COLOURS - RandomStream.VIEWS
ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, NUMBERS = slice(0, 4), 4, 5, 6, 7, 8, 9, 10
"""Columns in a row of :class:`ColourReader`."""


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Strengths and probabilities of colour augmentation, with SimCLR's values as used by SLIP (section 4.1)."""

    brightness: float = 0.4
    """Half-width of the range of the brightness factor, 0 to 1: uniform from 1 - this to 1 + this."""
    contrast: float = 0.4
    """Half-width of the range of the contrast factor, 0 to 1."""
    saturation: float = 0.4
    """Half-width of the range of the saturation factor, 0 to 1."""
    hue: float = 0.1
    """Maximum hue shift in both directions, as a part of the colour wheel, 0 to 0.5."""
    jitter: float = 0.8
    """Probability of applying the four above, in random order."""
    grey: float = 0.2
    """Probability of converting to greyscale."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "jitter", "grey", "blur"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "0 to 0.5")
        require(0 < self.sigma[0] <= self.sigma[1] <= 16, "sigma", self.sigma, "0 < low <= high <= 16")

    def draw(self, bits: NDArray[np.uint64]) -> list[float]:
        """The ``NUMBERS`` of one view from 12 random integers; an order of -1 means no jitter, a sigma of 0 no blur."""
        uniform = (bits >> np.uint64(11)) * 2.0**-53
        order = np.argsort(bits[:4], kind="stable").tolist() if uniform[4] < self.jitter else [-1] * 4
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = [1 + strength * (2 * u - 1) for strength, u in zip(strengths, uniform[5:8].tolist(), strict=True)]
        low, high = self.sigma
        sigma = low + (high - low) * uniform[11] if uniform[10] < self.blur else 0.0
        return [*order, *factors, self.hue * (2 * uniform[8] - 1), float(uniform[9] < self.grey), sigma]


@dataclass(frozen=True, kw_only=True)
class ViewsReader:
    """Random crops of each image, one for every transform: uint8 [B, V, 3, H, W]."""

    transforms: tuple[ImageTransform, ...]
    seed: int = 0
    key: str = "views"
    fields = ("image",)

    def __post_init__(self) -> None:
        require(1 <= len(self.transforms) <= MOST_VIEWS, "transforms", len(self.transforms), f"1 to {MOST_VIEWS}")
        require(
            len({transform.size for transform in self.transforms}) == 1, "size", self.transforms, "one size for all"
        )

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """uint8 [V, 3, H, W]."""
        assert at is not None, "random views are for training"
        content = encoded_image(sample)
        bits = [
            random_bits(self.seed, RandomStream.VIEWS + v, *at, 1 + 4 * ATTEMPTS) for v in range(len(self.transforms))
        ]
        return {self.key: torch.stack(read_crops(content, list(zip(self.transforms, bits, strict=True))))}

    def collate(self, rows: list[Row]) -> Batch:
        """uint8 [B, V, 3, H, W]."""
        return {self.key: default_collate([row[self.key] for row in rows])}


@dataclass(frozen=True, kw_only=True)
class ColourReader:
    """The random parameters of each sample's views: float32 [B, V, NUMBERS]."""

    colours: Colours
    views: int
    seed: int = 0
    key: str = "colours"
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """[V, NUMBERS]; independent of the image."""
        assert at is not None, "random colours are for training"
        bits = (random_bits(self.seed, RandomStream.COLOURS + v, *at, 12) for v in range(self.views))
        return {self.key: [self.colours.draw(some) for some in bits]}

    def collate(self, rows: list[Row]) -> Batch:
        """float32 [B, V, NUMBERS]."""
        return {self.key: torch.tensor([row[self.key] for row in rows], dtype=torch.float32)}
