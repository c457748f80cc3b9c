"""Several views of a video for evaluation: clips along its time, and crops along its longer side.

The usual protocol of action recognition: 10 clips and 3 crops of each video, whose scores are averaged (Wang et al.,
Non-local Neural Networks, arXiv 1711.07971, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.frames import ClipReader
from pipeline.loaders.images import ImageTransform, resize
from pipeline.shards.pixels import Pixels
from pipeline.shards.sample import Sample

MOST_CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class SideCrop(ImageTransform):
    """The evaluation transform with its crop at ``where`` along the longer side: 0 left or top, 1 right or bottom."""

    where: float = 0.5

    def __call__(self, pixels: Pixels, random_bits: object = None) -> Tensor:
        """uint8 [H, W, 3] to uint8 [3, height, width]."""
        shown = resize(pixels, self._fitted(pixels.shape[0], pixels.shape[1]), self.interpolation)
        top, left = (
            round(self.where * (length - side)) for length, side in zip(shown.shape[1:], self.size, strict=True)
        )
        return shown[:, top : top + self.size[0], left : left + self.size[1]].contiguous()


@dataclass(frozen=True, kw_only=True)
class ClipViewsReader:
    """``video``: uint8 [B, V, T, 3, H, W] of V views; ``video_mask``: bool [B, V, T], False where a clip ends."""

    views: tuple[ClipReader, ...]
    fields = ("video",)

    @property
    def key(self) -> str:
        """The key of all views."""
        return self.views[0].key

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``video``: V times uint8 [t, 3, H, W]; raises :class:`~pipeline.loaders.samples.UnreadableSample`."""
        return {self.key: [view.read(sample, at)[self.key] for view in self.views]}

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys."""
        parts = [
            view.collate([{self.key: row[self.key][number]} for row in rows]) for number, view in enumerate(self.views)
        ]
        return {name: torch.stack([part[name] for part in parts], dim=1) for name in parts[0]}


def clip_views(reader: ClipReader, clips: int = 1, crops: int = 1) -> tuple[ClipReader, ...]:
    """The readers of all views: ``clips`` at equal distances in time, times ``crops``, 1 or 3; ``reader`` for one view.

    Raises:
        SettingError: several clips of a choice of frames that has one, or crops of a transform that does not crop.
    """
    require(1 <= clips <= MOST_CLIPS, "clips", clips, f"1 to {MOST_CLIPS}")
    require(crops in (1, 3), "crops", crops, "1 or 3")
    mode = reader.sampling.mode
    require(clips == 1 or reader.sampling.random, "clips", clips, f"1 for a model that reads its frames by {mode}")
    places = [(number + 0.5) / clips for number in range(clips)]
    return tuple(
        replace(reader, transform=transform, place=place)
        for place in places
        for transform in _crops(reader.transform, crops)
    )


def _crops(transform: ImageTransform, crops: int) -> Sequence[ImageTransform]:
    if crops == 1:
        return [transform]
    cuts = transform.crop == "centre" and transform.fit == "shortest"
    require(cuts, "crops", crops, "1 for a model whose evaluation shows whole frames")
    settings = {field.name: getattr(transform, field.name) for field in fields(ImageTransform)}
    return [SideCrop(**settings, where=where) for where in (0.0, 0.5, 1.0)]
