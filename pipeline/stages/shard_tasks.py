"""Run a function once per unit of work, in this process or as Ray tasks.

The function takes its unit, writes its own files and returns a short string; no image passes through Ray. It must be
idempotent: it finds the finished work of an earlier run, so Ray can rerun a task whose node died. All stages that work
per shard use this module.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config import require
from pipeline.errors import ClipmillError, StorageError
from pipeline.stages.ray_session import connect

MAX_DEATHS = 10
"""Largest number of reruns of a unit whose worker or node died."""
SPARE = 8
DATA_RESOURCE = "data_worker"
"""Custom resource of the data nodes in cluster.yaml, requested by tasks."""

Unit = TypeVar("Unit")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Placement of the units. With ``processes_count`` 0 they run in this process, without Ray."""

    processes_count: int | None = None
    """Number of shards made at the same time; None = one per CPU of the cluster, 0 = in this process without Ray."""

    def __post_init__(self) -> None:
        ok = self.processes_count is None or self.processes_count >= 0
        require(ok, "processes_count", self.processes_count, "0 or more")


def run_tasks(
    task: Callable[[Unit], str], units: Sequence[Unit], workers: Workers, gpus: float = 0.0
) -> Iterator[tuple[int, str]]:
    """Yield ``(number, task(units[number]))`` for all units, in order of completion. ``task`` and units are picklable.

    ``gpus`` is the fraction of a GPU per task, 0 to 1; tasks without a GPU avoid GPU nodes.

    Raises:
        ClipmillError: the original exception of a task.
    """
    if workers.processes_count == 0:
        yield from ((number, task(unit)) for number, unit in enumerate(units))
    elif units:
        yield from _run_by_ray(task, units, workers, gpus)


def data_resource(cluster: dict[str, float]) -> dict[str, float] | None:
    """Request the data nodes of cluster.yaml if the cluster has such nodes, so that GPU nodes stay free."""
    return {DATA_RESOURCE: 0.001} if DATA_RESOURCE in cluster else None


def _run_by_ray(
    task: Callable[[Unit], str], units: Sequence[Unit], workers: Workers, gpus: float
) -> Iterator[tuple[int, str]]:
    import ray

    connect(workers.processes_count)
    cluster = dict(ray.cluster_resources())
    place = {"num_gpus": gpus} if gpus else {"resources": data_resource(cluster)}
    options = {"num_cpus": 1, **place, "max_retries": MAX_DEATHS, "name": _name_of(task)}
    run: Any = ray.remote(_attempt).options(**options)
    shared, waiting = ray.put(task), iter(enumerate(units))
    running: dict[Any, int] = {}
    try:
        while True:
            room = _window(workers, dict(ray.cluster_resources())) - len(running)
            running |= {run.remote(shared, unit): number for number, unit in itertools.islice(waiting, max(room, 0))}
            if not running:
                return
            for done in ray.wait(list(running))[0]:
                number = running.pop(done)
                yield number, _result(done, number)
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _attempt(task: Callable[[Any], str], unit: Any) -> tuple[str, bytes]:
    """A unit's result, or our own error as a value: Ray wraps the exceptions of tasks, and may lose the original."""
    try:
        return task(unit), b""
    except ClipmillError as error:
        return "", pickle.dumps(error)


def _result(done: Any, number: int) -> str:
    import ray

    try:
        text, error = ray.get(done)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as death:
        died = f"the worker of unit {number} died {MAX_DEATHS + 1} times ({str(death).splitlines()[0]})"
        raise StorageError(f"{died}: give the workers more memory, or run fewer per node") from death
    if error:
        raise pickle.loads(error)
    return str(text)


def _window(workers: Workers, cluster: Mapping[str, float]) -> int:
    """Number of units submitted to Ray at a time: one per CPU, and some pending ones, so an autoscaler adds nodes."""
    if workers.processes_count is not None:
        return workers.processes_count
    return 2 * int(cluster.get("CPU", 1)) + SPARE


def _name_of(task: object) -> str:
    """Name of the tasks in Ray's dashboard."""
    inner = getattr(task, "func", task)
    return str(getattr(inner, "__name__", type(inner).__name__)).lstrip("_")
