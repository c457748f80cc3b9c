"""Progress of a data job, one line every ten seconds, and the limit of failures at which it stops."""

import logging
import time
from collections import Counter
from dataclasses import dataclass

from pipeline.config import require
from pipeline.errors import TooManyFailures
from pipeline.shards.writer import ShardStats

logger = logging.getLogger(__name__)

REPORT_SECONDS = 10.0
REASONS_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The smallest fraction of rows that must become samples."""

    minimum_success: float = 0.0
    """Smallest fraction of rows that must become samples, 0 to 1; below it the job stops with exit code 1."""
    minimum_success_after: int = 10_000
    """Number of rows from which the fraction is checked after every shard; it is always checked at the end."""

    def __post_init__(self) -> None:
        require(0 <= self.minimum_success <= 1, "minimum_success", self.minimum_success, "0 to 1")
        require(self.minimum_success_after >= 1, "minimum_success_after", self.minimum_success_after, "1 or more")


class Progress:
    """Counts the finished shards of a job of ``rows`` rows; shards of an earlier run count, but not for the rate."""

    def __init__(self, rows: int, floor: Floor) -> None:
        self._all, self._floor = rows, floor
        self._start = self._reported = time.monotonic()
        self._wall = time.time()
        self._rows = self._successes = self._bytes = self._fresh_rows = self._fresh_samples = 0
        self._reasons: Counter[str] = Counter()

    def seen(self, stats: ShardStats) -> ShardStats:
        """Count a finished shard.

        Raises:
            TooManyFailures: the fraction of samples is below the floor.
        """
        self._rows += stats.count
        self._successes += stats.successes
        self._reasons.update(stats.reasons)
        if stats.end_time >= self._wall:
            self._fresh_rows += stats.count
            self._fresh_samples += stats.successes
            self._bytes += stats.bytes
        # finish() logs the line after the last shard.
        if self._rows < self._all and time.monotonic() - self._reported > REPORT_SECONDS:
            self._reported = time.monotonic()
            logger.info("%s", self.line())
        self._judge()
        return stats

    def finish(self) -> None:
        """Log the final line, and the number of dropped rows by reason."""
        if self._rows:
            logger.info("%s", self.line())
        for reason, count in self._reasons.most_common():
            logger.info("dropped %d rows: %s", count, reason)

    def line(self) -> str:
        """``40000 of 100000 rows, 512 samples/s, 9.8 MB/s, 87.1 % good, 117 s left``."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._fresh_rows / seconds
        left = f"{(self._all - self._rows) / rate:.0f} s left" if rate else "time left unknown"
        good = 100 * self._successes / max(self._rows, 1)
        speed = f"{self._fresh_samples / seconds:.0f} samples/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        return f"{self._rows} of {self._all} rows, {speed}, {good:.1f} % good, {left}"

    def _judge(self) -> None:
        share = self._successes / max(self._rows, 1)
        if self._rows >= min(self._floor.minimum_success_after, self._all) and share < self._floor.minimum_success:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(REASONS_NAMED))
            raise TooManyFailures(
                f"{share:.1%} of {self._rows} rows became samples, less than --minimum-success "
                f"{self._floor.minimum_success:g}; most of the others failed for: {reasons}; finished shards are kept, "
                "run the same command with a lower --minimum-success to continue"
            )
