"""Features of the cells of every image as a sidecar, for methods that read an image as a grid of features.

``00017.grid.parquet`` has one row per sample of the tar: ``key``, ``rows``, ``columns`` and ``features``, float16
[rows, columns, D] as bytes in C order. Cells that show nothing but padding are left out. An unreadable image has no
rows. The metadata hold ``teacher`` (the digest of the tower and of its input), ``width`` D, and the input: ``size``
(height and width) and ``stride`` (side of a cell), both in pixels.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.shards.media import IMAGE
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.stages.annotate.annotator import Annotation, annotate, decoded_batches
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.shard_tasks import Workers

JOB = "jobs/embed_dataset.py grid"
NAME = "grid"
COLUMNS: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "rows": pa.int32(),
    "columns": pa.int32(),
    "features": pa.binary(),
}
SCHEMA = pa.schema(COLUMNS)


class PreparedImage(NamedTuple):
    """An image as the tower reads it, and rows and columns of its cells."""

    pixels: Any
    cells: tuple[int, int]


class GridModel(Protocol):
    """Interface of the tower; ``maker`` is the digest of its weights and of its input."""

    maker: str
    facts: Mapping[str, Any]
    """Metadata for readers: ``teacher``, ``width``, ``size`` and ``stride``."""

    def prepare(self, image: bytes) -> PreparedImage | None:
        """The image for the tower; ``None`` if unreadable. Called from many threads."""
        ...

    def encode(self, images: Sequence[Any]) -> NDArray[np.float16]:
        """Features [N, H, W, D] of N prepared images; infinite where half precision is exceeded."""
        ...


class MakeGridModel(Protocol):
    """Picklable function that loads the tower in its worker process, for a number of CPU threads."""

    def __call__(self, threads: int) -> GridModel: ...


def embed_grids(
    snapshot: Snapshot, make: MakeGridModel, options: EmbedOptions, workers: Workers, use_gpu: bool | None = None
) -> Snapshot:
    """Make the grids of every shard and publish them; finished shards are not read again.

    ``use_gpu`` ``None`` = if the cluster has GPUs.

    Raises:
        SettingError: the snapshot has no images.
        SidecarError: the sidecar has grids of another tower or of another size.
        DataError: a damaged shard.
        StorageError: the store failed (run the same command to continue), or another job holds the folder's lease.
    """
    has = ", ".join(snapshot.fields) or "none"
    require(IMAGE.field_of(dict.fromkeys(snapshot.fields)) is not None, "data", has, "samples with images")
    annotation = Annotation(name=options.name, overwrite=options.overwrite)
    return annotate(snapshot, LoadGridMaker(make, options.batch_size), annotation, workers, use_gpu)


def stored_grid(row: Mapping[str, Any], key: str) -> NDArray[np.float16]:
    """Float16 [rows, columns, D] of a row of the sidecar; empty for an unreadable image.

    Raises:
        SidecarError: the bytes are not those of so many cells.
    """
    features, cells = np.frombuffer(row["features"], np.float16), row["rows"] * row["columns"]
    if cells <= 0 or len(features) % cells or not len(features):
        if cells or len(features):
            raise SidecarError(f"sample {key} has {len(features)} numbers in {cells} cells; make them again with {JOB}")
        return features.reshape(0, 0, 0)
    return features.reshape(row["rows"], row["columns"], -1)


@dataclass(frozen=True)
class LoadGridMaker:
    """Load the annotator of grids."""

    make: MakeGridModel
    batch_size: int

    def __call__(self, threads: int) -> "GridMaker":
        return GridMaker(self.make(threads), self.batch_size, threads)


class GridMaker:
    """Makes the table of a shard's samples; decodes ahead in ``threads`` threads."""

    def __init__(self, model: GridModel, batch_size: int, threads: int) -> None:
        self._model, self._batch_size, self._threads = model, batch_size, threads
        self.maker = model.maker

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """The sidecar's rows, one chunk per batch; raises ``DataError`` for features half precision cannot hold."""
        parts = [SCHEMA.empty_table()]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="prepare") as pool:
            for batch in decoded_batches(samples, self._batch_size, pool, self._model.prepare):
                parts.append(pa.Table.from_pylist(self._rows(batch), schema=SCHEMA))
        # Keep the chunks separate: all grids of a shard may exceed the limit of 2 GB per chunk.
        facts = {FACTS: json.dumps(dict(self._model.facts)).encode()}
        return pa.concat_tables(parts).replace_schema_metadata(facts)

    def _rows(self, batch: Sequence[tuple[Sample, PreparedImage | None]]) -> list[dict[str, Any]]:
        readable = [(sample.key, image) for sample, image in batch if image is not None]
        grids: Iterable[NDArray[np.float16]] = []
        if readable:
            grids = self._model.encode([image.pixels for _, image in readable])
        made = {key: _row(key, image.cells, grid) for (key, image), grid in zip(readable, grids, strict=True)}
        empty = {"rows": 0, "columns": 0, "features": b""}
        return [made.get(sample.key) or {"key": sample.key, **empty} for sample, _ in batch]


def _row(key: str, cells: tuple[int, int], grid: NDArray[np.float16]) -> dict[str, Any]:
    halves = np.ascontiguousarray(grid[: cells[0], : cells[1]])
    # Bits of the exponent, all of which are set in infinity and NaN; numpy's isfinite takes eight times as long.
    if (halves.view(np.uint16) & 0x7C00 == 0x7C00).any():
        raise DataError(f"sample {key}: the model gives features that are not finite, or too large for half precision")
    return {"key": key, "rows": cells[0], "columns": cells[1], "features": halves.tobytes()}
