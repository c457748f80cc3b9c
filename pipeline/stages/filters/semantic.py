"""Semantic duplicates: SemDeDup (Abbas et al., 2023, arXiv 2303.09540).

Image embeddings are clustered by k-means. Within each cluster, a sample is dropped if its cosine with an earlier one is
above 1 - epsilon. As in the paper's algorithm, a cluster's samples are first sorted by their distance from the
centroid, the farthest first, and compared with all samples before them, dropped or not. So of a group of two, the one
less typical of its cluster is kept. (Ties: the first in the snapshot's order is kept.)

The paper makes 50,000 clusters of LAION-440M, one per 8,800 samples, which is the default here. It tunes epsilon to the
fraction to keep, so the default is only a start. Centroids are fitted on at most ``kmeans_samples`` embeddings. Rows
are exchanged between shards and clusters through files with a copy of the embeddings (float16), until the end of the
run.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.stages.filters.duplicates import Positions, duplicates_table, gather, in_duplicates, parts_of
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import Floats, ShardView

PAPER_CLUSTER = 8_800
PART_ROWS = 500_000
BLOCK = 1_024


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates(Filter):
    """Drop images with nearly the same content as another one: ``semantic_duplicate``; ``no_embedding`` without one."""

    name: ClassVar[str] = "semantic_duplicates"
    rank: ClassVar[int] = 7
    scratch: ClassVar[tuple[str, ...]] = ("assigned",)
    epsilon: float = 0.05
    clusters: int | None = None
    """Number of k-means clusters; None = one per 8,800 samples."""
    kmeans_samples: int = 500_000
    kmeans_seed: int = 0

    def check(self) -> None:
        """Require a valid cosine distance and at least one cluster."""
        require(0 <= self.epsilon < 2, "epsilon", self.epsilon, "0 or more, below 2")
        require(self.clusters is None or self.clusters >= 1, "clusters", self.clusters, "1 or more, or none")
        require(self.kmeans_samples >= 1, "kmeans_samples", self.kmeans_samples, "1 or more")

    def prepare(self, step: Step) -> None:
        """Make tables of centroids, then clusters by shard, then duplicates by cluster."""
        step.each_part("centroids", 1, self._centroids)
        step.each_shard("assigned", _Assign(step))
        step.each_part("duplicates", parts_of(step, PART_ROWS), self._duplicates)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the tables of duplicates."""
        missing = ~view.embeddings(text=False).present
        return Verdict({"no_embedding": missing, "semantic_duplicate": self._dropped(view, step)})

    def _dropped(self, view: ShardView, step: Step) -> NDArray[np.bool_]:
        return in_duplicates(view, step, parts_of(step, PART_ROWS))

    def _centroids(self, step: Step, number: int) -> pa.Table:
        from sklearn.cluster import MiniBatchKMeans

        total = sum(shard.samples for shard in step.shards)
        every = max(1, -(-total // self.kmeans_samples))
        sampled = [_some(step.view(shard), every) for shard in range(len(step.shards))]
        rows = np.concatenate([rows for rows in sampled if len(rows)] or [np.zeros((0, 1), np.float32)])
        if not len(rows):
            raise DataError("no sample has an embedding; make them with jobs/embed_dataset.py")
        count = min(self.clusters or max(1, round(total / PAPER_CLUSTER)), len(rows))
        batch = max(1024, min(10 * count, len(rows)))
        means = MiniBatchKMeans(count, batch_size=batch, n_init=3, random_state=self.kmeans_seed).fit(rows)
        return pa.table({"centroid": list(_normalised(means.cluster_centers_.astype(np.float32)))})

    def _duplicates(self, step: Step, part: int) -> pa.Table:
        clusters = step.read("centroids", 0).num_rows
        parts = parts_of(step, PART_ROWS)
        table = gather(step, "assigned", (part * clusters // parts, (part + 1) * clusters // parts))
        cluster, position = table["bin"].to_numpy(), table["position"].to_numpy()
        typical, vectors = table["typical"].to_numpy(), _matrix(table["image"])
        order = np.lexsort((position, typical, cluster))
        edges = np.flatnonzero(np.diff(cluster[order], prepend=-1, append=-1))
        dropped, kept = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            rows = order[start:end]
            closest, cosine = closest_before(vectors[rows].astype(np.float32))
            drop = cosine > 1 - self.epsilon
            dropped.append(position[rows[drop]])
            kept.append(position[rows[closest[drop]]])
        return duplicates_table(np.concatenate(dropped), np.concatenate(kept))


def closest_before(vectors: Floats) -> tuple[Positions, Floats]:
    """For each of n unit rows, the closest earlier row and its cosine (-inf for the first); in blocks, float32."""
    count = len(vectors)
    closest, cosine = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)
    for start in range(0, count, BLOCK):
        block = vectors[start : start + BLOCK]
        for before in range(0, start + len(block), BLOCK):
            cosines = vectors[before : before + BLOCK] @ block.T
            if before == start:
                cosines[np.tril_indices(len(block))] = -np.inf
            best = cosines.argmax(axis=0)
            found = cosines[best, np.arange(len(block))]
            better = np.flatnonzero(found > cosine[start : start + len(block)])
            closest[start + better], cosine[start + better] = before + best[better], found[better]
    return closest, cosine


class _Assign:
    """The table of a shard: each sample's cluster, its cosine with the centroid, and its embedding."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, view: ShardView) -> pa.Table:
        centroids = _matrix(self._step.read("centroids", 0)["centroid"])
        found = view.embeddings(text=False)
        vectors, positions = found.features[found.present], view.positions[found.present]
        cluster, typical = np.zeros(len(vectors), np.int32), np.zeros(len(vectors), np.float32)
        for start in range(0, len(vectors), BLOCK):
            cosines = vectors[start : start + BLOCK] @ centroids.T
            cluster[start : start + BLOCK] = cosines.argmax(axis=1)
            typical[start : start + BLOCK] = cosines.max(axis=1)
        order = np.argsort(cluster, kind="stable")
        image = _lists(vectors[order].astype(np.float16), centroids.shape[1])
        columns = {"bin": cluster[order], "typical": typical[order], "index": positions[order].astype(np.int32)}
        return pa.table({**columns, "image": image})


def _some(view: ShardView, every: int) -> Floats:
    """A strided subsample of a shard's embeddings."""
    found = view.embeddings(text=False)
    return found.features[found.present][::every]


def _lists(vectors: NDArray[np.float16], dimension: int) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension)


def _matrix(column: Any) -> NDArray[np.floating]:
    """Lists of equal length as an array [n, D]."""
    flat: NDArray[np.floating] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1) if len(column) else np.zeros((0, 1), np.float32)


def _normalised(rows: Floats) -> Floats:
    normalised: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return normalised
