"""A source becomes a snapshot: plan the shards, make them as Ray Data tasks, publish what came out.

Each task gets one unit of work, writes its own files and gives back a small row of counts; no picture travels through
Ray. A task whose worker dies is run again by Ray; a killed job is run again by its user, and finds its whole shards.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import flatten, from_json, require, to_json
from pipeline.errors import ClipmillError
from pipeline.shards.snapshot import Snapshot, publish
from pipeline.shards.storage import Folder
from pipeline.shards.writer import ShardStats
from pipeline.sources.source import Slice, Source
from pipeline.stages.make_shard import ShardOptions, make_shard
from pipeline.stages.plan import Plan, Unit, make_plan
from pipeline.stages.progress import Floor, Progress
from pipeline.stages.purge import finish_purge, purge
from pipeline.stages.ray_session import connect
from pipeline.stages.renewal import Renewal, prepare, publish_renewal

logger = logging.getLogger(__name__)

DATA_RESOURCE = "data_worker"
FROM_NOTHING = Renewal()
NO_FLOOR = Floor()


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where the units run. ``processes_count`` 0 makes the shards in this process, without Ray."""

    processes_count: int | None = None
    """Shards made at a time; None for as many as the cluster has CPUs, 0 for this process without a cluster."""

    def __post_init__(self) -> None:
        ok = self.processes_count is None or self.processes_count >= 0
        require(ok, "processes_count", self.processes_count, "0 or more")


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
        StorageError: the disk is full or the store refused; the same command goes on from there.
        DataError: what the folder holds is damaged.
        SnapshotError: no row became a sample.
        TooManyFailures: fewer rows than ``floor`` wants became samples.
    """
    shaping = shaping_options(options)
    if finish_purge(folder) or (renewal.asked and not renewal.begins(folder)):
        return _renew(source, folder, options, workers, card, renewal, floor)
    plan = make_plan(source, folder, options.number_sample_per_shard, shaping, replace=renewal.asked)
    folder.remove_temporary()
    stats = _finished_shards(plan, source, folder, options, workers, floor)
    snapshot = publish(folder, stats, card=card, options={"source": flatten(source), **shaping})
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
) -> Snapshot:
    shaping = shaping_options(options)
    prepared = prepare(source, folder, options, shaping, renewal)
    if isinstance(prepared, Snapshot):
        snapshot = prepared
    else:
        folder.remove_temporary()
        stats = _finished_shards(prepared.plan, prepared.source, folder, options, workers, floor)
        options_kept = {"source": flatten(source), **shaping}
        snapshot = publish_renewal(prepared, folder, stats, card, options_kept)
        logger.info("snapshot %s: %d samples; %s", snapshot.uri, snapshot.samples, dict(snapshot.changes))
    return purge(folder, snapshot) if renewal.purge else snapshot


def _finished_shards(
    plan: Plan, source: Source, folder: Folder, options: ShardOptions, workers: Workers, floor: Floor
) -> list[ShardStats]:
    logger.info("%d rows in %d shards -> %s", plan.rows, len(plan.units), folder.uri)
    progress = Progress(plan.rows, floor)
    stats = [progress.seen(one) for one in _made(plan, source, folder, options, workers)]
    folder.remove_temporary()
    progress.finish()
    return stats


def shaping_options(options: ShardOptions) -> dict[str, Any]:
    """The options that change what a shard holds; how fast and how often to try are left out."""
    return {**flatten(options.images), "compute_hash": options.downloads.compute_hash}


def _made(plan: Plan, source: Source, folder: Folder, options: ShardOptions, workers: Workers) -> Iterator[ShardStats]:
    if workers.processes_count == 0 or not plan.units:
        return (make_shard(unit, source, folder, options) for unit in plan.units)
    return _made_by_ray(plan, source, folder, options, workers)


def _made_by_ray(
    plan: Plan, source: Source, folder: Folder, options: ShardOptions, workers: Workers
) -> Iterator[ShardStats]:
    import ray

    connect(workers.processes_count)
    # One block per unit: Ray Data then retries, places and counts work by the shard.
    rows = [dataclasses.asdict(unit) for unit in plan.units]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _MakeShards(source, folder, options),
        batch_size=1,
        batch_format="pandas",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=workers.processes_count),
        resources=_data_resource(dict(ray.cluster_resources())),
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pandas", prefetch_batches=0):
            yield from (from_json(ShardStats, text) for text in batch["stats"])
    except Exception as error:
        # Ray wraps what a task raised, sometimes twice; the user is to see our sentence.
        raise _own_error(error) or error from error


class _MakeShards:
    """The function of the Ray Data tasks: a batch of unit rows to a batch of stats."""

    def __init__(self, source: Source, folder: Folder, options: ShardOptions) -> None:
        self._source, self._folder, self._options = source, folder, options

    def __call__(self, batch: Any) -> Any:
        stats = []
        for row in batch.to_dict("records"):
            unit = Unit(shard_id=int(row["shard_id"]), piece=Slice(**row["piece"]), digest=row["digest"])
            stats.append(to_json(make_shard(unit, self._source, self._folder, self._options)))
        # As text: Ray warns of every block of Python objects, which it has to pickle.
        return {"stats": np.array(stats, dtype=object)}


def _data_resource(cluster: dict[str, float]) -> dict[str, float] | None:
    """Ask for the data nodes of cluster.yaml where the cluster has such nodes, so that GPU nodes are left alone."""
    return {DATA_RESOURCE: 0.001} if DATA_RESOURCE in cluster else None


def _own_error(error: BaseException | None) -> ClipmillError | None:
    while error is not None:
        if isinstance(error, ClipmillError):
            return error
        cause = getattr(error, "cause", None)
        if isinstance(cause, ClipmillError):
            return cause
        error = error.__cause__ or (cause if isinstance(cause, BaseException) else None)
    return None
