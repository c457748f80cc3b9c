"""Raw features of several views of every image, from a sidecar, for few-shot methods.

``jobs/embed_dataset.py views`` makes it: ``image`` of each sample is float16 [V x D], not normalised; view 0 is the
evaluation transform, the others are random crops; NaN for an unreadable image. The metadata of the sidecar holds its
tar, the digest of the model with all settings (``maker``), the number of views and the crop settings. Of point clouds
the column is ``points``, and the views are the cameras of a projection.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, SidecarError
from pipeline.shards.media import MEDIA
from pipeline.shards.selection import read_selection
from pipeline.shards.sidecar import read_sidecar, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import JOB, matrix

NAME = "views"
MAKE = f"{JOB} views"
NO_IMAGE = (1, 1)  # the shape of a row in a shard without a readable image


@dataclass(frozen=True)
class ViewFeatures:
    """Raw features float16 [N, V, D] of N samples by key, with their metadata; NaN for unreadable images."""

    keys: tuple[str, ...]
    features: NDArray[np.float16]
    facts: dict[str, str | int]

    def of(self, keys: Iterable[str]) -> NDArray[np.float32]:
        """float32 [M, V, D] of these samples.

        Raises:
            DataError: a sample without features, or with features that are not finite; the message names its key.
        """
        rows = {key: row for row, key in enumerate(self.keys)}
        wanted = list(keys)
        unknown = next((key for key in wanted if key not in rows), None)
        if unknown is not None:
            raise DataError(f"sample {unknown} has no features among {len(rows)}; make them with {MAKE}")
        found = self.features[[rows[key] for key in wanted]].astype(np.float32)
        broken = ~np.isfinite(found).all(axis=(1, 2))
        if broken.any():
            key = wanted[int(broken.argmax())]
            raise DataError(
                f"the features of sample {key} are not finite: its image cannot be read, or they are broken"
            )
        return found


def read_views(snapshot: Snapshot, maker: str | None = None, name: str = NAME) -> ViewFeatures:
    """The features of all visible samples of ``snapshot``, in order.

    ``maker`` is the expected digest, of a :class:`pipeline.evaluation.embedder.ViewEmbedder`.

    Raises:
        SidecarError: missing, of another tar, of another model or other views, or without features of views.
    """
    folder = Folder(snapshot.folder)
    parts = [_read_shard(folder, shard, maker, name) for shard in snapshot.shards]
    shapes = {part.features.shape[1:] for part in parts} - {NO_IMAGE}
    if len(shapes) > 1:
        raise SidecarError(f"{snapshot.uri}: shards with features of several shapes, {shapes}; make them with {MAKE}")
    shape = min(shapes, default=NO_IMAGE)
    features = [np.broadcast_to(part.features, (len(part.keys), *shape)) for part in parts]
    keys = tuple(key for part in parts for key in part.keys)
    return ViewFeatures(keys, np.concatenate(features), parts[0].facts)


def _read_shard(folder: Folder, shard: Shard, maker: str | None, name: str) -> ViewFeatures:
    table = read_sidecar(folder, shard, name, MAKE, maker)
    file = folder.join(sidecar_file(shard, name))
    facts = sidecar_facts(table.schema, file, MAKE)
    medium = next((name for name in MEDIA if name in table.column_names), "")
    if not isinstance(facts.get("views"), int) or facts["views"] < 0 or not {"key", medium} <= set(table.column_names):
        raise SidecarError(f"{file} holds no features of views; make it with {MAKE}")
    rows = matrix(table[medium])
    keys = [str(key) for key in table["key"].to_pylist()]
    shown = read_selection(folder, shard)
    order = np.arange(len(keys)) if shown is None else np.asarray(shown)
    views = 1 if rows.shape[1] == 1 else facts["views"]
    if not views or rows.shape[1] % views or len(keys) != shard.stored:
        raise SidecarError(f"{file} does not hold {views} views of {shard.stored} samples; make it with {MAKE}")
    features = rows.reshape(len(rows), views, -1)[order]
    return ViewFeatures(tuple(keys[int(row)] for row in order), features, facts)
