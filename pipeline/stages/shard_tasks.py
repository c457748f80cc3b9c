"""Run a function once per unit of work, here or as Ray tasks.

The function takes its unit, writes its own files and gives back a small text; no image travels through Ray. It has
to find its work already done where an earlier run did it, so that a task whose node dies is simply run again. Every
stage that works by the shard runs through here.
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
"""Times that a unit is run again because its worker or node died."""
SPARE = 8
DATA_RESOURCE = "data_worker"
"""What the data nodes of cluster.yaml have, and tasks ask for."""

Unit = TypeVar("Unit")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where the units run. ``processes_count`` 0 makes the shards in this process, without Ray."""

    processes_count: int | None = None
    """Shards made at a time; None for as many as the cluster has CPUs, 0 for this process without a cluster."""

    def __post_init__(self) -> None:
        ok = self.processes_count is None or self.processes_count >= 0
        require(ok, "processes_count", self.processes_count, "0 or more")


def run_tasks(
    task: Callable[[Unit], str], units: Sequence[Unit], workers: Workers, gpus: float = 0.0
) -> Iterator[tuple[int, str]]:
    """``(number, task(units[number]))`` for all units, in any order; lazily. ``task`` and units have to pickle.

    ``gpus`` is the part of a GPU that each unit gets as a task, 0 to 1; units with none stay away from GPU nodes.

    Raises:
        ClipmillError: what a task raised, as it raised it.
    """
    if workers.processes_count == 0:
        yield from ((number, task(unit)) for number, unit in enumerate(units))
    elif units:
        yield from _run_by_ray(task, units, workers, gpus)


def data_resource(cluster: dict[str, float]) -> dict[str, float] | None:
    """Ask for the data nodes of cluster.yaml where the cluster has such nodes, so that GPU nodes are left alone."""
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
    """A unit's text, or our own error beside it: Ray wraps what a task raises, and may lose the original on the way."""
    try:
        return task(unit), b""
    except ClipmillError as error:
        return "", pickle.dumps(error)


def _result(done: Any, number: int) -> str:
    import ray

    try:
        text, error = ray.get(done)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as death:
        died = f"unit {number} took its worker with it {MAX_DEATHS + 1} times ({str(death).splitlines()[0]})"
        raise StorageError(f"{died}: give the workers more memory, or fewer a node") from death
    if error:
        raise pickle.loads(error)
    return str(text)


def _window(workers: Workers, cluster: Mapping[str, float]) -> int:
    """How many units Ray has at a time: one for each CPU, and some that wait, for which an autoscaler starts nodes."""
    if workers.processes_count is not None:
        return workers.processes_count
    return 2 * int(cluster.get("CPU", 1)) + SPARE


def _name_of(task: object) -> str:
    """What Ray's dashboard calls the tasks, and counts their progress by."""
    inner = getattr(task, "func", task)
    return str(getattr(inner, "__name__", type(inner).__name__)).lstrip("_")
