"""One log line every few seconds of work that takes longer: how much is done, how fast, and how long it will take."""

import logging
import time

EVERY_SECONDS = 10.0


class WorkProgress:
    """Counts finished ``units`` of ``what``; ``total`` is their number, if it is known. Short work logs nothing."""

    def __init__(self, logger: logging.Logger, what: str, units: str, total: int | None = None) -> None:
        self._logger, self._what, self._units, self._total = logger, what, units, total
        self._start = self._reported = time.monotonic()
        self._done = 0

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units; logs a line if the last one is some seconds old."""
        self._done += count
        now = time.monotonic()
        if now - self._reported >= EVERY_SECONDS and self._done != self._total:
            self._reported = now
            self._logger.info("%s", self.line(now - self._start))

    def line(self, seconds: float) -> str:
        """``zero-shot: 320 of 5000 images in 40 s, 585 s left``."""
        if self._total is None:
            return f"{self._what}: {self._done} {self._units} in {seconds:.0f} s, {self._done / seconds:.3g}/s"
        left = seconds / self._done * max(self._total - self._done, 0)
        return f"{self._what}: {self._done} of {self._total} {self._units} in {seconds:.0f} s, {left:.0f} s left"
