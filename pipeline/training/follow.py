"""Evaluations beside the training: a thread of the driver that evaluates waiting checkpoints.

A checkpoint written with ``evaluate`` waits until it has an ``evaluation.json``. So a killed driver loses nothing: the
next start finds the waiting checkpoints. The evaluation itself runs elsewhere (in a Ray task or in its own process),
one at a time, and the training ranks never stop for it.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from pipeline.errors import ClipmillError
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoint, Checkpoints, EvaluationRecord, write_evaluation
from pipeline.training.submit import Evaluate, Submit, in_a_process

logger = logging.getLogger(__name__)

Record = Callable[[str, int, Mapping[str, float]], None]
"""Called with the results, the URI and the step of a checkpoint; may be called again for it after a kill."""

ATTEMPTS = 2


class Follower:
    """Evaluates checkpoints of the run in ``output_folder`` until :meth:`finish`; a context manager.

    On exit without an error it evaluates all waiting checkpoints, through ``submit_at_end``. On exit with an error it
    stops at once, and the next start evaluates the rest.
    """

    def __init__(
        self,
        output_folder: str | Folder,
        evaluate: Evaluate,
        record: Record | None = None,
        submit: Submit = in_a_process,
        submit_at_end: Submit | None = None,
        poll_seconds: float = 5.0,
    ) -> None:
        self.checkpoints = Checkpoints(output_folder)
        self.evaluate, self.record = evaluate, record
        self.submit, self.submit_at_end = submit, submit_at_end or submit
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
        """Return when all waiting checkpoints are evaluated; call it after the last checkpoint."""
        self._ending.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            ending = self._ending.is_set()  # read before listing, so that the last checkpoint is not missed
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
        except Exception as error:  # any error of an unreachable store; the training must not end by it
            logger.warning("cannot list checkpoints to evaluate: %s", error)
            self._stopping.wait(self.poll_seconds)
            return []

    def _run(self, checkpoint: Checkpoint) -> None:
        uri, step = checkpoint.folder.uri, checkpoint.meta.step
        self._attempts[uri] = self._attempts.get(uri, 0) + 1
        submit = self.submit_at_end if self._ending.is_set() else self.submit
        try:
            pending = submit(self.evaluate, uri, step)
            while not pending.ready(1.0):
                if self._stopping.is_set():
                    pending.cancel()
                    return
            metrics = {name: float(value) for name, value in pending.result().items()}
            if self.record is not None:
                self.record(uri, step, metrics)
            self.results[step] = metrics
            if checkpoint.is_there:
                write_evaluation(checkpoint, EvaluationRecord(step=step, metrics=metrics))
        except Exception as error:  # an evaluation's failure is reported and must not end the training
            self._failed(checkpoint, error)

    def _failed(self, checkpoint: Checkpoint, error: Exception) -> None:
        uri = checkpoint.folder.uri
        if not checkpoint.is_there:
            logger.warning("%s was removed before its evaluation ended", uri)
            return
        if self._attempts[uri] < ATTEMPTS:
            logger.warning("the evaluation of %s failed and is repeated: %s", uri, error)
            return
        logger.error("the evaluation of %s failed: %s", uri, error)
        try:
            write_evaluation(checkpoint, EvaluationRecord(step=checkpoint.meta.step, error=str(error)))
        except ClipmillError as also:
            logger.error("%s", also)
