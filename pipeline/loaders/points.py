"""Point clouds of samples: a fixed number of points, centred and scaled to the unit ball."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.codecs.point_views import centred
from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.order import RandomStream
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.clouds import MOST_POINTS, check_extent, cloud_points, random_of, subset
from pipeline.shards.media import POINTS
from pipeline.shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class PointTransform:
    """Converts a cloud to points float32 [N, 3] with y up."""

    count: int = 0
    """Most points, 2 to 4,000,000; of a larger cloud a random subset: in training another one in each epoch, in
    evaluation always the same. 0 keeps all points."""
    scale: Literal["unit", "none"] = "unit"
    """unit: centre on the mean and scale to the unit ball, so that units do not matter; none: as in the file."""
    up: Literal["y", "z"] = "y"
    """The vertical axis of the file; z becomes y, by a rotation."""

    def __post_init__(self) -> None:
        fits = self.count == 0 or 2 <= self.count <= MOST_POINTS
        require(fits, "count", self.count, f"0, or 2 to {MOST_POINTS:,}")

    def read(self, content: bytes, bits: np.random.Philox | None = None) -> Tensor:
        """float32 [N, 3]; ``bits`` choose a subset in training.

        Raises:
            UnreadableSample: not a cloud, a broken one, or one without an extent, also of its subset.
        """
        own = random_of(content)  # for the points on a mesh and then the subset: new ones would be the same bits
        try:
            points = cloud_points(content, bits=own)
            few = subset(points, self.count or len(points), bits or own)
            if len(few) < len(points):
                check_extent(few)
        except SampleError as error:
            raise UnreadableSample(error.message) from error
        found = torch.from_numpy(np.array(few, np.float32))
        if self.up == "z":
            found = torch.stack([found[:, 0], found[:, 2], -found[:, 1]], dim=1)
        return centred(found[None])[0] if self.scale == "unit" else found


@dataclass(frozen=True, kw_only=True)
class PointReader:
    """``points``: float32 [B, N, 3], N that of the largest cloud; ``points_mask``: bool [B, N], False for padding.

    Random subsets are a pure function of (seed, epoch, sample).
    """

    transform: PointTransform = PointTransform()
    seed: int = 0
    key: str = "points"
    fields = ("points",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """float32 [N, 3]; raises :class:`UnreadableSample`."""
        content = sample.body(POINTS)
        if content is None:
            raise UnreadableSample(f"{sample.key} has no point cloud")
        bits = None
        if at is not None and self.transform.count:
            bits = np.random.Philox(key=[self.seed, int(RandomStream.POINTS)], counter=[0, 0, *at])
        return {self.key: self.transform.read(content, bits)}

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys."""
        clouds = [row[self.key] for row in rows]
        lengths = torch.tensor([len(cloud) for cloud in clouds])
        padded = pad_sequence(clouds, batch_first=True)
        return {self.key: padded, f"{self.key}_mask": torch.arange(padded.shape[1]) < lengths[:, None]}
