"""Units of work in this process and as Ray tasks: every unit once, original errors, reruns after deaths."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SampleError, StorageError
from pipeline.stages import shard_tasks
from pipeline.stages.shard_tasks import Workers, run_tasks

TWO = Workers(processes_count=2)


def squared(number: int) -> str:
    return str(number * number)


def noted(folder: Path, number: int) -> str:
    """Report that the unit has begun; the first takes longer than the others."""
    (folder / f"{number}-{os.getpid()}").touch()
    time.sleep(1.0 if number == 0 else 0.05)
    return ""


def refuses(number: int) -> str:
    if number == 3:
        raise SampleError("failed_to_resize", "decode", "number three", http_status=418, attempts=2)
    return ""


def dies(folder: Path, times: int, number: int) -> str:
    """Unit 1 kills its process the given number of times."""
    if number == 1 and len(list(folder.iterdir())) < times:
        (folder / str(time.monotonic_ns())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return str(number)


@pytest.mark.parametrize("workers", [Workers(processes_count=0), TWO, Workers()])
def test_every_unit_once(workers: Workers, ray_cluster: Any) -> None:
    found = sorted(run_tasks(squared, range(40), workers))
    assert found == [(number, str(number * number)) for number in range(40)]
    assert list(run_tasks(squared, [], workers)) == []


def test_as_many_at_a_time_as_asked_and_none_waits_for_a_slow_one(ray_cluster: Any, tmp_path: Path) -> None:
    order = [number for number, _ in run_tasks(partial(noted, tmp_path), range(8), TWO)]
    assert order[-1] == 0 or order.index(0) > 1
    processes = {path.name.split("-")[1] for path in tmp_path.iterdir()}
    assert len(processes) == 2


@pytest.mark.parametrize("workers", [Workers(processes_count=0), TWO])
def test_our_errors_come_as_they_were_raised(workers: Workers, ray_cluster: Any) -> None:
    with pytest.raises(SampleError, match="number three") as caught:
        list(run_tasks(refuses, range(10), workers))
    assert (caught.value.error_class, caught.value.http_status, caught.value.attempts) == ("decode", 418, 2)


def test_who_stops_listening_stops_the_work(ray_cluster: Any, tmp_path: Path) -> None:
    tasks = run_tasks(partial(noted, tmp_path), range(1000), TWO)
    next(tasks)
    tasks.close()
    time.sleep(0.5)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == begun < 20


def test_a_worker_that_dies_costs_nothing(ray_cluster: Any, tmp_path: Path) -> None:
    assert sorted(run_tasks(partial(dies, tmp_path, 2), range(4), TWO)) == [(n, str(n)) for n in range(4)]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_unit_that_always_kills_its_worker_is_named(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_tasks, "MAX_DEATHS", 1)
    with pytest.raises(StorageError, match="the worker of unit 1 died 2 times"):
        list(run_tasks(partial(dies, tmp_path, 100), range(4), TWO))
