"""Run a function once per unit of work, here or as Ray Data tasks.

The function takes the number of its unit, writes its own files and gives back a small text; no picture travels through
Ray. It has to find its work already done where an earlier run did it. Used by the stages that read snapshots.
"""

import base64
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.errors import ClipmillError
from pipeline.stages.ray_session import connect
from pipeline.stages.refresh import Workers, _data_resource


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
    processes = workers.processes_count and min(workers.processes_count, count)
    # One block per unit: Ray Data then retries, places and counts work by the unit.
    dataset = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
    results = dataset.map_batches(
        _Run(task),
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=processes),
        resources=_data_resource(dict(ray.cluster_resources())),
    )
    for batch in results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for number, text, error in zip(batch["number"], batch["text"], batch["error"], strict=True):
            if error:
                raise pickle.loads(base64.b64decode(error))
            yield int(number), str(text)


class _Run:
    """The function of the Ray Data tasks: a batch of numbers to a batch of texts.

    Our own errors travel beside the texts: Ray wraps what a task raises, and may lose the original on the way.
    """

    def __init__(self, task: Callable[[int], str]) -> None:
        self._task = task

    def __call__(self, batch: Any) -> Any:
        results = [self._try(int(number)) for number in batch["number"]]
        texts, errors = (np.array(part, dtype=object) for part in zip(*results, strict=True))
        return {"number": batch["number"], "text": texts, "error": errors}

    def _try(self, number: int) -> tuple[str, str]:
        try:
            return self._task(number), ""
        except ClipmillError as error:
            return "", base64.b64encode(pickle.dumps(error)).decode()
