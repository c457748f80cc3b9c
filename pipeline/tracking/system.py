"""System metrics of a node (CPU, memory, disk, network, GPUs) under MLflow's own names, sampled by a thread.

MLflow's own monitor stops permanently if the server is unreachable for one sample. Here our thread calls its
collectors, and the values go through the run's queue, which waits for the server.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class SystemMetrics:
    """Samples until :meth:`stop`.

    ``put`` takes the metrics and a step; the step is the number of seconds since ``began`` (seconds since 1970, the
    start of the run), so a continued run's samples follow those of its first part. ``node`` names one of several
    machines: ``system/node-1/cpu_utilization_percentage``.
    """

    def __init__(
        self, run_id: str, uri: str, began: float, put: Callable[[dict[str, float], int], None], node: str = ""
    ) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor: Any = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self._prefix = f"system/{node}/" if node else "system/"
        self._began, self._put = began, put
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="clipmill-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self._thread.join(timeout=5.0)

    def sample(self) -> dict[str, float]:
        """One sample of all available metrics of this machine."""
        self._monitor.collect_metrics()
        values: dict[str, float] = self._monitor.aggregate_metrics()
        for part in self._monitor.monitors:
            part.clear_metrics()
        return {self._prefix + name: value for name, value in values.items()}

    def _work(self) -> None:
        self.sample()  # CPU use is measured from the first call on, which reads 0
        while not self._stopped.wait(self._monitor.sampling_interval):
            try:
                self._put(self.sample(), int(time.time() - self._began))
            except Exception as error:  # a failing driver must not affect anything else
                logger.warning("system metrics end here: %s", error)
                return
