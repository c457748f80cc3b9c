"""Evaluations beside the training: found, done once, tried again, finished after a restart."""

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.clip import Clip
from pipeline.training.checkpoint import Checkpoint, Checkpoints, EvaluationRecord, Meta, read_evaluation
from pipeline.training.follow import Follower
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.submit import as_ray_task


class Run:
    """A run folder in which checkpoints appear."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints = str(folder), Checkpoints(str(folder))
        self.method = Clip(Clip.smallest())
        self.optimizer = make_optimizer(AdamW(), self.method)
        self.recorded: list[tuple[int, dict[str, float]]] = []

    def save(self, step: int, evaluate: bool = True) -> Checkpoint:
        meta = Meta(step=step, samples_seen=step, batch_size=1, lanes=1, seed=0, snapshot="d" * 64, evaluate=evaluate)
        return self.checkpoints.save(self.method, self.optimizer, meta)

    def record(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        assert uri == self.checkpoints.at(step).uri
        self.recorded.append((step, dict(metrics)))

    def follower(self, evaluate: Any, submit: Any = None) -> Follower:
        return Follower(self.folder, evaluate, self.record, submit or in_a_thread, poll_seconds=0.02)


class _Thread:
    """Stands in for a process or a Ray task."""

    def __init__(self, work: Any) -> None:
        self.outcome: Any = None
        self.cancelled = False
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Any) -> None:
        try:
            self.outcome = work()
        except Exception as error:
            self.outcome = error

    def ready(self, seconds: float) -> bool:
        self.thread.join(min(seconds, 0.02))
        return not self.thread.is_alive()

    def result(self) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


def in_a_thread(evaluate: Any, uri: str, step: int) -> _Thread:
    return _Thread(lambda: evaluate(uri, step))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_marked_checkpoints_are_evaluated_while_training_goes_on(run: Run) -> None:
    with run.follower(lambda uri, step: {"top1": step / 10}) as follower:
        for step in (1, 2, 3):
            run.save(step, evaluate=step != 2)
            time.sleep(0.1)
    assert run.recorded == [(1, {"top1": 0.1}), (3, {"top1": 0.3})]
    assert follower.results == {1: {"top1": 0.1}, 3: {"top1": 0.3}}
    evaluations = {one.meta.step: read_evaluation(one) for one in run.checkpoints.whole()}
    assert evaluations == {
        1: EvaluationRecord(step=1, metrics={"top1": 0.1}),
        2: None,
        3: EvaluationRecord(step=3, metrics={"top1": 0.3}),
    }


def test_what_a_killed_driver_left_is_done_by_the_next(run: Run) -> None:
    run.save(1)
    slow = threading.Event()
    with pytest.raises(RuntimeError, match="the driver dies"):
        with run.follower(lambda uri, step: {"top1": float(slow.wait(20))}):
            time.sleep(0.2)
            raise RuntimeError("the driver dies")
    assert run.recorded == [] and run.checkpoints.whole()[0].waits
    with run.follower(lambda uri, step: {"top1": 1.0}):
        pass
    assert run.recorded == [(1, {"top1": 1.0})]
    with run.follower(lambda uri, step: {"top1": 2.0}):
        pass
    assert len(run.recorded) == 1
    slow.set()


def test_a_failing_evaluation_is_tried_twice_and_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def evaluate(uri: str, step: int) -> dict[str, float]:
        calls.append(step)
        if step == 1 or len(calls) == 3:
            raise ValueError("out of memory")
        return {"top1": 1.0}

    run.save(1)
    run.save(2)
    with caplog.at_level(logging.WARNING), run.follower(evaluate):
        pass
    assert calls == [1, 1, 2, 2]
    assert run.recorded == [(2, {"top1": 1.0})]
    assert read_evaluation(run.checkpoints.whole()[0]) == EvaluationRecord(step=1, error="out of memory")
    assert "step-00000001 failed: out of memory" in caplog.text


@pytest.mark.parametrize("fails", [True, False])
def test_a_checkpoint_that_is_removed_while_it_is_evaluated(
    run: Run, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Is not tried again, and its folder does not come back."""
    calls: list[int] = []

    def evaluate(uri: str, step: int) -> dict[str, float]:
        calls.append(step)
        shutil.rmtree(run.checkpoints.at(1).path)
        if fails:
            raise FileNotFoundError(uri)
        return {"top1": 1.0}

    run.save(1)
    with caplog.at_level(logging.WARNING), run.follower(evaluate) as follower:
        pass
    assert calls == [1] and follower.results == ({} if fails else {1: {"top1": 1.0}})
    assert ("was removed before its evaluation ended" in caplog.text) == fails
    assert not Path(run.checkpoints.at(1).path).exists()


def test_ray_tasks(run: Run, ray_cluster: Any) -> None:
    class Evaluate:
        """An object that can be called, as evaluations with settings are."""

        def __call__(self, uri: str, step: int) -> dict[str, float]:
            return {"top1": 0.5, "step": float(step)}

    evaluate = Evaluate()
    run.save(7)
    with run.follower(evaluate, as_ray_task(num_cpus=0.5, resources={"train_worker": 0.001})):
        pass
    assert run.recorded == [(7, {"top1": 0.5, "step": 7.0})]
