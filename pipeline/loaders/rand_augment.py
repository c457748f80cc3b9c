"""Random crops with RandAugment and random erasing, the augmentation of DeiT, by timm's own operations.

Cubuk et al. 2019, arXiv 1909.13719, and Zhong et al. 2017, arXiv 1708.04896. timm draws from the global generators of
Python, NumPy and torch. These are seeded for each image by (seed, epoch, sample) and restored, so an image does not
depend on the process that reads it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import ImageTransform, crop_bits, encoded_image
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.shards.sample import Sample

Numbers = tuple[float, float, float]
TRANSLATION = 0.45
"""Largest translation, as a part of the image's side: DeiT's."""


def check_policy(policy: str) -> None:
    """Raise ``SettingError`` unless timm reads ``policy`` as one of RandAugment."""
    fits = policy.partition("-")[0] == "rand"
    try:
        fits = fits and rand_augment_transform(policy, {}) is not None
    except (AssertionError, ValueError, KeyError):
        fits = False
    require(fits, "augment", policy, "timm's notation of RandAugment, such as rand-m9-mstd0.5-inc1, or empty")


@dataclass(frozen=True, kw_only=True)
class RandomChange:
    """RandAugment by ``policy``, then erasing with probability ``erase``; an empty policy changes nothing.

    ``mean`` and ``std`` are those of the model, of images from 0 to 1. Areas that an operation or the erasing uncovers
    get the mean, or noise with this mean and deviation.
    """

    policy: str
    erase: float
    mean: Numbers
    std: Numbers

    def __call__(self, crop: Tensor, seed: int) -> Tensor:
        """uint8 [3, H, W] to the same; images of one size with one seed are changed alike."""
        with _seeded(seed):
            return self._erased(self._changed(crop))

    def _changed(self, crop: Tensor) -> Tensor:
        if not self.policy:
            return crop
        changed = self._operations(min(crop.shape[1:]))(Image.fromarray(crop.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()

    def _erased(self, crop: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        erased: Tensor = self._erasing((crop.float() - mean) / std)
        return (erased * std + mean).round().clamp(0, 255).to(torch.uint8)

    def _operations(self, side: int) -> Any:
        filled = tuple(round(255 * value) for value in self.mean)
        return _operations(self.policy, int(side * TRANSLATION), filled)

    @cached_property
    def _erasing(self) -> Any:
        return RandomErasing(self.erase, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class AugmentedImageReader:
    """Augmented crops as uint8 [B, 3, H, W]: a crop, then the ``change``."""

    transform: ImageTransform
    change: RandomChange
    seed: int = 0
    key: str = "image"
    fields = ("image",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """uint8 [3, H, W]; raises :class:`UnreadableSample`."""
        assert at is not None, "random augmentation is for training"
        crop = self.transform.read(encoded_image(sample), crop_bits(self.seed, *at))
        return {self.key: self.change(crop, int(random_bits(self.seed, RandomStream.AUGMENTATION, *at, 1)[0]))}

    def collate(self, rows: list[Row]) -> Batch:
        """uint8 [B, 3, H, W]."""
        return {self.key: default_collate([row[self.key] for row in rows])}


@cache
def _operations(policy: str, translation: int, filled: tuple[int, ...]) -> Any:
    return rand_augment_transform(policy, {"translate_const": translation, "img_mean": filled})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and restore them at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
