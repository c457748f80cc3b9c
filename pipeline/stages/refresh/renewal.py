"""Refresh a dataset from its newest snapshot: fetch new rows, hide removed and opted-out rows, keep the others.

Files of older snapshots are not changed: new rows become shards numbered after the last one, and hidden samples are
left out of the shards' selections. Until the new snapshot is published, the refresh can be stopped and run again. If
the source has changed in the meantime, a new plan replaces the unpublished one.
"""

import dataclasses
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SnapshotError
from pipeline.shards.sample import shard_name
from pipeline.shards.selection import read_selection, select, write_selection
from pipeline.shards.snapshot import (
    Shard,
    Snapshot,
    publish_shards,
    read_snapshot,
    reasons_in_words,
    snapshot_ids,
)
from pipeline.shards.storage import Folder
from pipeline.shards.text import storable
from pipeline.shards.writer import STATS, ShardStats, read_stats
from pipeline.sources.source import Part, Row, Slice, Source, contents_of, media_of
from pipeline.stages.crawl.download import digest
from pipeline.stages.crawl.failure import TRANSIENT
from pipeline.stages.refresh.comparison import (
    ABSENT,
    LISTED,
    OPTED_OUT,
    TO_HIDE,
    WANTED,
    Partitions,
    Places,
    RowDifference,
    compare,
    joined_digest,
    parts_of,
    place,
    records,
)
from pipeline.stages.refresh.delta import ROWS_FILE, Delta, write_rows
from pipeline.stages.refresh.ledger import (
    REPLACED,
    Failures,
    Ledger,
    digest_of_places,
    next_number,
    opted_out_of_table,
    opted_out_rows,
    read_hidden,
    read_rows,
    write_hidden,
)
from pipeline.stages.refresh.make_shard import clean_caption, clean_value
from pipeline.stages.refresh.opt_out import OptOut, read_opt_out
from pipeline.stages.refresh.plan import (
    FIRST,
    PLAN_FILE,
    PLANS,
    ROOT,
    RefreshPlan,
    StoredPlan,
    drop_shards,
    plan_of,
    read_plan,
    write_plan,
)
from pipeline.stages.refresh.revalidation import Stale, forget, revalidate
from pipeline.stages.refresh.settings import LATEST, RefreshJob, Renewal

logger = logging.getLogger(__name__)

RETRYABLE = TRANSIENT | {"dns"}
"""Failures that --retry-failed fetches again."""


@dataclass(frozen=True, kw_only=True)
class PlannedRefresh:
    """A planned refresh: the differences, and the plan of the rows to fetch from ``source``."""

    name: str
    parent: Snapshot | None
    found: RowDifference
    failures: Failures
    opt_out: OptOut
    source: Source
    plan: RefreshPlan


def prepare(job: RefreshJob) -> PlannedRefresh | Snapshot:
    """Compare the source with the folder's shards and plan the refresh; returns the snapshot if there is no work.

    The job's workers revalidate stored images if the renewal requests it.

    Raises:
        SettingError: the input, the parent or the opt-out list is invalid.
        DataError: a stored shard is damaged.
    """
    source, folder, options, renewal = job.source, job.folder, job.options, job.renewal
    asked = renewal.revalidate
    require(asked == "none" or bool(media_of(source)), "revalidate", asked, "none, for a source without images")
    opt_out = read_opt_out(renewal.opt_out)
    parent = _parent(folder, renewal)
    if parent is not None:
        _refuse_other_shape(parent, job.shaping)
        _refuse_lost_shards(folder, parent)
    name = parent.id if parent else FIRST
    known = read_plan(folder, name)
    place = folder.folder(f"{PLANS}/{name}")
    asks = parent is not None and parent.id == snapshot_ids(folder)[-1] and asked != "none"
    stale: Stale = {}
    if parent is not None and asks:
        stale = revalidate(folder, parent, place, options.downloads, opt_out, asked, media_of(source)[0], job.workers)
    ledger = Ledger(folder, parent, known.first if known else next_number(folder) if parent else 0, stale)
    failures = Failures()
    with tempfile.TemporaryDirectory(prefix="clipmill-") as scratch:
        pieces = list(source.slices(options.number_sample_per_shard, Folder(f"{scratch}/source")))
        found = _difference(job, pieces, ledger, opt_out, failures, Path(scratch))
        rows = Path(scratch) / ROWS_FILE
        write_rows(rows, source, found, pieces, place, options.number_sample_per_shard, options.downloads.compute_hash)
        plan = _planned(job, Folder(scratch), found, ledger.first)
        if parent is not None and parent.id != snapshot_ids(folder)[-1]:
            return _finished(folder, parent, known, plan)
        if parent is not None and found.empty:
            logger.info("nothing has changed since snapshot %s", parent.uri)
            _discard(folder, name, known)
            forget(place)
            return parent
        _replace(folder, name, known, plan, ledger.first, rows)
    delta = Delta(base=source, table=place.join(ROWS_FILE))
    return PlannedRefresh(
        name=name, parent=parent, found=found, failures=failures, opt_out=opt_out, source=delta, plan=plan
    )


def _parent(folder: Folder, renewal: Renewal) -> Snapshot | None:
    ids = snapshot_ids(folder)
    uri = renewal.parent or LATEST
    if uri == LATEST:
        return read_snapshot(folder.uri) if ids else None
    place, _, name = uri.rpartition("@") if "@" in uri.rsplit("/", 1)[-1] else (uri, "", "")
    allowed = f"latest, or a snapshot of the output folder: {folder.uri}@{ids[-1] if ids else 'id'}"
    require(Folder(place).uri == folder.uri and (not name or name in ids), "parent", uri, allowed)
    return read_snapshot(f"{folder.uri}@{name}" if name else folder.uri)


def _refuse_other_shape(parent: Snapshot, shaping: Mapping[str, Any]) -> None:
    # Snapshots older than keep_bytes stored images as they are by skip_reencode.
    renamed = {"skip_reencode"} if shaping.get("keep_bytes") and "keep_bytes" not in parent.options else set()
    for name, value in shaping.items():
        if name in renamed:
            continue
        before = parent.options.get(name, value)
        require(before == value, name, value, f"{before!r}, as in {parent.uri}, or another folder")


def _refuse_lost_shards(folder: Folder, parent: Snapshot) -> None:
    """Raise ``SnapshotError`` where a tar of ``parent`` is gone, or its parquet, or its mark.

    Its samples would count as kept without a tar, and be fetched twice without a mark. Tars that were adopted without a
    parquet file have neither. The rows may have left the source, so the shard cannot simply be made again.
    """
    there = set(folder.names())
    lost: list[str] = []
    for shard in parent.shards:
        described = [f"{shard.name}.parquet", shard.name + STATS]
        wanted = [shard.tar, *(described if there.intersection(described) else [])]
        lost += [file for file in wanted if file not in there]
    if lost:
        message = f"{parent.uri}: {len(lost)} files of its shards are gone ({', '.join(lost[:3])})"
        raise SnapshotError(f"{message}: restore them, or refresh into another folder")


def _difference(
    job: RefreshJob, pieces: Sequence[Slice], ledger: Ledger, opt_out: OptOut, failures: Failures, scratch: Path
) -> RowDifference:
    here, there = Partitions(scratch, "source"), Partitions(scratch, "shards")
    out = [TO_HIDE, OPTED_OUT, failures.state("opt_out")]
    urls = [np.zeros(0, np.uint64)]
    for found in ledger.records(job.source, opt_out, failures):
        there.add(found)
        urls.append(found["url"][np.isin(found["state"], out)])
    opted_out = np.unique(np.concatenate(urls))
    for found in source_records(job.source, pieces, opt_out, job.options.downloads.compute_hash):
        # With another caption, or without the list, it is still the opted-out image.
        found["state"][np.isin(found["url"], opted_out)] = LISTED
        here.add(found)
    return compare(here, there, failures.mask(RETRYABLE if job.renewal.retry_failed else ()))


def source_records(
    source: Source, pieces: Sequence[Slice], opt_out: OptOut, hash_name: str | None
) -> Iterator[NDArray[np.void]]:
    """Records of a source's rows; positions refer to ``pieces``."""
    columns, media = sorted(source.schema()), media_of(source)
    for number, piece in enumerate(pieces):
        values: list[tuple[object, ...]] = []
        urls_of_parts: list[Sequence[str | None]] = []
        digests: list[Sequence[str | None]] = []
        for row in source.rows(piece):
            caption = (clean_caption(row.caption),) if source.has_captions else ()
            columns_of_row = (clean_value(row.columns.get(name)) for name in columns)
            urls = [next((storable(part.url) for part in row.parts if part.medium == one), None) for one in media[1:]]
            values.append((storable(row.url), *caption, *columns_of_row, *urls))
            urls_of_parts.append(urls)
            digests.append(_digests(row, media, hash_name))
        urls_of_rows = [[str(value[0]) for value in values], *map(list, zip(*urls_of_parts, strict=True))]
        listed = opted_out_rows(opt_out, urls_of_rows, list(zip(*digests, strict=True)))
        states = np.where(listed, LISTED, WANTED).astype(np.uint8)
        bodies = [joined_digest(of_row) for of_row in digests]
        yield records(values, bodies, place(number, 0) + np.arange(len(values)), states)


def _digests(row: Row, media: Sequence[str], hash_name: str | None) -> list[str | None]:
    """The digest of each part, in the order of ``media``: None = not known yet, "" = no such part."""
    if not media:
        return [digest(content, hash_name) for content in contents_of(row) if content is not None]
    parts = {part.medium: part for part in row.parts}
    return [_digest_of(parts[medium], hash_name) if medium in parts else ABSENT for medium in media]


def _digest_of(part: Part, hash_name: str | None) -> str | None:
    return _expected(part.expected, hash_name) if part.body is None else digest(part.body, hash_name)


def _expected(expected: str | None, hash_name: str | None) -> str | None:
    """The required digest of a part, if its algorithm is the stored one; a different digest is a change."""
    algorithm, _, hexadecimal = (expected or "").partition(":")
    return hexadecimal.lower() if hexadecimal and algorithm == hash_name else None


def _planned(job: RefreshJob, scratch: Folder, found: RowDifference, first: int) -> RefreshPlan:
    """The plan of the fresh rows; its digest also covers the samples to hide and to show again."""
    delta = Delta(base=job.source, table=scratch.join(ROWS_FILE))
    plan = plan_of(delta, scratch, job.options.number_sample_per_shard, job.shaping, first)
    return dataclasses.replace(plan, digest=plan.digest + digest_of_places(found.gone, found.opted_out, found.back))


def _finished(folder: Folder, parent: Snapshot, known: StoredPlan | None, plan: RefreshPlan) -> Snapshot:
    """The snapshot published by this same refresh; any other start from an old snapshot is an error."""
    newest = read_snapshot(folder.uri)
    same = known is not None and known.digest == plan.digest
    require(same, "parent", parent.uri, f"the newest snapshot, {newest.uri}, which has replaced this one")
    logger.info("this refresh is done; the newest snapshot is %s", newest.uri)
    return newest


def _replace(folder: Folder, name: str, known: StoredPlan | None, plan: RefreshPlan, first: int, rows: Path) -> None:
    """Store plan and rows; delete the shards of an earlier, unpublished plan."""
    if known is not None and known.digest != plan.digest:
        logger.info("the source has changed since this refresh began; planning again")
        drop_shards(folder, known, plan)
    begun = read_plan(folder, ROOT) if name == FIRST else None
    if begun is not None:
        # Work that was begun without an opt-out list must not be continued.
        drop_shards(folder, begun, plan)
        folder.folder(PLANS).delete(PLAN_FILE)
    folder.folder(f"{PLANS}/{name}").write_atomic(ROWS_FILE, rows)
    if known is None or known.digest != plan.digest:
        write_plan(folder, name, plan, first)


def _discard(folder: Folder, name: str, known: StoredPlan | None) -> None:
    """Delete an unpublished plan, because the source has its earlier content again."""
    if known is not None:
        drop_shards(folder, known, None)
        for file in (PLAN_FILE, ROWS_FILE):
            folder.folder(f"{PLANS}/{name}").delete(file)


def publish_renewal(job: RefreshJob, prepared: PlannedRefresh, stats: Iterable[ShardStats]) -> Snapshot:
    """Publish the parent's shards, with updated selections, and the new ones.

    Raises:
        SnapshotError: no sample is left.
        StorageError: the file system or store failed.
    """
    folder, found, parent, done = job.folder, prepared.found, prepared.parent, list(stats)
    new = [
        Shard(name=one.shard, samples=one.successes, bytes=one.bytes, sha256=one.sha256)
        for one in done
        if one.successes
    ]
    listed = {shard.name: _listed(folder, shard, prepared.opt_out) for shard in new}
    hidden = _hidden(folder, prepared, listed)
    kept = [_reselected(folder, shard, found) for shard in _with_returned(folder, parent, found)]
    new = [select(folder, shard, ~listed[shard.name]) if listed[shard.name].any() else shard for shard in new]
    shards = tuple(sorted((shard for shard in (*kept, *new) if shard.samples), key=lambda shard: shard.name))
    dropped = _dropped(prepared, done, sum(int(mask.sum()) for mask in listed.values()))
    if not shards:
        raise SnapshotError(f"{folder.uri}: no sample is left: {reasons_in_words(dropped)}")
    if hidden or (parent is not None and read_hidden(folder, parent)):
        write_hidden(folder, prepared.name, hidden)
    fields = {name for one in done for name in one.fields} | set(parent.fields if parent else ())
    return publish_shards(
        folder,
        shards,
        fields=tuple(sorted(fields)),
        card=job.card,
        options=job.recorded,
        rows=found.rows,
        dropped=dropped,
        changes=_changes(found, done, listed),
        always=parent is not None,
    )


def _listed(folder: Folder, shard: Shard, opt_out: OptOut) -> NDArray[np.bool_]:
    """The samples of a new shard that are opted out by key, or by the digest of the downloaded file."""
    if not len(opt_out):
        return np.zeros(shard.stored, np.bool_)
    table = read_rows(folder, shard.name)
    good = np.array([status == "success" for status in table["status"].to_pylist()], np.bool_)
    return opted_out_of_table(opt_out, table)[good]


def _hidden(
    folder: Folder, prepared: PlannedRefresh, listed: Mapping[str, NDArray[np.bool_]]
) -> dict[int, dict[int, str]]:
    """All known reasons, without the rows that are shown again, with those that this refresh hides."""
    hidden = read_hidden(folder, prepared.parent)
    for shard, position in _pairs(prepared.found.back):
        hidden[shard].pop(position, None)
    found = prepared.found
    for reason, where in (("gone", found.gone), (REPLACED, found.replaced), ("opt_out", found.opted_out)):
        for shard, position in _pairs(where):
            hidden.setdefault(shard, {})[position] = reason
    for name, mask in listed.items():
        for position in np.flatnonzero(mask).tolist():
            hidden.setdefault(int(name), {})[position] = "opt_out"
    return {shard: reasons for shard, reasons in hidden.items() if reasons}


def _pairs(where: Places) -> Iterator[tuple[int, int]]:
    numbers, positions = parts_of(where)
    return zip(numbers.tolist(), positions.tolist(), strict=True)


def _with_returned(folder: Folder, parent: Snapshot | None, found: RowDifference) -> list[Shard]:
    """The parent's shards, and shards without visible samples some of whose rows are shown again."""
    shards = list(parent.shards) if parent else []
    known = {shard.name for shard in shards}
    for number in np.unique(parts_of(found.back)[0]).tolist():
        stats = read_stats(folder, shard_name(number))
        if stats is not None and stats.shard not in known:
            empty = write_selection(folder, np.zeros(0, np.int32))
            shards.append(
                Shard(
                    name=stats.shard,
                    samples=0,
                    bytes=stats.bytes,
                    sha256=stats.sha256,
                    selection=empty,
                    stored=stats.successes,
                )
            )
    return shards


def _reselected(folder: Folder, shard: Shard, found: RowDifference) -> Shard:
    """``shard`` without removed and opted-out samples, with those shown again; the same shard without changes."""
    if not shard.name.isdigit():
        return shard
    number = int(shard.name)
    away = np.concatenate([_positions(found.gone, number), _positions(found.opted_out, number)])
    back = _positions(found.back, number)
    if not len(away) and not len(back):
        return shard
    present = read_selection(folder, shard)
    shown = np.arange(shard.stored) if present is None else present.astype(np.int64)
    # Keep repeats of visible samples: a selection may list a sample several times.
    shown = np.sort(np.concatenate([shown[~np.isin(shown, away)], back]))
    if len(shown) == shard.stored and (np.diff(shown) == 1).all():
        return dataclasses.replace(shard, samples=shard.stored, selection="")
    selection = write_selection(folder, shown.astype(np.int32)) if len(shown) else ""
    return dataclasses.replace(shard, samples=len(shown), stored=shard.stored, selection=selection)


def _positions(where: Places, number: int) -> Places:
    first, last = np.searchsorted(where, [place(number, 0), place(number + 1, 0)])
    return parts_of(where[first:last])[1]


def _dropped(prepared: PlannedRefresh, done: Sequence[ShardStats], listed: int) -> dict[str, int]:
    """Number of source rows without a sample, by reason."""
    dropped: Counter[str] = Counter()
    for state, count in prepared.found.failures.items():
        dropped[prepared.failures.name(state)] += count
    for state, count in prepared.found.hidden.items():
        dropped["opt_out" if state in (OPTED_OUT, TO_HIDE) else "hidden"] += count
    for one in done:
        dropped.update(one.reasons)
    dropped["opt_out"] += listed
    return {reason: count for reason, count in dropped.items() if count}


def _changes(
    found: RowDifference, done: Sequence[ShardStats], listed: Mapping[str, NDArray[np.bool_]]
) -> dict[str, int]:
    refused = sum(one.reasons.get("opt_out", 0) for one in done)
    opted_out = len(found.opted_out) + sum(int(mask.sum()) for mask in listed.values()) + refused
    changes = {
        "added": len(found.fresh) - found.retried - found.changed,
        "removed": len(found.gone) - found.changed,
        "changed": found.changed,
        "kept": found.kept,
        "failed": sum(one.count - one.successes for one in done) - refused,
    }
    others = {"opt_out": opted_out, "retried": found.retried, "restored": len(found.back)}
    return changes | {name: count for name, count in others.items() if count}
