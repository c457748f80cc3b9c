"""Evaluations beside the training: a thread of the driver that watches for checkpoints which wait for one.

A checkpoint waits from when it is written with ``evaluate`` until it has an ``evaluation.json``. So nothing is lost
when a driver is killed: the next start finds what still waits. The evaluation itself runs elsewhere (a Ray task, or a
process of its own), one at a time, and the training ranks never stop for it.
"""

import json
import logging
import multiprocessing
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

from pipeline.errors import ClipmillError
from pipeline.training.checkpoint import Checkpoint, Checkpoints, write_evaluation

logger = logging.getLogger(__name__)

Evaluate = Callable[[str, int], Mapping[str, float]]
"""Evaluates the checkpoint at a URI, made at a step: metric names and values. It pickles."""

Record = Callable[[str, int, Mapping[str, float]], None]
"""Takes the results of the checkpoint at a URI, at its step; may be called again for the same one after a kill."""

ATTEMPTS = 2


class Pending(Protocol):
    """An evaluation under way."""

    def ready(self, seconds: float) -> bool:
        """Whether it ended, waiting for up to ``seconds``."""
        ...

    def result(self) -> Mapping[str, float]:
        """Its metrics; raises what it raised."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


Submit = Callable[[Evaluate, str, int], Pending]


class EvaluationFailed(ClipmillError):
    """An evaluation raised, or its process died."""


class Follower:
    """Evaluates checkpoints of the run in ``output_folder`` until :meth:`finish`; a context manager.

    Left without an error it waits for all that still wait; with one it stops at once, and what was missed is done
    after the next start.
    """

    def __init__(
        self,
        output_folder: str,
        evaluate: Evaluate,
        record: Record,
        submit: Submit | None = None,
        poll_seconds: float = 5.0,
    ) -> None:
        self.checkpoints = Checkpoints(output_folder)
        self.evaluate, self.record, self.submit = evaluate, record, submit or in_a_process
        self.poll_seconds = poll_seconds
        self.results: dict[int, dict[str, float]] = {}
        self._attempts: dict[str, int] = {}
        self._ending = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="clipmill-evaluation", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stopping.set()
        self.finish()

    def finish(self) -> None:
        """No more checkpoints will come: return when those that wait are evaluated."""
        self._ending.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            ending = self._ending.is_set()  # read before looking, so that the last checkpoint is not missed
            waiting = self._waiting()
            if waiting:
                self._run(waiting[0])
            elif ending:
                return
            else:
                self._ending.wait(self.poll_seconds)

    def _waiting(self) -> list[Checkpoint]:
        try:
            return [checkpoint for checkpoint in self.checkpoints.whole() if checkpoint.waits]
        except Exception as error:  # whatever a store raises when it is away; the training must not end by it
            logger.warning("cannot look for checkpoints to evaluate: %s", error)
            self._stopping.wait(self.poll_seconds)
            return []

    def _run(self, checkpoint: Checkpoint) -> None:
        uri, step = checkpoint.folder.uri, checkpoint.meta.step
        self._attempts[uri] = self._attempts.get(uri, 0) + 1
        pending = self.submit(self.evaluate, uri, step)
        while not pending.ready(1.0):
            if self._stopping.is_set():
                pending.cancel()
                return
        try:
            metrics = {name: float(value) for name, value in pending.result().items()}
            self.record(uri, step, metrics)
            write_evaluation(checkpoint, {"step": step, "metrics": metrics})
            self.results[step] = metrics
        except Exception as error:  # an evaluation's failure is reported and must not end the training
            self._failed(checkpoint, error)

    def _failed(self, checkpoint: Checkpoint, error: Exception) -> None:
        uri = checkpoint.folder.uri
        if self._attempts[uri] < ATTEMPTS:
            logger.warning("the evaluation of %s failed and is tried again: %s", uri, error)
            return
        logger.error("the evaluation of %s failed: %s", uri, error)
        try:
            write_evaluation(checkpoint, {"step": checkpoint.meta.step, "error": str(error)})
        except ClipmillError as also:
            logger.error("%s", also)


class _Process:
    """An evaluation in a process of its own."""

    def __init__(self, process: BaseProcess, results: "Connection[Any, Any]") -> None:
        self._process, self._results = process, results

    def ready(self, seconds: float) -> bool:
        return self._results.poll(seconds) or not self._process.is_alive()

    def result(self) -> Mapping[str, float]:
        try:
            kind, content = json.loads(self._results.recv_bytes())
        except EOFError:
            self._process.join()
            raise EvaluationFailed(f"its process ended with code {self._process.exitcode}") from None
        self._process.join()
        if kind == "error":
            raise EvaluationFailed(content)
        metrics: dict[str, float] = content
        return metrics

    def cancel(self) -> None:
        self._process.kill()
        self._process.join()


def in_a_process(evaluate: Evaluate, uri: str, step: int) -> Pending:
    """Run an evaluation in a new process; for a training without Ray."""
    context = multiprocessing.get_context("spawn")  # a fork would share the trainer's threads and locks
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_evaluate_into, args=(theirs, evaluate, uri, step), daemon=True)
    process.start()
    theirs.close()
    return _Process(process, ours)


class _Task:
    """An evaluation as a Ray task."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def ready(self, seconds: float) -> bool:
        import ray

        return bool(ray.wait([self._reference], timeout=seconds)[0])

    def result(self) -> Mapping[str, float]:
        import ray

        metrics: Mapping[str, float] = ray.get(self._reference)
        return metrics

    def cancel(self) -> None:
        import ray

        ray.cancel(self._reference, force=True)


def as_ray_task(num_cpus: float = 1, num_gpus: float = 0, resources: Mapping[str, float] | None = None) -> Submit:
    """Submit evaluations as Ray tasks that ask for these resources."""

    def submit(evaluate: Evaluate, uri: str, step: int) -> Pending:
        import ray

        task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}), max_retries=2)(
            evaluate
        )
        return _Task(task.remote(uri, step))

    return submit


def _evaluate_into(results: "Connection[Any, Any]", evaluate: Evaluate, uri: str, step: int) -> None:
    try:
        answer: tuple[str, Any] = ("metrics", dict(evaluate(uri, step)))
    except Exception as error:  # it is reported by the follower, in the driver's log
        answer = ("error", f"{type(error).__name__}: {error}")
    results.send_bytes(json.dumps(answer).encode())
    results.close()
