"""Sidecars: annotations added later, in one parquet file beside each tar, joined by key.

The schema metadata of ``00017.regions.parquet`` holds the digest of its tar and of its maker (a model, a rule). So
images are never rewritten for an annotation, and a sidecar of another tar is detected.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import parse_json
from pipeline.errors import SidecarError
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder, file_digest, storage_errors

TAR_DIGEST = b"clipmill.tar_sha256"
MAKER = b"clipmill.maker"
FACTS = b"clipmill.facts"
"""Metadata for readers, as JSON."""
GROUP_BYTES = 1 << 20
"""Approximate size of a row group in bytes, so that reading a few rows does not read the whole file."""


def sidecar_file(shard: Shard, name: str) -> str:
    """``00017.regions.parquet``"""
    return f"{shard.name}.{name}.parquet"


def write_sidecar(folder: Folder, shard: Shard, name: str, table: pa.Table, maker: str) -> str:
    """Write ``table``, with a column ``key``, as the sidecar ``name`` of ``shard``; returns its SHA-256 (hex).

    ``maker`` is the digest of its maker: the weights of a model, the version of a rule.

    Raises:
        SidecarError: no column ``key``, or an invalid ``name``.
        StorageError: the file system or store failed.
    """
    if "key" not in table.column_names or not name.isidentifier():
        raise SidecarError(f"sidecar {name!r}: needs a plain word as its name and a column `key`")
    stamps = {TAR_DIGEST: shard.sha256.encode(), MAKER: maker.encode()}
    stamped = table.replace_schema_metadata({**(table.schema.metadata or {}), **stamps})
    file = sidecar_file(shard, name)
    rows = max(1, GROUP_BYTES * len(stamped) // max(stamped.nbytes, 1))
    with folder.scratch_file(".parquet") as path:
        with storage_errors(folder.join(file)):
            pq.write_table(stamped, path, row_group_size=rows)
        digest = file_digest(path)
        folder.write_atomic(file, path)
    return digest


def read_sidecar(folder: Folder, shard: Shard, name: str, job: str, maker: str | None = None) -> pa.Table:
    """Read the sidecar ``name`` of ``shard``; errors name ``job`` as the command that makes it.

    Raises:
        SidecarError: missing, made from another tar, not made by ``maker``, or without a column ``key``.
    """
    with _readable(folder, shard, name, job):
        table = parse_parquet(folder.read_bytes(sidecar_file(shard, name)))
    _check_stamps(table.schema, folder, shard, name, job, maker)
    if "key" not in table.column_names:
        raise SidecarError(f"{folder.join(sidecar_file(shard, name))} has no column `key`; make it again with {job}")
    return table


def read_sidecar_schema(folder: Folder, shard: Shard, name: str, job: str, maker: str | None = None) -> pa.Schema:
    """The columns of a sidecar and its metadata; reads only the footer. Raises as :func:`read_sidecar`."""
    with _readable(folder, shard, name, job), folder.open(sidecar_file(shard, name)) as file:
        schema = pq.read_schema(file)
    _check_stamps(schema, folder, shard, name, job, maker)
    return schema


@contextmanager
def _readable(folder: Folder, shard: Shard, name: str, job: str) -> Iterator[None]:
    """Raise ``SidecarError`` for a file that is missing or not parquet."""
    file = sidecar_file(shard, name)
    try:
        yield
    except FileNotFoundError as error:
        raise SidecarError(f"{folder.join(file)} is missing; make it with {job}") from error
    except (pa.ArrowException, OSError) as error:
        raise SidecarError(f"{folder.join(file)} is not parquet ({error}); make it again with {job}") from error


def sidecar_facts(schema: pa.Schema, file: str, job: str) -> dict[str, Any]:
    """The metadata for readers of the sidecar ``file`` with this schema; empty where it has none.

    Raises:
        SidecarError: it is no JSON object.
    """
    try:
        facts = parse_json((schema.metadata or {}).get(FACTS, b"{}"))
    except ValueError as error:
        raise SidecarError(f"{file} has unreadable metadata ({error}); make it again with {job}") from error
    if not isinstance(facts, dict):
        raise SidecarError(f"{file} has unreadable metadata (no JSON object); make it again with {job}")
    return facts


def _check_stamps(schema: pa.Schema, folder: Folder, shard: Shard, name: str, job: str, maker: str | None) -> None:
    """Check that the sidecar with this schema was made from ``shard``'s tar, and by ``maker`` if given."""
    file, metadata = sidecar_file(shard, name), schema.metadata or {}
    if metadata.get(TAR_DIGEST) != shard.sha256.encode():
        raise SidecarError(f"{folder.join(file)} was made from another {shard.tar}; make it again with {job}")
    if maker is not None and metadata.get(MAKER) != maker.encode():
        made_by = metadata.get(MAKER, b"?").decode(errors="replace")
        raise SidecarError(f"{folder.join(file)} was made by {made_by}, not {maker}; make it again with {job}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sidecar to join: ``job`` makes it, ``facts`` are required metadata (for example the teacher).

    An ``optional`` one is joined in snapshots that have it; of a mixture, some may not.
    """

    name: str
    job: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


class SidecarRows:
    """The rows of one shard's sidecar by key, read on request; the file stays open."""

    def __init__(self, path: Path, shard: Shard, wanted: Wanted) -> None:
        """Open the sidecar of ``shard`` in the local file ``path``.

        Raises:
            SidecarError: not parquet, made from another tar, or with other metadata than required.
        """
        self._wanted, self._path = wanted, path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise self._error(f"is not parquet ({error})") from error
        metadata = self._file.schema_arrow.metadata or {}
        if metadata.get(TAR_DIGEST) != shard.sha256.encode():
            raise self._error(f"was made from another {shard.tar}")
        facts = sidecar_facts(self._file.schema_arrow, str(path), wanted.job)
        for name, value in wanted.facts.items():
            if facts.get(name) != value:
                raise self._error(f"was made with the {name} {facts.get(name)}, not {value}")
        if "key" not in self._file.schema_arrow.names:
            raise self._error("has no column `key`")
        keys = self._file.read(["key"], use_threads=False)["key"].to_pylist()
        self._places = {str(key): place for place, key in enumerate(keys)}
        groups = self._file.metadata
        self._ends = list(accumulate(groups.row_group(number).num_rows for number in range(groups.num_row_groups)))

    def group(self, key: str) -> int:
        """The row group with ``key``; raises ``SidecarError`` where there is no such row."""
        if key not in self._places:
            raise self._error(f"has no row for sample {key}")
        return bisect_right(self._ends, self._places[key])

    def read(self, group: int) -> pa.Table:
        """The rows of one group."""
        return self._file.read_row_group(group, use_threads=False)

    def row(self, key: str, table: pa.Table) -> dict[str, Any]:
        """The row of ``key`` from its group's ``table``."""
        group = self.group(key)
        start = self._ends[group - 1] if group else 0
        found: dict[str, Any] = table.slice(self._places[key] - start, 1).to_pylist()[0]
        return found

    def _error(self, problem: str) -> SidecarError:
        return SidecarError(f"{self._path} {problem}; make it again with {self._wanted.job}")
