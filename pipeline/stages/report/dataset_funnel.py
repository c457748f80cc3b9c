"""The funnel from input rows to visible samples, and the changes of a snapshot against its parent."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.errors import SnapshotError
from pipeline.shards.selection import read_selection
from pipeline.shards.snapshot import Shard, Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.crawl.download import ERROR_CLASSES
from pipeline.stages.report.dataset_statistics import Statistics

DOWNLOAD, RESIZE, FILTER = "failed_to_download", "failed_to_resize", "filtered"
UNRECORDED = "hidden by a selection, reason not recorded"
THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Reason:
    """``count`` rows or samples were lost at a step; ``step`` is an img2dataset status or ``filtered``."""

    step: str
    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """Non-increasing counts from ``rows`` to ``visible``, and the losses in between.

    ``repeated`` counts repeats of visible samples; ``surplus`` is positive if a folder holds more samples than its rows
    account for, as with shards made by other tools.
    """

    rows: int
    downloaded: int
    resized: int
    kept: int
    visible: int
    repeated: int
    surplus: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, kw_only=True)
class SnapshotDifference:
    """The changes of a snapshot. Samples in a rewritten tar count as removed and added."""

    parent: str
    unchanged: int
    changed: int
    added: int
    removed: int
    samples_added: int
    samples_removed: int
    sidecars_added: tuple[str, ...]
    recorded: Mapping[str, int]


def funnel(snapshot: Snapshot, statistics: Statistics) -> Funnel:
    """The funnel from input rows to visible samples, by the snapshot's counts; the steps are from the shards."""
    reasons = [part for name, count in snapshot.dropped.items() for part in _split(name, count, statistics.reasons)]
    lost: Counter[str] = Counter()
    for reason in reasons:
        lost[reason.step] += reason.count
    downloaded = snapshot.rows - lost[DOWNLOAD]
    resized = downloaded - lost[RESIZE]
    kept = resized - lost[FILTER]
    hidden = kept - statistics.unique
    reasons += [Reason(step=FILTER, name=UNRECORDED, count=hidden)] if hidden > 0 else []
    return Funnel(
        rows=snapshot.rows,
        downloaded=downloaded,
        resized=resized,
        kept=min(kept, statistics.unique) if hidden > 0 else kept,
        visible=statistics.unique,
        repeated=statistics.visible - statistics.unique,
        surplus=max(-hidden, 0),
        reasons=tuple(sorted(reasons, key=lambda one: (-one.count, one.step, one.name))),
    )


def difference(snapshot: Snapshot) -> SnapshotDifference | None:
    """The changes of ``snapshot`` against its parent; ``None`` without a parent, or if it was deleted.

    Raises:
        DataError: a selection is missing or damaged.
    """
    if snapshot.parent is None:
        return None
    try:
        parent = read_snapshot(f"{snapshot.folder}@{snapshot.parent}")
    except SnapshotError:
        return None
    before = {shard.name: shard for shard in parent.shards}
    after = {shard.name: shard for shard in snapshot.shards}
    both = [(before[name], after[name]) for name in sorted(before.keys() & after.keys())]
    folder = Folder(snapshot.folder)
    with ThreadPoolExecutor(THREADS) as pool:
        moved = list(pool.map(lambda pair: _moved(folder, *pair), both))
    same = [_readers_see(old) == _readers_see(new) for old, new in both]
    gone, fresh = before.keys() - after.keys(), after.keys() - before.keys()
    return SnapshotDifference(
        parent=parent.id,
        unchanged=sum(same),
        changed=len(both) - sum(same),
        added=len(fresh),
        removed=len(gone),
        samples_added=sum(added for added, _ in moved) + sum(after[name].samples for name in fresh),
        samples_removed=sum(removed for _, removed in moved) + sum(before[name].samples for name in gone),
        sidecars_added=tuple(sorted(_sidecars(snapshot) - _sidecars(parent))),
        recorded=dict(snapshot.changes),
    )


def _split(name: str, count: int, seen: Mapping[str, int]) -> list[Reason]:
    """One dropped class as reasons by step: from the shards' rows, the rest at the usual step of the class.

    Rows of shards without samples are in no shard of the snapshot, and downloader and decoder share some names.
    """
    parts: list[Reason] = []
    for step in (DOWNLOAD, RESIZE):
        part = min(seen.get(f"{step}/{name}", 0), count - sum(one.count for one in parts))
        parts += [Reason(step=step, name=name, count=part)] if part else []
    rest = count - sum(one.count for one in parts)
    step = parts[0].step if parts else DOWNLOAD if name in ERROR_CLASSES else FILTER
    if rest and parts:
        parts[0] = Reason(step=step, name=name, count=parts[0].count + rest)
    elif rest:
        parts = [Reason(step=step, name=name, count=rest)]
    return parts


def _readers_see(shard: Shard) -> tuple[str, str]:
    return shard.sha256, shard.selection


def _moved(folder: Folder, old: Shard, new: Shard) -> tuple[int, int]:
    """Numbers of added and removed samples between two versions of a shard, with repeats."""
    if old.sha256 != new.sha256:
        return new.samples, old.samples
    if old.selection == new.selection:
        return 0, 0
    times = []
    for shard in (old, new):
        indices = read_selection(folder, shard)
        ones = np.ones(shard.stored, np.int64)
        times.append(ones if indices is None else np.bincount(indices, minlength=shard.stored))
    change = times[1] - times[0]
    return int(change[change > 0].sum()), int(-change[change < 0].sum())


def _sidecars(snapshot: Snapshot) -> set[str]:
    return {name for shard in snapshot.shards for name in shard.sidecars}
