"""Filter a snapshot: judge every visible sample, publish the kept ones as a new snapshot.

Filters run in the given order, each on the samples left by the earlier ones. Consecutive filters without a global view
share one pass. Tables are stored in ``{folder}/_filters/{id}/``. ``reasons/{number}.parquet`` has one row per visible
sample of the parent's shard of that number: ``key``, ``reason`` ("" = kept, else ``filter.reason``) and ``times``, its
number of repeats. The id is made from parent and options, so the same command resumes its work after a kill.
"""

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import flatten, require
from pipeline.errors import DataError, SnapshotError
from pipeline.shards.lease import lease
from pipeline.shards.manifest import SNAPSHOT_ID, is_file_name
from pipeline.shards.selection import select
from pipeline.shards.sidecar import write_sidecar
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.filters.filter import Filter, Step, read_table, table_file, write_table
from pipeline.stages.filters.view import ShardView
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

FILTERS = "_filters"
REASONS = "reasons"
REASON_TYPES: Mapping[str, pa.DataType] = {"key": pa.string(), "reason": pa.string(), "times": pa.int32()}
REASON_COLUMNS = pa.schema(REASON_TYPES)
CAPTIONS = "captions"


@dataclass(frozen=True, kw_only=True)
class FilterOutcome:
    """The published snapshot, its parent, and the numbers of dropped samples by ``filter.reason``, in order."""

    snapshot: Snapshot
    parent: Snapshot
    dropped: Mapping[str, int]
    names: tuple[str, ...]

    def funnel(self) -> list[tuple[str, str, int, int]]:
        """Rows of filter, reason, dropped and remaining samples; the parent first. Reason "-" = no dropped samples."""
        left = self.parent.samples
        rows = [("", "", 0, left)]
        for name in self.names:
            reasons = {key: count for key, count in self.dropped.items() if key.split(".")[0] == name}
            for key, count in (reasons or {f"{name}.-": 0}).items():
                left -= count
                rows.append((name, key.split(".", 1)[1], count, left))
        return rows


def filter_snapshot(
    parent: Snapshot, filters: Sequence[Filter], workers: Workers, captions_sidecar: bool = False
) -> FilterOutcome:
    """Publish the snapshot of ``parent``'s samples that pass all ``filters``.

    If the same filters already made the folder's latest snapshot from ``parent``, or from its own parent, that snapshot
    is returned. ``captions_sidecar`` writes the cleaned captions beside each tar, as the sidecar ``captions``.

    Raises:
        SettingError: no filter, a repeated filter, or invalid options.
        DataError: a shard, a sidecar or a list that a filter needs is missing or broken.
        SnapshotError: no sample is left.
        StorageError: the store failed, or another job holds the folder's lease.
    """
    _check(filters)
    options = _options(filters)
    done = _already(parent, options)
    if done is not None:
        return done
    with lease(Folder(parent.folder), "a filter run") as held:
        return _filtered(parent, held.folder, filters, options, workers, captions_sidecar)


def _filtered(
    parent: Snapshot,
    folder: Folder,
    filters: Sequence[Filter],
    options: list[dict[str, Any]],
    workers: Workers,
    captions_sidecar: bool,
) -> FilterOutcome:
    work_name = _identity(parent, options)
    work = folder.folder(FILTERS).folder(work_name)
    last = _judge_all(parent, folder, work, filters, workers)
    finish = functools.partial(_finish, folder, parent.shards, last, captions_sidecar)
    finished = run_tasks(finish, range(len(parent.shards)), workers)
    results = sorted((number, json.loads(text)) for number, text in finished)
    shards = tuple(Shard(**result["shard"]) for _, result in results if result["shard"]["samples"])
    counts = sum((Counter(result["reasons"]) for _, result in results), Counter())
    seen = sum((Counter(result["changes"]) for _, result in results), Counter())
    dropped = _in_order(counts, filters)
    if not shards:
        raise SnapshotError(f"{parent.uri}: no sample is left by the filters: {dropped}")
    snapshot = publish_shards(
        folder,
        shards,
        fields=parent.fields,
        card=parent.card,
        options={**parent.options, "filters": options, "filters_parent": parent.id, "filters_run": work_name},
        rows=parent.rows,
        dropped=dict(Counter(parent.dropped) + Counter(dropped)),
        changes={name: seen[name] for name in ("kept", "removed", "added") if seen[name]},
        parent=parent.id,
    )
    _clear(work, filters)
    return FilterOutcome(snapshot=snapshot, parent=parent, dropped=dropped, names=tuple(one.name for one in filters))


def read_reasons(snapshot: Snapshot) -> Iterator[tuple[str, pa.Table]]:
    """Shard name and reasons table of every shard of a filter run, for reports.

    Raises:
        SnapshotError: ``snapshot`` was not made by filters, or their tables were deleted.
    """
    work, parent = _work(snapshot), _origin(snapshot)
    for number, shard in enumerate(parent.shards):
        yield shard.name, _read_reasons(work.folder(REASONS), number, shard)


def read_duplicates(snapshot: Snapshot) -> Iterator[tuple[str, pa.Table]]:
    """Tables of the duplicates found by the filter run of ``snapshot``, each with the name of its filter.

    Columns: shard, index, kept_shard, kept_index: numbers of the parent's shards, and indices among their visible
    samples.
    """
    if "filters" not in snapshot.options:
        return
    work = _work(snapshot)
    for name in _filter_names(snapshot):
        folder = work.folder(name).folder("duplicates")
        yield from ((name, read_table(folder, file)) for file in folder.names(".parquet"))


def _work(snapshot: Snapshot) -> Folder:
    """The folder of the filter run that made ``snapshot``; its options, which anyone may have written, only name it."""
    # Older snapshots have the folder's whole path.
    name = snapshot.options.get("filters_run") or str(snapshot.options.get("filters_folder", "")).rpartition("/")[2]
    if not is_file_name(name):
        raise SnapshotError(f"{snapshot.uri} was not made by filters; use jobs/filter_dataset.py")
    return Folder(snapshot.folder).folder(FILTERS).folder(str(name))


def _origin(snapshot: Snapshot) -> Snapshot:
    """The snapshot that was filtered."""
    parent = snapshot.options.get("filters_parent")
    if not isinstance(parent, str) or not SNAPSHOT_ID.fullmatch(parent):
        raise SnapshotError(f"{snapshot.uri} does not say which snapshot was filtered; use jobs/filter_dataset.py")
    return read_snapshot(f"{snapshot.folder}@{parent}")


def _filter_names(snapshot: Snapshot) -> list[str]:
    listed = snapshot.options["filters"]
    names = [one.get("name") if isinstance(one, dict) else None for one in listed] if isinstance(listed, list) else [""]
    if not all(map(is_file_name, names)):
        raise SnapshotError(f"{snapshot.uri} names no filters, but {listed!r:.100}; use jobs/filter_dataset.py")
    return [str(name) for name in names]


def _check(filters: Sequence[Filter]) -> None:
    names = [one.name for one in filters]
    require(bool(names), "steps", names, "one filter or more")
    require(len(set(names)) == len(names), "steps", names, "each filter once; run the job again for a second time")
    for one in filters:
        one.check()


def _options(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    return [{"name": one.name, **flatten(one), "input_digest": one.input_digest()} for one in filters]


def _identity(parent: Snapshot, options: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([parent.id, parent.digest, options]).encode()).hexdigest()[:16]


def _already(parent: Snapshot, options: Sequence[Mapping[str, Any]]) -> FilterOutcome | None:
    """The result of an earlier run of the same filters that published the folder's latest snapshot."""
    latest = read_snapshot(parent.folder)
    if latest.options.get("filters") != options or parent.id not in (latest.id, latest.options.get("filters_parent")):
        return None
    logger.info("%s is already what these filters leave; nothing to do", latest.uri)
    origin = _origin(latest)
    names = tuple(str(one["name"]) for one in options)
    new = Counter(latest.dropped) - Counter(origin.dropped)
    return FilterOutcome(snapshot=latest, parent=origin, dropped=dict(new), names=names)


def _judge_all(parent: Snapshot, folder: Folder, work: Folder, filters: Sequence[Filter], workers: Workers) -> Folder:
    """Apply all filters in turn; returns the folder of the final reasons."""
    before: Folder | None = None
    groups = list(_passes(filters))
    for number, group in enumerate(groups):
        names = "-".join(one.name for one in group)
        last = number == len(groups) - 1
        place = work.folder(group[0].name)
        step = Step(folder, parent.shards, place, before, workers)
        logger.info("filters %s over %d shards", names.replace("-", ", "), len(parent.shards))
        group[0].prepare(step)
        target = work.folder(REASONS) if last else place.folder(REASONS)
        judge = functools.partial(_judge, step, tuple(group), target)
        for _ in run_tasks(judge, range(len(parent.shards)), workers):
            pass
        before = target
    assert before is not None
    return before


def _clear(work: Folder, filters: Sequence[Filter]) -> None:
    """Delete intermediate tables, which can be as large as the sidecars they are made from."""
    for one in filters:
        for name in one.scratch:
            work.folder(one.name).delete_folder(name)


def _passes(filters: Sequence[Filter]) -> Iterator[list[Filter]]:
    """Groups of consecutive filters that share a pass: only the first of a pass may need a global view."""
    group: list[Filter] = []
    for one in filters:
        if group and one.looks_at_all():
            yield group
            group = []
        group.append(one)
    yield group


def _judge(step: Step, group: tuple[Filter, ...], target: Folder, number: int) -> str:
    """Write the reasons for one shard: those of earlier passes, then of this pass's filters in turn."""
    if target.exists(table_file(number)):
        return ""
    shard = step.shards[number]
    reasons, times = _known(step, number)
    view = step.view(number)
    for one in group:
        verdict = one.judge(view, step)
        if verdict.times is not None:
            times[view.positions] *= verdict.times
        keep = np.ones(len(view), bool)
        for reason, drop in verdict.drops.items():
            reasons[view.positions[drop & keep]] = f"{one.name}.{reason}"
            keep &= ~drop
        view = view.narrowed(keep)
    times[reasons != ""] = 0
    keys = ShardView(step.folder, shard).keys()
    columns = {"key": pa.array(keys, pa.string()), "reason": pa.array(reasons, pa.string()).dictionary_encode()}
    write_table(target, table_file(number), pa.table({**columns, "times": pa.array(times, pa.int32())}))
    return ""


def _read_reasons(folder: Folder, number: int, shard: Shard) -> pa.Table:
    """The table of reasons of a shard, one row per visible sample; raises ``DataError`` for any other table."""
    file = table_file(number)
    try:
        table = read_table(folder, file).cast(REASON_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{folder.join(file)} is missing or damaged ({error}); delete it and filter again") from error
    whole = not any(column.null_count for column in table.columns)
    if len(table) != shard.samples or not whole or (table["times"].to_numpy() < 0).any():
        raise DataError(f"{folder.join(file)} does not fit the {shard.samples} samples of {shard.tar}")
    return table


def _known(step: Step, number: int) -> tuple[Any, Any]:
    if step.before is None:
        samples = step.shards[number].samples
        return np.full(samples, "", object), np.ones(samples, np.int32)
    table = _read_reasons(step.before, number, step.shards[number])
    return np.array(table["reason"].to_pylist(), object), table["times"].to_numpy().copy()


def _finish(folder: Folder, shards: tuple[Shard, ...], reasons: Folder, captions: bool, number: int) -> str:
    """The shard of the new snapshot with its counts, as JSON."""
    shard = shards[number]
    table = _read_reasons(reasons, number, shard)
    times = table["times"].to_numpy()
    left = select(folder, shard, np.repeat(np.arange(shard.samples), times)) if shard.samples else shard
    if captions and left.samples:
        left = _with_captions(folder, left)
    counts = Counter(reason for reason in table["reason"].to_pylist() if reason)
    kept = int((times > 0).sum())
    changes = {"kept": kept, "removed": shard.samples - kept, "added": int(times.sum()) - kept}
    return json.dumps({"shard": asdict(left), "reasons": counts, "changes": changes})


def _with_captions(folder: Folder, shard: Shard) -> Shard:
    """``shard`` with a sidecar of the cleaned captions of all samples in its tar."""
    whole = ShardView(folder, replace(shard, samples=shard.stored, selection=""))
    table = pa.table({"key": pa.array(whole.keys(), pa.string()), "caption": pa.array(whole.captions(), pa.string())})
    digest = write_sidecar(folder, shard, CAPTIONS, table, maker="ftfy")
    return replace(shard, sidecars={**shard.sidecars, CAPTIONS: digest})


def _in_order(counts: Counter[str], filters: Sequence[Filter]) -> dict[str, int]:
    place = {one.name: number for number, one in enumerate(filters)}
    return {key: counts[key] for key in sorted(counts, key=lambda key: (place[key.split(".")[0]], key))}
