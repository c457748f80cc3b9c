"""The plan of a data job: one unit of work per shard, with a digest of its input and of the options that shape it.

Plan and row copies lie in ``{folder}/_plan/``. The same input and options give the same plan, so the same command
finds its own work again after a kill; another plan in the same folder is refused rather than mixed in.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.shards.sample import check_rows_per_shard
from pipeline.shards.storage import Folder
from pipeline.shards.writer import unit_digest
from pipeline.sources.source import Slice, Source

PLANS = "_plan"
PLAN_FILE = "plan.parquet"
PLAN_DIGEST = b"clipmill.plan"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One shard to make: its number, the slice of input, and the digest of both slice and options."""

    shard_id: int
    piece: Slice
    digest: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All units of a job; ``digest`` is the SHA-256 hex over theirs, in order."""

    digest: str
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """Number of input rows."""
        return sum(unit.piece.count for unit in self.units)


def make_plan(source: Source, folder: Folder, rows_per_shard: int, options: Mapping[str, object]) -> Plan:
    """Plan the work of reading ``source`` into ``folder`` and write the plan down.

    ``options`` are those that change a shard's bytes.

    Raises:
        SettingError: the input is missing or empty, or the folder holds the work of another plan.
    """
    check_rows_per_shard(rows_per_shard)
    shaping = json.dumps({**options, "number_sample_per_shard": rows_per_shard}, sort_keys=True)
    units = tuple(_units(source.slices(rows_per_shard, folder.folder(PLANS)), shaping))
    digest = hashlib.sha256("\n".join(unit.digest for unit in units).encode()).hexdigest()
    _refuse_other(folder, digest)
    _write(folder, digest, units)
    return Plan(digest=digest, units=units)


def _units(slices: Iterator[Slice], shaping: str) -> Iterator[Unit]:
    for number, piece in enumerate(slices):
        yield Unit(shard_id=number, piece=piece, digest=unit_digest(str(number), piece.digest, shaping))


def _refuse_other(folder: Folder, digest: str) -> None:
    plans = folder.folder(PLANS)
    if not plans.exists(PLAN_FILE):
        return
    metadata = pq.read_schema(BytesIO(plans.read_bytes(PLAN_FILE))).metadata or {}
    known = metadata.get(PLAN_DIGEST, b"").decode()
    allowed = "an empty folder, or one that the same input and options began (this one holds other work)"
    require(known == digest, "output_folder", folder.uri, allowed)


def _write(folder: Folder, digest: str, units: tuple[Unit, ...]) -> None:
    rows = [
        {
            "shard_id": unit.shard_id,
            "count": unit.piece.count,
            "digest": unit.digest,
            "slice_digest": unit.piece.digest,
            "where": json.dumps(unit.piece.where),
        }
        for unit in units
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({PLAN_DIGEST: digest.encode()})
    content = BytesIO()
    pq.write_table(table, content)
    folder.folder(PLANS).write_atomic(PLAN_FILE, content.getvalue())
