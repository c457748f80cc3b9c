"""Depth maps beside images, and their reader."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.images import as_stored, decode, encoded_image, resize
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.shards.depth_values import DEPTH_FIELD, decode_depth, depth_size
from pipeline.shards.sample import Sample

Box = tuple[int, int, int, int]


def read_depth(sample: Sample, height: int, width: int) -> NDArray[np.float32]:
    """The depth map of a sample whose image has ``height`` x ``width`` pixels: metres, 0 where it has none.

    Raises:
        UnreadableSample: no depth map, no grey PNG of 16 bits, or one of another size.
    """
    content = sample.fields.get(DEPTH_FIELD)
    if content is None:
        raise UnreadableSample(f"sample {sample.key} has no {DEPTH_FIELD}")
    try:
        rows, columns = depth_size(content)
        if (rows, columns) != (height, width):
            sizes = f"{columns} x {rows} pixels, its image {width} x {height}"
            raise UnreadableSample(f"{DEPTH_FIELD} of sample {sample.key} has {sizes}")
        return decode_depth(content)
    except DataError as error:
        raise UnreadableSample(f"{DEPTH_FIELD} of sample {sample.key}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DepthRange:
    """The distances that are measured: more than ``nearest``, less than ``farthest``, both in metres."""

    nearest: float = 1e-3
    farthest: float = 10.0

    def __post_init__(self) -> None:
        known = 0 < self.nearest < self.farthest
        require(known, "depth_range", (self.nearest, self.farthest), "0 < nearest < farthest, in metres")

    def valid(self, depth: Tensor) -> Tensor:
        """Bool, of the shape of ``depth``: False for missing pixels, NaN, and distances beyond the range."""
        return (depth > self.nearest) & (depth < self.farthest)


@dataclass(frozen=True, kw_only=True)
class DepthReader:
    """Images and their depth maps.

    image   uint8 [B, 3, H, W]
    depth   float32 [B, H, W], metres
    valid   bool [B, H, W], where ``depth`` is in ``depth_range``
    scene   int64 [B], position of the sample's scene class in ``scenes``, -1 for none of them

    Both are cut to ``crop`` (top, bottom, left, right), squashed to ``size`` (height, width) and, in training, mirrored
    at random; of depth the nearest pixel is taken. Without a ``size`` a batch has lists of both as they are stored, for
    evaluation. A sample without a valid pixel is unreadable.
    """

    size: tuple[int, int] | None
    depth_range: DepthRange = DepthRange()
    crop: Box | None = None
    flip: float = 0.0
    scenes: tuple[str, ...] = ()
    scene_key: str = "scene"
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    @property
    def fields(self) -> Sequence[str]:
        """Image and depth map, and the json where the scene's class is read."""
        return ("image", DEPTH_FIELD, *(["json"] if self.scenes else []))

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """One image, uint8 [3, H, W], with its depth; raises as :func:`read_depth`."""
        pixels = decode(encoded_image(sample))
        depth = read_depth(sample, pixels.shape[0], pixels.shape[1])
        if self.crop is not None:
            pixels, depth = cropped(pixels, self.crop, sample.key), cropped(depth, self.crop, sample.key)
        if self.size is None:
            image, metres = as_stored(pixels), torch.from_numpy(np.ascontiguousarray(depth))
        else:
            image, metres = resize(pixels, self.size, "bilinear"), torch.from_numpy(nearest(depth, self.size))
        if at is not None and self._mirrors(at):
            image, metres = image.flip(-1), metres.flip(-1)
        valid = self.select(self.depth_range.valid(metres), sample.key)
        if not valid.any():
            low, high = self.depth_range.nearest, self.depth_range.farthest
            raise UnreadableSample(f"{DEPTH_FIELD} of sample {sample.key} has no pixel of {low} to {high} m")
        return {"image": image, "depth": metres, "valid": valid, "scene": self._scene(sample)}

    def select(self, valid: Tensor, key: str) -> Tensor:
        """The pixels, bool [H, W], that are counted of the valid ones of sample ``key``: all."""
        return valid

    def _mirrors(self, at: SamplePosition) -> bool:
        bits = random_bits(self.seed, RandomStream.CROPS, *at, 1)
        return bool((bits[0] >> np.uint64(11)) * 2.0**-53 < self.flip)

    def _scene(self, sample: Sample) -> int:
        name = str(json_of_sample(sample).get(self.scene_key)) if self.scenes else ""
        return self.scenes.index(name) if name in self.scenes else -1

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The tensors named above."""
        together: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
        if self.size is None:
            return {**together, "scene": torch.tensor(together["scene"])}
        return {key: default_collate(some) for key, some in together.items()}


def cropped(pixels: NDArray[Any], box: Box, key: str) -> NDArray[Any]:
    """The part of ``pixels`` [H, W, ...] in the box (top, bottom, left, right).

    Raises:
        UnreadableSample: the box is not inside.
    """
    top, bottom, left, right = box
    if bottom > pixels.shape[0] or right > pixels.shape[1]:
        size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
        raise UnreadableSample(f"sample {key} has {size}, less than the crop to row {bottom} and column {right}")
    return pixels[top:bottom, left:right]


def nearest(depth: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The distances [H, W] of the nearest pixels of another size (height, width)."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * stored / wanted).astype(np.int64).clip(0, stored - 1)
        for wanted, stored in zip(size, depth.shape, strict=True)
    )
    found: NDArray[np.float32] = depth[rows[:, None], columns]
    return found
