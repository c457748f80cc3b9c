"""Raw features of several views of every image, as few-shot methods read them from a sidecar.

``jobs/embed_dataset.py views`` makes it: for each sample ``image``, float16 [V x D] and not normalised, view 0 as in
evaluation and the others random crops; NaN where there is no readable image. The sidecar knows its tar, the digest
of the model with all settings (``maker``), and says how many views it has and how they were cut.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, SidecarError
from pipeline.shards.selection import read_selection
from pipeline.shards.sidecar import FACTS, read_sidecar, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import JOB, matrix

NAME = "views"
MAKE = f"{JOB} views"
NO_IMAGE = (1, 1)  # the shape of a row in a shard without one readable image


@dataclass(frozen=True)
class ViewFeatures:
    """Raw features float16 [N, V, D] of N samples by key, and how they were made; NaN for unreadable images."""

    keys: tuple[str, ...]
    features: NDArray[np.float16]
    facts: dict[str, str | int]

    def of(self, keys: Iterable[str]) -> NDArray[np.float32]:
        """float32 [M, V, D] of these samples.

        Raises:
            DataError: a sample without features, or with some that are not finite; its key is named.
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
    """The features of all samples that ``snapshot`` shows, in its order.

    ``maker`` is that of the :class:`pipeline.evaluation.embedder.ViewEmbedder` which should have made them.

    Raises:
        SidecarError: missing, of another tar, of another model or other views, or no features of views.
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
    facts = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
    if "views" not in facts or not {"key", "image"} <= set(table.column_names):
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} holds no features of views; make it with {MAKE}")
    rows = matrix(table["image"])
    keys = [str(key) for key in table["key"].to_pylist()]
    shown = read_selection(folder, shard)
    order = np.arange(len(keys)) if shown is None else np.asarray(shown)
    shape = NO_IMAGE if rows.shape[1] == 1 else (int(facts["views"]), -1)
    features = rows.reshape(len(rows), *shape)[order]
    return ViewFeatures(tuple(keys[int(row)] for row in order), features, facts)
