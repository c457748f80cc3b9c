"""Delete hidden samples from disk: the only operation that breaks old snapshots.

Each shard with hidden samples is rewritten with its visible samples, under a new number. A snapshot of the new shards
is published; then the old files and the snapshots that show them are deleted. ``_plan/purge.json`` is written first and
deleted last: if a purge is stopped, the next refresh finishes it.

Rows of opted-out samples stay in the new parquet files as failed rows, since they would otherwise be fetched again;
rows that left their source are dropped.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import from_json, from_plain, parse_json, require, to_json
from pipeline.errors import DataError
from pipeline.shards.manifest import SNAPSHOT_ID
from pipeline.shards.media import media_of_columns, part_column
from pipeline.shards.sample import Sample, shard_name
from pipeline.shards.selection import SELECTIONS, Indices, read_selection, write_selection
from pipeline.shards.sidecar import MAKER, read_sidecar, write_sidecar
from pipeline.shards.snapshot import (
    SNAPSHOTS,
    Shard,
    Snapshot,
    delete_snapshot,
    publish_shards,
    read_snapshot,
    snapshot_ids,
)
from pipeline.shards.storage import Folder
from pipeline.shards.tar import iterate_tar
from pipeline.shards.writer import STATS, ShardStats, ShardWriter, read_stats, unit_digest
from pipeline.stages.refresh.ledger import REPLACED, next_number, read_hidden, read_rows, shard_numbers
from pipeline.stages.refresh.plan import PLAN_FILE, PLANS
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

PURGE_FILE = "purge.json"
PURGED = "purged"
DIGITS = 18  # at most, of a shard's number
_KEPT_WHEN_FAILED = ("width", "height", "original_width", "original_height", "exif", "sha256", "md5", "sha512")


@dataclass(frozen=True, kw_only=True)
class PurgeMark:
    """The purge of the snapshot ``of``: the shards to rewrite, with the names of the new ones."""

    of: str
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        require(SNAPSHOT_ID.fullmatch(self.of) is not None, "of", self.of, "the id of a snapshot")
        for name in (*self.names, *self.names.values()):
            require(name.isascii() and name.isdigit() and len(name) <= DIGITS, "names", name, "the number of a shard")


def purge(folder: Folder, snapshot: Snapshot, workers: Workers) -> Snapshot:
    """Delete the samples that are not visible in ``snapshot``, the newest of ``folder``; returns the new snapshot.

    ``workers`` write the new shards, one task each. Does nothing if no sample is hidden and no older snapshot shows
    more.

    Raises:
        DataError: a stored shard is damaged.
        StorageError: the file system or store failed.
    """
    shown = {shard.name: shard for shard in snapshot.shards}
    hidden = [name for _, name in shard_numbers(folder) if _hides(folder, name, shown.get(name))]
    if not hidden:
        return snapshot
    first = next_number(folder)
    names = {name: shard_name(number) for number, name in enumerate(hidden, first)}
    mark = PurgeMark(of=snapshot.id, names=names)
    folder.folder(PLANS).write_atomic(PURGE_FILE, to_json(mark).encode())
    return _purge(folder, snapshot.id, names, workers)


def finish_purge(folder: Folder, workers: Workers) -> bool:
    """Finish a purge that was stopped; returns whether there was one."""
    plans = folder.folder(PLANS)
    if not plans.exists(PURGE_FILE):
        return False
    try:
        mark = from_plain(PurgeMark, parse_json(plans.read_bytes(PURGE_FILE)), PURGE_FILE)
    except ValueError as error:
        raise DataError(f"{plans.join(PURGE_FILE)} is not the mark of a purge ({error}); delete it") from error
    _purge(folder, mark.of, mark.names, workers)
    return True


def _hides(folder: Folder, name: str, shard: Shard | None) -> bool:
    if shard is None:
        return _stored(folder, name) > 0
    indices = read_selection(folder, shard)
    return indices is not None and len(np.unique(indices)) < shard.stored


def _purge(folder: Folder, of: str, names: Mapping[str, str], workers: Workers) -> Snapshot:
    mark = folder.folder(PLANS)
    purged = _published(folder, of)
    newest = read_snapshot(folder.uri)
    if purged is None and newest.id != of:
        logger.warning("%s was published during a purge, which is cancelled; run the purge again", newest.uri)
        for name in names.values():
            for file in folder.names(".parquet"):
                if file.startswith(f"{name}."):  # sidecars
                    folder.delete(file)
            _delete_shard(folder, name)
        mark.delete(PURGE_FILE)
        return newest
    purged = purged or _publish(folder, newest, names, workers)
    logger.info("deleting %d shards and the snapshots that showed them", len(names))
    _delete(folder, purged, names)
    mark.delete(PURGE_FILE)
    return read_snapshot(folder.uri)


def _published(folder: Folder, of: str) -> Snapshot | None:
    """The snapshot published by the purge of the snapshot ``of``."""
    for name in snapshot_ids(folder):
        if name > of:
            later = read_snapshot(f"{folder.uri}@{name}")
            if later.parent == of and PURGED in later.options:
                return later
    return None


def _publish(folder: Folder, before: Snapshot, names: Mapping[str, str], workers: Workers) -> Snapshot:
    reasons = read_hidden(folder, before)
    shown = {shard.name: shard for shard in before.shards}
    work = [
        _Work(old=old, new=new, shard=shown.get(old), reasons=reasons.get(int(old), {})) for old, new in names.items()
    ]
    done = {
        work[number].old: from_json(_PurgedShard, text) for number, text in run_tasks(_Rewrite(folder), work, workers)
    }
    shards = [done[shard.name].shard if shard.name in done else shard for shard in before.shards]
    return publish_shards(
        folder,
        tuple(sorted((shard for shard in shards if shard), key=lambda shard: shard.name)),
        fields=before.fields,
        card=before.card,
        options={**before.options, PURGED: {"snapshots": snapshot_ids(folder), "shards": sorted(names)}},
        rows=before.rows,
        dropped=before.dropped,
        changes={"purged": sum(one.lost for one in done.values())},
        always=True,
    )


def _stored(folder: Folder, name: str) -> int:
    return read_rows(folder, name)["status"].to_pylist().count("success")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Rewrite the shard ``old`` as ``new``; ``reasons`` are those of its hidden samples."""

    old: str
    new: str
    shard: Shard | None
    reasons: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class _PurgedShard:
    """The new shard, ``None`` if no sample is left, and the number of deleted samples."""

    shard: Shard | None
    lost: int


class _Rewrite:
    """The task: rewrite one shard; returns the result as JSON."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def __call__(self, work: _Work) -> str:
        made = _rewrite(self._folder, work.old, work.new, work.shard, work.reasons)
        lost = _stored(self._folder, work.old) - (made.stored if made else 0)
        return to_json(_PurgedShard(shard=made, lost=lost))


def _rewrite(folder: Folder, old: str, new: str, shard: Shard | None, reasons: Mapping[int, str]) -> Shard | None:
    """Write the visible samples of ``old`` as the shard ``new``; ``None`` if none is visible."""
    present = _present(folder, shard)
    unit = unit_digest("purge", old, shard.sha256 if shard else "", shard.selection if shard else "")
    stats = read_stats(folder, new)
    if stats is None or stats.unit != unit:
        stats = _write(folder, old, int(new), unit, set(present.tolist()), reasons)
    if shard is None or not stats.successes:
        return None
    unique = np.unique(present)
    if len(unique) != stats.successes:
        raise DataError(f"{folder.join(shard.tar)} holds {stats.successes} of {len(unique)} visible samples")
    at = np.searchsorted(unique, present).astype(np.int32)
    repeats = len(present) != len(unique)
    made = Shard(
        name=new,
        samples=len(present),
        bytes=stats.bytes,
        sha256=stats.sha256,
        selection=write_selection(folder, at) if repeats else "",
        stored=stats.successes,
    )
    rows = read_rows(folder, new)
    keys = [row["key"] for row in rows.select(["key", "status"]).to_pylist() if row["status"] == "success"]
    return dataclasses.replace(made, sidecars=_move_sidecars(folder, shard, made, keys))


def _present(folder: Folder, shard: Shard | None) -> Indices:
    """Positions in the tar of visible samples, with repeats."""
    if shard is None:
        return np.zeros(0, np.int32)
    indices = read_selection(folder, shard)
    return np.arange(shard.stored, dtype=np.int32) if indices is None else indices


def _write(
    folder: Folder, old: str, number: int, unit: str, visible: set[int], reasons: Mapping[int, str]
) -> ShardStats:
    table = read_rows(folder, old)
    schema = _schema(table.schema)
    with folder.open(f"{old}.tar") as file, ShardWriter(folder, number, schema, unit) as writer:
        samples: Iterator[Sample] = iterate_tar(file, folder.join(f"{old}.tar"))
        position = -1
        for row in table.to_pylist():
            if row["status"] != "success":
                writer.add(row, None)
                continue
            position += 1
            sample = next(samples, None)
            if sample is None or sample.key != row["key"]:
                raise DataError(f"{folder.join(old + '.tar')} and {old}.parquet do not list the same samples")
            if position in visible:
                writer.add(row, sample)
            elif reasons.get(position) not in ("gone", REPLACED):
                writer.add(_tombstone(row, reasons.get(position, "hidden")), None)
        return writer.commit()


def _schema(schema: pa.Schema) -> pa.Schema:
    """The schema with the columns for failed rows, which img2dataset's own files lack."""
    needed = (("error_class", pa.string()), ("http_status", pa.int32()), ("attempts", pa.int32()))
    for name, kind in needed:
        if name not in schema.names:
            schema = schema.append(pa.field(name, kind))
    return schema.remove_metadata()


def _tombstone(row: Mapping[str, Any], reason: str) -> dict[str, Any]:
    parts = tuple(part_column(medium, "") for medium in media_of_columns(row))
    dropped = {name for name in row if name.startswith(parts) and not name.endswith("_url")}
    plain = {name: None if name in _KEPT_WHEN_FAILED or name in dropped else value for name, value in row.items()}
    return {**plain, "status": "failed_to_download", "error_message": "deleted from disk", "error_class": reason}


def _move_sidecars(folder: Folder, shard: Shard, made: Shard, keys: list[Any]) -> dict[str, str]:
    """The sidecars of the visible samples, beside the new tar."""
    moved: dict[str, str] = {}
    for name in shard.sidecars:
        table = read_sidecar(folder, shard, name, "the job that made it")
        maker = (table.schema.metadata or {}).get(MAKER, b"").decode()
        visible = pc.is_in(table["key"], value_set=pa.array(keys, table["key"].type))
        moved[name] = write_sidecar(folder, made, name, table.filter(visible), maker)
    return moved


def _delete(folder: Folder, purged: Snapshot, names: Mapping[str, str]) -> None:
    """Delete the old shards, the selections that no snapshot needs, and the snapshots older than ``purged``."""
    every = [read_snapshot(f"{folder.uri}@{name}") for name in snapshot_ids(folder)]
    for snapshot in every:
        for shard in snapshot.shards:
            for sidecar in shard.sidecars if shard.name in names else ():
                folder.delete(f"{shard.name}.{sidecar}.parquet")
    for name in names:
        _delete_shard(folder, name)
    needed = {shard.selection for snapshot in every if snapshot.id >= purged.id for shard in snapshot.shards}
    place = folder.folder(SELECTIONS)
    for file in place.names(".parquet"):
        if file.removesuffix(".parquet") not in needed:
            place.delete(file)
    # The folder's first plan would make the deleted shards again.
    folder.folder(PLANS).delete(PLAN_FILE)
    # Names of tables too: an interrupted run may leave a table without its mark.
    for file in folder.folder(SNAPSHOTS).names():
        older = file.partition(".")[0]
        if older < purged.id:
            delete_snapshot(folder, older)


def _delete_shard(folder: Folder, name: str) -> None:
    for ending in (STATS, ".tar", ".parquet"):
        folder.delete(name + ending)
