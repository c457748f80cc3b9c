"""The moment of a video that fits a query best: the cosine of each frame with it, by any model of images.

A video has the score of its best frame. Features of frames come from the sidecars of ``jobs/embed_dataset.py frames``
where they are of the same tar and model, at any rate; other videos are decoded and encoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SidecarError
from pipeline.evaluation.frame_embedder import FrameEmbedder
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.frame_features import FrameMaker, ShardFrames, StoredFrames, read_frame_features

MOMENTS = "moments"


@dataclass(frozen=True)
class Moment:
    """The best frame of a video: its time in seconds and its cosine; those of all frames, and the video's length."""

    seconds: float
    score: float
    times: NDArray[np.float32]
    scores: NDArray[np.float32]
    length: float


def best_moment(stored: StoredFrames, query: NDArray[np.float32]) -> Moment | None:
    """The first of the best frames for a query's unit features, float [D]; None for a video without frames."""
    if not len(stored.times):
        return None
    features = stored.features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    scores = (features / np.maximum(norms, 1e-12)) @ query.astype(np.float32)
    best = int(scores.argmax())
    return Moment(float(stored.times[best]), float(scores[best]), stored.times, scores, stored.seconds)


@dataclass(frozen=True)
class MomentFinder:
    """Finds features of frames: stored ones, or those of ``model``, decoded in ``threads`` threads."""

    model: FrameEmbedder
    sidecar: str
    batch_size: int = 64
    threads: int = 4

    def stored(self, folder: Folder, shard: Shard) -> ShardFrames:
        """The features of a shard; raises ``SidecarError`` if they are not there or of another model."""
        found = read_frame_features(folder, shard, self.sidecar)
        teacher = self.model.facts["teacher"]
        if found.facts.get("teacher") != teacher or len(found.keys) != shard.stored:
            raise SidecarError(f"{self.sidecar} of {shard.name} is of another model than {teacher[:12]}")
        return found

    def encoded(self, samples: list[Sample]) -> Iterator[StoredFrames]:
        """The features of these samples' videos."""
        made = FrameMaker(self.model, self.batch_size, self.threads).made(iter(samples))
        yield from (ShardFrames(made)[row] for row in range(len(samples)))
