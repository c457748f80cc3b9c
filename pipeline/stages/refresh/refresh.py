"""A source becomes a snapshot: plan the shards, make them as Ray tasks, publish what came out.

Each task gets one unit of work, writes its own files and gives back a small row of counts; no image travels through
Ray. A task whose worker dies is run again by Ray; a killed job is run again by its user, and finds its whole shards.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import flatten, from_json, to_json
from pipeline.shards.lease import Lease, lease
from pipeline.shards.snapshot import Snapshot, publish
from pipeline.shards.storage import Folder
from pipeline.shards.writer import ShardStats
from pipeline.sources.source import Classed, Source
from pipeline.stages.refresh.make_shard import ShardOptions, make_shard
from pipeline.stages.refresh.plan import Plan, Unit, make_plan
from pipeline.stages.refresh.progress import Floor, Progress
from pipeline.stages.refresh.purge import finish_purge, purge
from pipeline.stages.refresh.renewal import Renewal, prepare, publish_renewal
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

FROM_NOTHING = Renewal()
NO_FLOOR = Floor()


def refresh(
    source: Source,
    folder: Folder,
    options: ShardOptions,
    workers: Workers,
    card: str | None = None,
    *,
    renewal: Renewal = FROM_NOTHING,
    floor: Floor = NO_FLOOR,
) -> Snapshot:
    """Bring ``source`` into ``folder`` and publish the snapshot; shards that are already whole are kept.

    With a ``renewal`` the folder's newest snapshot is taken over, and only what differs from it is fetched; where
    nothing differs nothing is written, and that snapshot is given back.

    Raises:
        SettingError: the input is missing or empty, or the folder holds other work.
        StorageError: the disk is full or the store refused (the same command goes on from there), or another job is at
            work in the folder.
        DataError: what the folder holds is damaged.
        SnapshotError: no row became a sample.
        TooManyFailures: fewer rows than ``floor`` wants became samples.
    """
    with lease(folder, "a refresh") as held:
        if finish_purge(folder, workers) or (renewal.asked and not renewal.begins(folder)):
            return _renew(source, folder, options, workers, card, renewal, floor, held)
        return _first(source, folder, options, workers, card, renewal, floor, held)


def _first(
    source: Source,
    folder: Folder,
    options: ShardOptions,
    workers: Workers,
    card: str | None,
    renewal: Renewal,
    floor: Floor,
    held: Lease,
) -> Snapshot:
    shaping = shaping_options(options)
    plan = make_plan(source, folder, options.number_sample_per_shard, shaping, replace=renewal.asked)
    folder.remove_temporary()
    stats = _finished_shards(plan, source, folder, options, workers, floor)
    held.check()
    snapshot = publish(folder, stats, card=card, options=_told(source, shaping))
    logger.info("snapshot %s: %d samples in %d shards", snapshot.uri, snapshot.samples, len(snapshot.shards))
    return snapshot


def _renew(
    source: Source,
    folder: Folder,
    options: ShardOptions,
    workers: Workers,
    card: str | None,
    renewal: Renewal,
    floor: Floor,
    held: Lease,
) -> Snapshot:
    shaping = shaping_options(options)
    prepared = prepare(source, folder, options, shaping, renewal, workers)
    if isinstance(prepared, Snapshot):
        snapshot = prepared
    else:
        folder.remove_temporary()
        stats = _finished_shards(prepared.plan, prepared.source, folder, options, workers, floor)
        held.check()
        snapshot = publish_renewal(prepared, folder, stats, card, _told(source, shaping))
        logger.info("snapshot %s: %d samples; %s", snapshot.uri, snapshot.samples, dict(snapshot.changes))
    return purge(folder, snapshot, workers) if renewal.purge else snapshot


def _finished_shards(
    plan: Plan, source: Source, folder: Folder, options: ShardOptions, workers: Workers, floor: Floor
) -> list[ShardStats]:
    logger.info("%d rows in %d shards -> %s", plan.rows, len(plan.units), folder.uri)
    progress = Progress(plan.rows, floor)
    stats = [progress.seen(one) for one in _made(plan, source, folder, options, workers)]
    folder.remove_temporary()
    progress.finish()
    return stats


def _told(source: Source, shaping: Mapping[str, Any]) -> dict[str, Any]:
    """What the snapshot says of how it was made."""
    classes = {"classes": dict(source.classes)} if isinstance(source, Classed) else {}
    return {"source": flatten(source), **shaping, **classes}


def shaping_options(options: ShardOptions) -> dict[str, Any]:
    """The options that change what a shard holds; how fast and how often to try are left out."""
    return {**flatten(options.images), "compute_hash": options.downloads.compute_hash}


def _made(plan: Plan, source: Source, folder: Folder, options: ShardOptions, workers: Workers) -> Iterator[ShardStats]:
    tasks = run_tasks(_MakeShards(source, folder, options), plan.units, workers)
    return (from_json(ShardStats, text) for _, text in tasks)


class _MakeShards:
    """The task: a unit of the plan to its stats."""

    def __init__(self, source: Source, folder: Folder, options: ShardOptions) -> None:
        self._source, self._folder, self._options = source, folder, options

    def __call__(self, unit: Unit) -> str:
        return to_json(make_shard(unit, self._source, self._folder, self._options))
