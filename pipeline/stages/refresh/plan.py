"""The plan of a data job: one unit of work per shard, with a digest of its input and of the options that affect it.

Plan and row copies are stored in ``{folder}/_plan/``. The same input and options give the same plan, so the same
command resumes its work after a kill. A different plan for the same folder is an error. Each refresh has its own plan,
``{folder}/_plan/{parent}/``, named by the snapshot it starts from, so a folder has a chain of plans.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.sample import check_rows_per_shard, shard_name
from pipeline.shards.snapshot import snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.writer import STATS, unit_digest
from pipeline.sources.source import Slice, Source

logger = logging.getLogger(__name__)

PLANS = "_plan"
PLAN_FILE = "plan.parquet"
PLAN_DIGEST = b"clipmill.plan"
PLAN_FIRST = b"clipmill.first"
ROOT = ""
FIRST = "first"
_TYPES: Mapping[str, pa.DataType] = {
    "shard_id": pa.int64(),
    "count": pa.int64(),
    "digest": pa.string(),
    "slice_digest": pa.string(),
    "where": pa.string(),
}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One shard to make: its number, its slice of the input, and the digest of slice and options."""

    shard_id: int
    piece: Slice
    digest: str


@dataclass(frozen=True, kw_only=True)
class RefreshPlan:
    """All units of a job; ``digest`` is the SHA-256 (hex) of their digests, in order."""

    digest: str
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """Number of input rows."""
        return sum(unit.piece.count for unit in self.units)


def make_plan(
    source: Source, folder: Folder, rows_per_shard: int, options: Mapping[str, object], replace: bool = False
) -> RefreshPlan:
    """Plan the shards of ``source`` in ``folder``, and write the plan.

    ``options`` are those that change a shard's bytes. With ``replace`` this plan replaces another one that has not been
    published.

    Raises:
        SettingError: the input is missing or empty, or the folder holds the work of another plan.
    """
    plan = plan_of(source, folder.folder(PLANS), rows_per_shard, options)
    known = read_plan(folder, ROOT)
    started = known is not None or folder.folder(f"{PLANS}/{FIRST}").exists(PLAN_FILE) or bool(snapshot_ids(folder))
    allowed = "an empty folder, or one that the same input and options began (this one holds other work"
    allowed += "; --parent latest takes over what has changed since its newest snapshot)"
    same = known.digest == plan.digest if known else not started
    replace = replace and not snapshot_ids(folder)
    require(same or replace, "output_folder", folder.uri, allowed)
    if known is not None and known.digest != plan.digest:
        drop_shards(folder, known, plan)
    if known is None or known.digest != plan.digest:
        write_plan(folder, ROOT, plan)
    return plan


def drop_shards(folder: Folder, known: "StoredPlan", plan: RefreshPlan | None) -> None:
    """Delete the shards of an unpublished plan, except those whose numbers are in ``plan`` too."""
    kept = {unit.shard_id for unit in plan.units} if plan else set()
    for number in sorted(set(known.shards) - kept):
        for ending in (STATS, ".tar", ".parquet"):
            folder.delete(shard_name(number) + ending)


def remake_incomplete(folder: Folder, plan: RefreshPlan) -> None:
    """Remove the marks of finished shards of ``plan`` whose tar or parquet is gone: they are made again.

    One listing of the folder. Files that were changed instead of deleted are found by ``jobs/verify_dataset.py``.
    """
    there = set(folder.names())
    names = [shard_name(unit.shard_id) for unit in plan.units]
    files = {name: [f"{name}{ending}" for ending in (".tar", ".parquet")] for name in names if name + STATS in there}
    gone = {name: lost for name, both in files.items() if (lost := [file for file in both if file not in there])}
    if gone:
        first = ", ".join(next(iter(gone.values())))
        logger.warning("%d finished shards have lost files (%s, …) and are made again", len(gone), first)
    for name in gone:
        folder.delete(name + STATS)


def plan_of(
    source: Source, scratch: Folder, rows_per_shard: int, options: Mapping[str, object], first: int = 0
) -> RefreshPlan:
    """The plan of shards of ``source`` numbered from ``first``; writes only the source's row copies."""
    check_rows_per_shard(rows_per_shard)
    shaping = json.dumps({**options, "number_sample_per_shard": rows_per_shard}, sort_keys=True)
    units = tuple(_units(source.slices(rows_per_shard, scratch), shaping, first))
    digest = hashlib.sha256("\n".join(unit.digest for unit in units).encode()).hexdigest()
    return RefreshPlan(digest=digest, units=units)


def _units(slices: Iterator[Slice], shaping: str, first: int) -> Iterator[Unit]:
    for number, piece in enumerate(slices, first):
        yield Unit(shard_id=number, piece=piece, digest=unit_digest(str(number), piece.digest, shaping))


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """A stored plan: its digest, the number of its first shard, and all shard numbers."""

    digest: str
    first: int
    shards: tuple[int, ...]


def read_plan(folder: Folder, name: str) -> StoredPlan | None:
    """The plan ``name`` (:data:`ROOT`, :data:`FIRST`, or the parent snapshot of a refresh), if it exists.

    Raises:
        DataError: the file is damaged.
    """
    place = _place(folder, name)
    if not place.exists(PLAN_FILE):
        return None
    try:
        table = parse_parquet(place.read_bytes(PLAN_FILE), ["shard_id"])
        metadata = table.schema.metadata or {}
        digest, first = metadata.get(PLAN_DIGEST, b"").decode(), int(metadata.get(PLAN_FIRST, b"0"))
        shards: tuple[int, ...] = tuple(table["shard_id"].cast(pa.int64()).to_numpy().tolist())
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{place.join(PLAN_FILE)} is not a plan of clipmill ({error!r}); delete it") from error
    if first < 0 or not all(isinstance(number, int) and number >= 0 for number in shards):
        raise DataError(f"{place.join(PLAN_FILE)} is not a plan of clipmill: its shards have no numbers; delete it")
    return StoredPlan(digest=digest, first=first, shards=shards)


def write_plan(folder: Folder, name: str, plan: RefreshPlan, first: int = 0) -> None:
    """Store a plan."""
    rows = [
        {
            "shard_id": unit.shard_id,
            "count": unit.piece.count,
            "digest": unit.digest,
            "slice_digest": unit.piece.digest,
            "where": json.dumps(unit.piece.where),
        }
        for unit in plan.units
    ]
    metadata: dict[bytes | str, bytes | str] = {
        PLAN_DIGEST: plan.digest.encode(),
        PLAN_FIRST: str(first).encode(),
    }
    content = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(_TYPES, metadata=metadata)), content)
    _place(folder, name).write_atomic(PLAN_FILE, content.getvalue())


def _place(folder: Folder, name: str) -> Folder:
    return folder.folder(f"{PLANS}/{name}" if name else PLANS)
