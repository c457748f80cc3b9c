"""Ways to run an evaluation outside of the training process. Light to import: a new process imports it first."""

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from pipeline.errors import ClipmillError

GIVES_WAY = 10  # niceness of an evaluation's process, so that training on the same machine has priority

Evaluate = Callable[[str, int], Mapping[str, float]]
"""Evaluates the checkpoint at a URI, made at a step: metric names and values. It pickles."""


class Pending(Protocol):
    """An evaluation under way."""

    def ready(self, seconds: float) -> bool:
        """Whether it has ended; waits for up to ``seconds``."""
        ...

    def result(self) -> Mapping[str, float]:
        """Its metrics; raises its error."""
        ...

    def cancel(self) -> None:
        """End it."""
        ...


Submit = Callable[[Evaluate, str, int], Pending]


class EvaluationFailed(ClipmillError):
    """An evaluation raised, or its process died."""


class _Process:
    """An evaluation in its own process."""

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
    process = context.Process(target=_evaluate_into, args=(theirs, pickle.dumps(evaluate), uri, step), daemon=True)
    process.start()
    theirs.close()
    return _Process(process, ours)


class _FinishedEvaluation:
    """An evaluation that ran when it was submitted."""

    def __init__(self, evaluate: Evaluate, uri: str, step: int) -> None:
        self._metrics = evaluate(uri, step)

    def ready(self, seconds: float) -> bool:
        return True

    def result(self) -> Mapping[str, float]:
        return self._metrics

    def cancel(self) -> None:
        """Does nothing: it has ended."""


def in_this_process(evaluate: Evaluate, uri: str, step: int) -> Pending:
    """Run an evaluation synchronously in this process, after the training has ended."""
    return _FinishedEvaluation(evaluate, uri, step)


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
    """Submit evaluations as Ray tasks with these resources."""

    def submit(evaluate: Evaluate, uri: str, step: int) -> Pending:
        import ray

        # Ray takes only functions, and an evaluation may be any callable object.
        task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources or {}), max_retries=2)(_call)
        return _Task(task.remote(evaluate, uri, step))

    return submit


def _call(evaluate: Evaluate, uri: str, step: int) -> Mapping[str, float]:
    return evaluate(uri, step)


def _evaluate_into(results: "Connection[Any, Any]", pickled: bytes, uri: str, step: int) -> None:
    if hasattr(os, "nice"):
        os.nice(GIVES_WAY)  # before the evaluation's imports
    try:
        evaluate: Evaluate = pickle.loads(pickled)  # made by this job, not read from data
        answer: tuple[str, Any] = ("metrics", dict(evaluate(uri, step)))
    except Exception as error:  # the follower reports it in the driver's log
        answer = ("error", f"{type(error).__name__}: {error}")
    results.send_bytes(json.dumps(answer).encode())
    results.close()
