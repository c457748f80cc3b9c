"""Several random crops of one image, and the random numbers with which the training device changes their colours.

An image is decoded once. What is random is a pure function of (seed, epoch, sample number, view), as a single crop
is: a resumed run, or one with more workers, sees the same images. The loader cuts and resizes; colours and blur are
changed in batches on the training device (``pipeline.models.towers.colours``), so only uint8 and a few numbers travel.
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
"""Places in a row of :class:`ColourReader`."""


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Strengths and probabilities of random colours, with SimCLR's values as SLIP has them (section 4.1)."""

    brightness: float = 0.4
    """Factors are drawn from 1 less this to 1 plus this; for contrast and saturation too."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Turns of the colour wheel, up to 0.5, in both directions."""
    jitter: float = 0.8
    """Probability of the four above, in random order."""
    grey: float = 0.2
    """Probability of a grey image."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Its standard deviation, in pixels."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "jitter", "grey", "blur"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require(0 <= self.hue <= 0.5, "hue", self.hue, "0 to 0.5")
        require(0 < self.sigma[0] <= self.sigma[1] <= 16, "sigma", self.sigma, "0 < low <= high <= 16")

    def draw(self, bits: NDArray[np.uint64]) -> list[float]:
        """The ``NUMBERS`` of one view from 12 random integers; an order of -1 is no jitter, a sigma of 0 no blur."""
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
    """The random numbers of each sample's views: float32 [B, V, NUMBERS]."""

    colours: Colours
    views: int
    seed: int = 0
    key: str = "colours"
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """[V, NUMBERS]; the image does not matter."""
        assert at is not None, "random colours are for training"
        bits = (random_bits(self.seed, RandomStream.COLOURS + v, *at, 12) for v in range(self.views))
        return {self.key: [self.colours.draw(some) for some in bits]}

    def collate(self, rows: list[Row]) -> Batch:
        """float32 [B, V, NUMBERS]."""
        return {self.key: torch.tensor([row[self.key] for row in rows], dtype=torch.float32)}
