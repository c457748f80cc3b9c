"""A thread that sends metrics to a tracking server, so that the training step never waits for the server.

Entries are sent in order and in batches. An unreachable server is retried with growing pauses; meanwhile the queue
grows up to its limit, and then drops the oldest metrics. A log line at the end lists what could not be sent.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)

NAMED = 10  # tasks and refusals that log lines name
AT_ONCE = 1000  # MLflow's limit for metrics in a batch
LIMIT = 100_000
LINGER = 0.3  # seconds in which the metrics of several steps are collected into one request, if nobody waits for them
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
PATIENCE = 16.0  # the pause at which flush gives up: the server has been unreachable for about as long

Verdict = Literal["sent", "refused", "away"]


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric; ``time`` is in milliseconds since 1970."""

    name: str
    value: float
    step: int
    time: int


@dataclass(frozen=True, slots=True)
class UploadTask:
    """A task to run in order with the metrics: an upload. ``what`` names it in warnings."""

    run: Callable[[], None]
    what: str


@dataclass
class Lost:
    """Entries that were never sent: values of metrics by number and steps, tasks by name."""

    values: int = 0
    steps: tuple[int, int] = (0, 0)
    tasks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.values + len(self.tasks)

    def __str__(self) -> str:
        first, last = self.steps
        values = [f"{self.values} values of metrics at steps {first} to {last}"] if self.values else []
        more = len(self.tasks) - NAMED
        return ", ".join([*values, *self.tasks[:NAMED], *([f"{more} more"] if more > 0 else [])])

    def add(self, item: Point | UploadTask) -> None:
        """Add one entry."""
        if isinstance(item, UploadTask):
            self.tasks.append(item.what)
            return
        first, last = self.steps if self.values else (item.step, item.step)
        self.steps = min(first, item.step), max(last, item.step)
        self.values += 1


class MetricWriter:
    """Sends points through ``send`` and runs tasks, in its own daemon thread.

    Args:
        send: sends at most 1000 points; raises on failure.
        is_refusal: distinguishes an error that a retry cannot fix (a bad metric name) from an unreachable server.
        is_there: a quick check of whether the server answers, called before each request, because the HTTP client
            retries for minutes without interruption.
        limit: points kept while the server is unreachable.
    """

    def __init__(
        self,
        send: Callable[[list[Point]], None],
        is_refusal: Callable[[Exception], bool],
        is_there: Callable[[], bool] = lambda: True,
        limit: int = LIMIT,
    ) -> None:
        self._send, self._is_refusal, self._is_there, self._limit = send, is_refusal, is_there, limit
        self._queue: deque[Point | UploadTask] = deque()
        self._changed = threading.Condition()
        self._under_way: list[Point | UploadTask] = []
        self._waiting = 0  # calls of flush
        self._closing = False
        self._away = False
        self._pause = 0.0
        self._refused = 0
        self.lost = Lost()
        self._thread = threading.Thread(target=self._work, name="clipmill-tracking", daemon=True)
        self._thread.start()

    def put(self, metrics: dict[str, float], step: int) -> None:
        """Queue metrics with the current time; returns at once."""
        now = time.time_ns() // 1_000_000
        self._append([Point(name, float(value), step, now) for name, value in metrics.items()])

    def do(self, run: Callable[[], None], what: str) -> None:
        """Queue a task; returns at once."""
        self._append([UploadTask(run, what)])

    def flush(self, seconds: float) -> bool:
        """Wait until all queued entries are sent; ``False`` on a timeout or if the server stays unreachable."""
        with self._changed:
            self._pause = 0.0  # retry at once
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_empty() or self._pause >= PATIENCE, seconds)
            self._waiting -= 1
            return self._is_empty()

    def close(self, seconds: float) -> int:
        """Send queued entries for up to ``seconds``, stop, and return the number of entries that were never sent.

        An entry without the server's answer counts as not sent. Closing again does nothing.
        """
        if self._closing:
            return len(self.lost)
        self.flush(seconds)
        with self._changed:
            self._closing = True
            for item in [*self._under_way, *self._queue]:
                self.lost.add(item)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        if self.lost:
            logger.warning("not logged, since the tracking server did not take it: %s", self.lost)
        return len(self.lost)

    def _is_empty(self) -> bool:
        return not self._queue and not self._under_way

    def _is_batch(self) -> bool:
        """Whether the next batch need not wait for more metrics: it has a task, is full, or somebody waits for it."""
        if self._closing or self._waiting or len(self._queue) >= AT_ONCE:
            return True
        return bool(self._queue) and any(isinstance(self._queue[end], UploadTask) for end in (0, -1))

    def _append(self, items: "list[Point] | list[UploadTask]") -> None:
        with self._changed:
            self._queue.extend(items)
            while len(self._queue) > self._limit:
                self.lost.add(self._queue.popleft())
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                self._changed.wait_for(self._is_batch, LINGER)
                if self._closing:
                    return
                batch = self._under_way = self._next()
            verdict = self._try(batch)
            with self._changed:
                if verdict == "away" and not self._closing:
                    self._queue.extendleft(reversed(batch))
                self._under_way = []
                self._changed.notify_all()
            self._rest(verdict)

    def _next(self) -> list[Point | UploadTask]:
        """The next task alone, or the points before it; removes them from the queue."""
        batch: list[Point | UploadTask] = []
        while self._queue and len(batch) < AT_ONCE:
            if isinstance(self._queue[0], UploadTask) and batch:
                break
            batch.append(self._queue.popleft())
            if isinstance(batch[-1], UploadTask):
                break
        return batch

    def _try(self, batch: list[Point | UploadTask]) -> Verdict:
        try:
            if not self._is_there():
                return "away"
            if isinstance(batch[0], UploadTask):
                batch[0].run()
            else:
                self._send([item for item in batch if isinstance(item, Point)])
        except Exception as error:  # no error of a server or its client may end the thread
            return self._judge(batch, error)
        return "sent"

    def _judge(self, batch: list[Point | UploadTask], error: Exception) -> Verdict:
        if not self._is_refusal(error):
            logger.debug("tracking server: %s", error)
            return "away"
        if len(batch) > 1:  # one bad name must not lose the other metrics
            half = len(batch) // 2
            verdicts = {self._try(batch[:half]), self._try(batch[half:])}
            return "away" if "away" in verdicts else "sent"
        self.lost.add(batch[0])
        what = batch[0].what if isinstance(batch[0], UploadTask) else batch[0].name
        self._refused += 1
        if self._refused <= NAMED:
            logger.warning("the tracking server refused %s: %s", what, error)
        if self._refused == NAMED:
            logger.warning("further refusals are only counted")
        return "refused"

    def _rest(self, verdict: Verdict) -> None:
        """Log when the server disappears and returns, and wait before the next retry."""
        away = verdict == "away"
        if away and not self._away:
            logger.warning("the tracking server does not answer; training goes on and the metrics are kept")
        if self._away and not away:
            logger.warning("the tracking server answers again; %d items were lost meanwhile", len(self.lost))
        with self._changed:
            self._away = away
            self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE) if away else 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or not self._pause, self._pause)
