"""The tracker interface of training. MLflow's tracker is in pipeline.tracking and is passed as an argument."""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records metrics. Logging must not stop a run: a tracker handles its own errors."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record ``metrics`` at ``step``; returns at once. A step may repeat after a resume."""
        ...

    def log_file(self, name: str, content: bytes) -> None:
        """Keep ``content`` as the artifact ``name``, which may contain folders; returns at once."""
        ...

    def flush(self, seconds: float) -> object:
        """Wait for at most ``seconds`` until what was queued is sent."""
        ...

    def close(self) -> object:
        """Send all queued entries; the tracker is not used afterwards."""
        ...


OpenTracker = Callable[[], Tracker]
"""Opens the run's tracker in the process that logs, which is rank 0's. It pickles; a tracker may not."""


class LogTracker:
    """Writes numbers to the log, at level DEBUG: for runs without a tracking server."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One line."""
        logger.debug("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))

    def log_file(self, name: str, content: bytes) -> None:
        """Files are not kept."""
        logger.warning("%s (%d bytes) is not kept, since the run is not tracked", name, len(content))

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nothing is queued."""
