"""Run a function once per unit of work, here or as Ray Data tasks.

The function takes the number of its unit, writes its own files and gives back a small text; no picture travels through
Ray. It has to find its work already done where an earlier run did it. Used by the stages that read snapshots.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.stages.ray_session import connect
from pipeline.stages.refresh import Workers, _data_resource, _own_error


def run_tasks(task: Callable[[int], str], count: int, workers: Workers) -> Iterator[tuple[int, str]]:
    """``(number, task(number))`` for the numbers below ``count``, in any order; lazily.

    Raises:
        ClipmillError: what a task raised, as it raised it.
    """
    if workers.processes_count == 0:
        yield from ((number, task(number)) for number in range(count))
    elif count:
        yield from _run_by_ray(task, count, workers)


def _run_by_ray(task: Callable[[int], str], count: int, workers: Workers) -> Iterator[tuple[int, str]]:
    import ray

    connect(workers.processes_count)
    # One block per unit: Ray Data then retries, places and counts work by the unit.
    dataset = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
    results = dataset.map_batches(
        _Run(task),
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=workers.processes_count),
        resources=_data_resource(dict(ray.cluster_resources())),
    )
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield from zip(map(int, batch["number"]), map(str, batch["text"]), strict=True)
    except Exception as error:
        # Ray wraps what a task raised, sometimes twice; the user is to see our sentence.
        raise _own_error(error) or error from error


class _Run:
    """The function of the Ray Data tasks: a batch of numbers to a batch of texts."""

    def __init__(self, task: Callable[[int], str]) -> None:
        self._task = task

    def __call__(self, batch: Any) -> Any:
        texts = [self._task(int(number)) for number in batch["number"]]
        return {"number": batch["number"], "text": np.array(texts, dtype=object)}
