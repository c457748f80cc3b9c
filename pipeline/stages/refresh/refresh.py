"""Make a snapshot from a source: plan the shards, make them as Ray tasks, publish the snapshot.

Each task gets one unit of work, writes its own files and returns a small record of counts; no image passes through Ray.
Ray reruns a task whose worker died. A killed job can be run again; it reuses its finished shards.
"""

import logging
from dataclasses import replace

from pipeline.config import from_json, to_json
from pipeline.shards.lease import lease
from pipeline.shards.snapshot import Snapshot, publish
from pipeline.shards.storage import Folder
from pipeline.shards.writer import ShardStats
from pipeline.sources.source import Source
from pipeline.stages.refresh.make_shard import ShardOptions, make_shard
from pipeline.stages.refresh.plan import RefreshPlan, Unit, make_plan, remake_incomplete
from pipeline.stages.refresh.progress import Floor, Progress
from pipeline.stages.refresh.purge import finish_purge, purge
from pipeline.stages.refresh.renewal import prepare, publish_renewal
from pipeline.stages.refresh.settings import FROM_NOTHING, NO_FLOOR, RefreshJob, Renewal
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)


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
    """Write ``source`` to ``folder`` and publish the snapshot; finished shards are kept.

    With a ``renewal`` the samples of the folder's newest snapshot are kept, and only differences to it are fetched.
    Without differences nothing is written, and that snapshot is returned.

    Raises:
        SettingError: the input is missing or empty, or the folder holds the work of another plan.
        StorageError: the disk is full or the store failed (run the same command to continue), or another job holds the
            folder's lease.
        DataError: the folder's files are damaged.
        SnapshotError: no row became a sample.
        TooManyFailures: the fraction of samples is below ``floor``.
    """
    job = RefreshJob(
        source=source, folder=folder, options=options, workers=workers, card=card, renewal=renewal, floor=floor
    )
    with lease(folder, "a refresh") as held:
        job = replace(job, folder=held.folder)
        if finish_purge(job.folder, workers) or (renewal.asked and not renewal.begins(job.folder)):
            return _renew(job)
        return _first(job)


def _first(job: RefreshJob) -> Snapshot:
    rows_per_shard = job.options.number_sample_per_shard
    plan = make_plan(job.source, job.folder, rows_per_shard, job.shaping, replace=job.renewal.asked)
    stats = _finished_shards(job, plan)
    snapshot = publish(job.folder, stats, card=job.card, options=job.recorded)
    logger.info("snapshot %s: %d samples in %d shards", snapshot.uri, snapshot.samples, len(snapshot.shards))
    return snapshot


def _renew(job: RefreshJob) -> Snapshot:
    prepared = prepare(job)
    if isinstance(prepared, Snapshot):
        snapshot = prepared
    else:
        stats = _finished_shards(replace(job, source=prepared.source), prepared.plan)
        snapshot = publish_renewal(job, prepared, stats)
        logger.info("snapshot %s: %d samples; %s", snapshot.uri, snapshot.samples, dict(snapshot.changes))
    return purge(job.folder, snapshot, job.workers) if job.renewal.purge else snapshot


def _finished_shards(job: RefreshJob, plan: RefreshPlan) -> list[ShardStats]:
    logger.info("%d rows in %d shards -> %s", plan.rows, len(plan.units), job.folder.uri)
    remake_incomplete(job.folder, plan)
    progress = Progress(plan.rows, job.floor)
    tasks = run_tasks(_MakeShards(job), plan.units, job.workers)
    stats = [progress.seen(from_json(ShardStats, text)) for _, text in tasks]
    progress.finish()
    return stats


class _MakeShards:
    """The task: makes the shard of one unit and returns its stats."""

    def __init__(self, job: RefreshJob) -> None:
        self._source, self._folder, self._options = job.source, job.folder, job.options

    def __call__(self, unit: Unit) -> str:
        return to_json(make_shard(unit, self._source, self._folder, self._options))
