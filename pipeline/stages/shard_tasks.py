"""Run a function once per unit of work, here or as Ray Data tasks.

The function takes its unit, writes its own files and gives back a small text; no picture travels through Ray. It has
to find its work already done where an earlier run did it. Every stage that works by the shard runs through here.
"""

import base64
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline.config import require
from pipeline.errors import ClipmillError
from pipeline.stages.ray_session import connect

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


def run_tasks(task: Callable[[Unit], str], units: Sequence[Unit], workers: Workers) -> Iterator[tuple[int, str]]:
    """``(number, task(units[number]))`` for all units, in any order; lazily. ``task`` and units have to pickle.

    Raises:
        ClipmillError: what a task raised, as it raised it.
    """
    if workers.processes_count == 0:
        yield from ((number, task(unit)) for number, unit in enumerate(units))
    elif units:
        yield from _run_by_ray(task, units, workers)


def data_resource(cluster: dict[str, float]) -> dict[str, float] | None:
    """Ask for the data nodes of cluster.yaml where the cluster has such nodes, so that GPU nodes are left alone."""
    return {DATA_RESOURCE: 0.001} if DATA_RESOURCE in cluster else None


def _run_by_ray(task: Callable[[Unit], str], units: Sequence[Unit], workers: Workers) -> Iterator[tuple[int, str]]:
    import ray

    connect(workers.processes_count)
    # Ray warns of a pool that is larger than the work.
    processes = workers.processes_count and min(workers.processes_count, len(units))
    # One block per unit: Ray Data then retries, places and counts work by the unit.
    rows = [{"number": number, "unit": _packed(unit)} for number, unit in enumerate(units)]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Run(task),
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=processes),
        resources=data_resource(dict(ray.cluster_resources())),
    )
    for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for number, text, error in zip(batch["number"], batch["text"], batch["error"], strict=True):
            if error:
                raise _unpacked(error)
            yield int(number), str(text)


class _Run:
    """The function of the Ray Data tasks: a batch of units to a batch of texts.

    Our own errors travel beside the texts: Ray wraps what a task raises, and may lose the original on the way.
    """

    def __init__(self, task: Callable[[Any], str]) -> None:
        self._task = task

    def __call__(self, batch: Any) -> Any:
        results = [self._try(unit) for unit in batch["unit"]]
        texts, errors = (np.array(part, dtype=object) for part in zip(*results, strict=True))
        return {"number": batch["number"], "text": texts, "error": errors}

    def _try(self, unit: str) -> tuple[str, str]:
        try:
            return self._task(_unpacked(unit)), ""
        except ClipmillError as error:
            return "", _packed(error)


def _packed(value: object) -> str:
    """As text: Ray warns of every block of Python objects, which it has to pickle."""
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpacked(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))
