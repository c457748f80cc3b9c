"""Retrieval-augmented batches: clusters of similar videos, whose clips are hard negatives of one another.

Xu et al., 2021, VideoCLIP, arXiv 2109.14084, section 3.4 and its algorithm 1, with the details of the authors' code: at
the start of an epoch every video is the mean of (video + text) / 2 over its clips' pairs. As many random videos as the
epoch has clusters are queries. The candidates of a query are itself and its nearest videos by Euclidean distance; a
random part of them, from which the query may be missing, is read together. So a video may be in several batches of an
epoch, or in none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.loaders.order import RandomStream, permutation

TILE = 4096  # queries and videos of which distances exist at a time


@dataclass(frozen=True, kw_only=True)
class RetrievedClusters:
    """The planner of the batches; a :class:`~pipeline.models.method.BatchPlanner`."""

    size: int = 32
    """Videos of a cluster."""
    candidates: int = 64
    """Nearest videos from which they are sampled, the query included."""

    def __post_init__(self) -> None:
        require(self.size >= 1, "cluster", self.size, "1 or more")
        require(self.candidates >= self.size, "candidates", self.candidates, f"cluster, {self.size}, or more")

    def check(self, samples: int, batch_size: int) -> None:
        """Raise ``SettingError`` where batches of this size cannot be made of the clusters of so many samples."""
        require(batch_size % self.size == 0, "batch_size", batch_size, f"a multiple of cluster, {self.size}")
        require(self.size <= samples, "cluster", self.size, f"at most {samples}, the number of samples of the data")

    def features(self, method: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Float32 [B, H]: the mean over the pairs of each video of a batch."""
        found = method.embed(batch)
        mean: Tensor = ((found["video"].float() + found["text"].float()) / 2).mean(dim=1)
        return mean

    def plan(self, features: Tensor, steps: int, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Sample numbers int64 [steps, batch_size], by the ``features`` float32 [N, H] of all samples.

        A pure function of its arguments. Each row has ``batch_size / size`` clusters, one after another.
        """
        clusters = steps * batch_size // self.size
        rounds = -(-clusters // len(features))  # more than one where a batch is larger than the data
        shuffled = [permutation(seed, RandomStream.RETRIEVED, epoch, part, len(features)) for part in range(rounds)]
        queries = np.concatenate(shuffled)[:clusters]
        found = nearest(features, torch.from_numpy(queries), min(self.candidates, len(features))).numpy()
        chosen = np.empty((clusters, self.size), np.int64)
        for number, row in enumerate(found):
            # Other numbers than those of the queries: these are below 2**40.
            order = permutation(seed, RandomStream.RETRIEVED, epoch, (1 << 40) + number, len(row))
            chosen[number] = row[order[: self.size]]
        return chosen.reshape(steps, batch_size)


def nearest(features: Tensor, queries: Tensor, count: int, tile: int = TILE) -> Tensor:
    """The ``count`` nearest rows of ``features`` float [N, H] to its rows ``queries`` int64 [Q]: int64 [Q, count].

    By Euclidean distance, the query itself first. Exact, and in tiles: memory O(tile^2 + Q count), time O(Q N H).
    """
    features = features - features.mean(dim=0)  # the distances stay the same, with less to cancel below
    lengths, numbers = features.square().sum(dim=1), torch.arange(len(features), device=features.device)
    rows = []
    for some in queries.to(features.device).split(tile):
        best, found = features.new_empty(len(some), 0), numbers.new_empty(len(some), 0)
        for part, those in zip(features.split(tile), numbers.split(tile), strict=True):
            # The square of the distance less |query|^2, which is the same for all.
            distances = lengths[those] - 2 * features[some] @ part.T
            distances.masked_fill_(some[:, None] == those, -torch.inf)
            best = torch.cat([best, distances], dim=1)
            best, kept = best.topk(min(count, best.shape[1]), largest=False)
            found = torch.cat([found, those.expand(len(some), -1)], dim=1).gather(1, kept)
        rows.append(found.cpu())
    return torch.cat(rows)
