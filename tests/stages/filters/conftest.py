"""Small data sets with chosen captions, images and columns."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shards.sample import Sample, sample_key
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter


def _photograph(number: int, width: int = 96, height: int = 64, quality: int = 90) -> bytes:
    """A smooth JPEG, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    encoded: bytes = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return encoded


class Dataset:
    """The ``make_data`` fixture; images and embeddings are at hand as well."""

    photograph = staticmethod(lambda *options: _photograph(*options))
    add_embeddings = staticmethod(lambda *options, **names: _add_embeddings(*options, **names))

    def __init__(self, place: Path) -> None:
        self._place = place

    def __call__(
        self,
        captions: Sequence[str],
        images: Sequence[bytes] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        per_shard: int = 3,
        table: bool = True,
        place: Path | None = None,
    ) -> Snapshot:
        folder, shards = place or self._place, []
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"caption": caption, **{name: values[row] for name, values in (columns or {}).items()}}
            for row, caption in enumerate(captions)
        ]
        images = images or [_photograph(row) for row in range(len(captions))]
        for number, start in enumerate(range(0, len(rows), per_shard)):
            some = slice(start, start + per_shard)
            shards.append(_shard(folder, number, rows[some], images[some], table))
        return publish_shards(
            Folder(folder),
            tuple(shards),
            fields=("jpg", "json", "txt"),
            card=None,
            options={},
            rows=99,
            dropped={"dns": 2},
        )


def _shard(folder: Path, number: int, rows: list[dict[str, Any]], images: Sequence[bytes], table: bool) -> Shard:
    path, listed = folder / f"{number:05d}.tar", []
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            key = sample_key(number, index, 100)
            fields = {"jpg": image, "txt": row["caption"].encode(), "json": json.dumps(row).encode()}
            writer.write(Sample(key, fields))
            # Rows that failed to download stand in the parquet between the good ones.
            listed += [{"key": f"x{index}", "status": "failed_to_download"}, {**row, "key": key, "status": "success"}]
        writer.close()
    if table:
        names = {name for row in listed for name in row}
        full = [{name: row.get(name) for name in sorted(names)} for row in listed]
        pq.write_table(pa.Table.from_pylist(full), path.with_suffix(".parquet"))
    return Shard(name=path.stem, samples=len(rows), bytes=path.stat().st_size, sha256=file_digest(path))


def add_embeddings(
    snapshot: Snapshot, image: np.ndarray, text: np.ndarray | None = None, skip: set[int] = frozenset()
) -> None:
    """Write the sidecar ``embeddings`` from L2-normalised rows [samples, D], but for the rows in ``skip``."""
    start = 0
    for number, shard in enumerate(snapshot.shards):
        rows = [row for row in range(start, start + shard.stored) if row not in skip]
        keys = [sample_key(number, row - start, 100) for row in rows]
        columns: dict[str, Any] = {"key": pa.array(keys)}
        for name, values in (("image", image), ("text", text)):
            if values is not None:
                flat = pa.array(values[rows].astype(np.float16).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        write_sidecar(Folder(snapshot.folder), shard, "embeddings", pa.table(columns), maker="test")
        start += shard.stored


@pytest.fixture
def make_data(tmp_path: Path) -> Dataset:
    """``make_data(captions, images=…, columns=…, per_shard=3, table=True)`` publishes a snapshot."""

    return Dataset(tmp_path / "data")


def _add_embeddings(
    snapshot: Snapshot, image: Any = None, text: Any = None, skip: Collection[int] = (), audio: Any = None
) -> None:
    """Write the sidecar ``embeddings`` from rows [samples, D], but for the numbers in ``skip``."""
    start = 0
    for number, shard in enumerate(snapshot.shards):
        rows = [row for row in range(start, start + shard.stored) if row not in skip]
        columns: dict[str, Any] = {"key": pa.array([sample_key(number, row - start, 100) for row in rows], pa.string())}
        for name, values in (("image", image), ("audio", audio), ("text", text)):
            if values is not None:
                flat = pa.array(values[rows].astype(np.float16).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        write_sidecar(Folder(snapshot.folder), shard, "embeddings", pa.table(columns), maker="test")
        start += shard.stored
