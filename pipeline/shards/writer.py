"""Write one shard as a unit: tar, parquet, and ``_stats.json`` last, as the mark that both are complete.

The layout is img2dataset's, so tools that read its output read ours. Rows keep the order of the input. Tar and parquet
do not depend on time or machine: the same input gives the same bytes.
"""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import SnapshotError
from pipeline.shards.manifest import MOST_BYTES
from pipeline.shards.media import media_of_columns, part_column, reason_of
from pipeline.shards.sample import Sample, shard_name
from pipeline.shards.storage import Folder, file_digest, storage_errors
from pipeline.shards.tar import TarWriter

STATS = "_stats.json"
MESSAGES_KEPT = 100_000
PARQUET_ROWS = 1_000


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """The counts of one finished shard: img2dataset's keys, then ours.

    ``unit`` is the digest of the unit of work (input slice and options) of the shard; ``reasons`` counts failed rows by
    error class (``audio:http_4xx`` where rows have several parts); ``fields`` are the sorted fields of its samples.
    ``failed_parts`` counts the failed parts of all rows with several, those of samples too: medium -> error class ->
    number.
    """

    shard: str
    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    duration: float
    start_time: float
    end_time: float
    status_dict: Mapping[str, int]
    unit: str
    bytes: int
    sha256: str
    fields: tuple[str, ...]
    reasons: Mapping[str, int]
    failed_parts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("count", "successes", "failed_to_download", "failed_to_resize", "bytes"):
            require(0 <= getattr(self, name) <= MOST_BYTES, name, getattr(self, name), "0 or more")


@dataclass
class _Counts:
    status: Counter[str] = field(default_factory=Counter)
    message: Counter[str] = field(default_factory=Counter)
    reason: Counter[str] = field(default_factory=Counter)
    parts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


class ShardWriter:
    """Fills a shard row by row, then :meth:`commit`. A context manager; without commit it leaves no files.

    ``schema`` is the schema of the parquet file; each row passed to :meth:`add` has its columns.
    """

    def __init__(self, folder: Folder, shard_id: int, schema: pa.Schema, unit: str) -> None:
        self.folder, self.name, self.schema, self.unit = (
            folder,
            shard_name(shard_id),
            schema,
            unit,
        )
        self._started = time.time()
        self._rows: list[Mapping[str, Any]] = []
        self._counts = _Counts()
        self._media = media_of_columns(schema.names)
        self._fields: set[str] = set()

    def __enter__(self) -> Self:
        self._tar_scratch = self.folder.scratch_file(".tar")
        self._table_scratch = self.folder.scratch_file(".parquet")
        self._tar_path, self._table_path = (
            self._tar_scratch.__enter__(),
            self._table_scratch.__enter__(),
        )
        self._tar_file = open(self._tar_path, "wb")
        self._tar = TarWriter(self._tar_file)
        self._table = pq.ParquetWriter(self._table_path, self.schema)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Closing flushes the buffer, which fails again on a full disk.
            self._tar_file.close()
            self._table.close()
        except OSError:
            if kind is None:
                raise
        finally:
            self._tar_scratch.__exit__(kind, error, trace)
            self._table_scratch.__exit__(kind, error, trace)

    def add(self, row: Mapping[str, Any], sample: Sample | None) -> None:
        """Add one input row; ``sample`` is ``None`` where the row failed.

        Raises:
            StorageError: the disk is full.
        """
        self._counts.status[row["status"]] += 1
        if len(self._counts.message) < MESSAGES_KEPT:
            self._counts.message["success" if sample else str(row["error_message"])] += 1
        if sample is None:
            self._counts.reason[reason_of(row, self._media)] += 1
        for medium in self._media:
            error_class = row.get(part_column(medium, "error_class"))
            if error_class:
                self._counts.parts[medium][error_class] += 1
        self._rows.append(row)
        with storage_errors(self.folder.join(f"{self.name}.tar")):
            if sample is not None:
                self._fields.update(sample.fields)
                self._tar.write(sample)
            if len(self._rows) >= PARQUET_ROWS:
                self._write_rows()

    def commit(self) -> ShardStats:
        """Write tar, parquet and, last, the stats under their final names.

        Raises:
            StorageError: the disk is full, the store failed, or another job took the folder's lease; the shard then
                counts as not done.
        """
        self.folder.check()
        with storage_errors(self.folder.join(f"{self.name}.tar")):
            self._tar.close()
            self._tar_file.close()
            self._write_rows()
            self._table.close()
        stats = self._stats(self._tar_path)
        # A rerun may replace a shard with a stale mark. Without a mark no reader uses a mixture of old and new files.
        self.folder.delete(self.name + STATS)
        self.folder.write_atomic(f"{self.name}.tar", self._tar_path)
        self.folder.write_atomic(f"{self.name}.parquet", self._table_path)
        self.folder.write_atomic(self.name + STATS, _stats_json(stats))
        return stats

    def _write_rows(self) -> None:
        if self._rows:
            self._table.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
            self._rows = []

    def _stats(self, tar: Path) -> ShardStats:
        end = time.time()
        status = self._counts.status
        return ShardStats(
            shard=self.name,
            count=status.total(),
            successes=status["success"],
            failed_to_download=status["failed_to_download"],
            failed_to_resize=status["failed_to_resize"],
            duration=end - self._started,
            start_time=self._started,
            end_time=end,
            status_dict=dict(self._counts.message),
            unit=self.unit,
            bytes=tar.stat().st_size,
            sha256=file_digest(tar),
            fields=tuple(sorted(self._fields)),
            reasons=dict(self._counts.reason),
            failed_parts={medium: dict(found) for medium, found in self._counts.parts.items()},
        )


def read_stats(folder: Folder, name: str) -> ShardStats | None:
    """The stats of the shard ``name`` (``00017``); ``None`` where the shard is not done.

    Raises:
        SnapshotError: the stats were not written by clipmill.
    """
    try:
        return from_plain(ShardStats, {**parse_json(folder.read_bytes(name + STATS)), "shard": name})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        message = f"{folder.join(name + STATS)} was not written by clipmill; choose an empty folder"
        raise SnapshotError(message) from error


def unit_digest(*parts: str) -> str:
    """SHA-256 (hex) that identifies a unit of work by its parts (input slice digest, options fingerprint)."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def parquet_schema(columns: Mapping[str, pa.DataType], hash_name: str | None) -> pa.Schema:
    """img2dataset's parquet columns with the input's own ``columns``, then clipmill's columns about failures."""
    named: list[tuple[str, pa.DataType]] = [*columns.items()]
    named += [
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
    ]
    named += [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    named += [("exif", pa.string())]
    named += [(hash_name, pa.string())] if hash_name else []
    named += [
        ("error_class", pa.string()),
        ("http_status", pa.int32()),
        ("attempts", pa.int32()),
    ]
    return pa.schema(named)


OF_PARTS = ("url", "md5", "sha256", "sha512", "etag", "last_modified")


def reserved_columns(media: Sequence[str] = ()) -> tuple[str, ...]:
    """Reserved names of input columns: the parquet file and the json use them for rows with parts of ``media``."""
    own = ("error_class", "error_message", "http_status", "attempts")
    of_media = (part_column(medium, name) for medium in media for name in (*OF_PARTS, *own))
    return (*parquet_schema({}, None).names, "caption", *OF_PARTS, *(of_media if len(media) > 1 else ()))


def _stats_json(stats: ShardStats) -> bytes:
    plain = {name: value for name, value in vars(stats).items() if name != "shard"}
    return json.dumps(plain, indent=4).encode()
