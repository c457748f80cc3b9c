"""The history of scheduled jobs in MLflow: one experiment, one run per submission.

A run's status is the end of the submission (waiting is SCHEDULED, skipped and stopped are KILLED, lost is FAILED). Tags
hold the submission id, fire time, attempt, exit code and the snapshot that the job published. Records that MLflow does
not take are kept in memory and sent again later, because a scheduler outlives servers.
"""

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pipeline.shards.privacy import masked
from pipeline.stages.scheduling.scheduler import OPEN, Fire, latest_first
from pipeline.tracking.runs import LONGEST_TAG, Tracking, _experiment
from pipeline.tracking.store import checked_uri, client, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

STATUS = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "lost": "FAILED",
    "stopped": "KILLED",
    "skipped": "KILLED",
}
RECENT = 100
PREFIX = "schedule."


class MlflowHistory:
    """Records fires in the experiment of ``settings``.

    Raises:
        SettingError: the store does not answer when the scheduler starts.
    """

    def __init__(self, settings: Tracking) -> None:
        uri = checked_uri(settings.tracking_uri)
        with store_errors(uri):
            self._client = client(uri)
            self._experiment = _experiment(self._client, uri, settings)
        self._uri = uri
        self._runs: dict[str, str] = {}
        self._unsaved: dict[str, Fire] = {}

    def fires(self, job: str) -> list[Fire]:
        """The latest fires of a job."""
        with store_errors(self._uri):
            runs = self._client.search_runs(
                [self._experiment],
                f"tags.`{PREFIX}job` = '{job}'",
                max_results=RECENT,
                order_by=["attributes.start_time DESC"],
            )
        found = []
        for run in runs:
            fire = _fire(run)
            self._runs[fire.id] = run.info.run_id
            found.append(fire)
        return latest_first(found)

    def save(self, fire: Fire) -> None:
        """Record a fire; if MLflow does not answer, together with the next one."""
        from mlflow.exceptions import MlflowException

        self._unsaved[fire.id] = fire
        for name, waiting in list(self._unsaved.items()):
            try:
                self._write(waiting)
            except (MlflowException, OSError) as error:
                logger.warning("MLflow did not take %s (%s); it is sent again later", name, masked(str(error))[:200])
                return
            del self._unsaved[name]

    def _write(self, fire: Fire) -> None:
        run = self._runs.get(fire.id) or self._create(fire)
        for name, value in _tags(fire).items():
            self._client.set_tag(run, name, value)
        for name, number in _metrics(fire).items():
            self._client.log_metric(run, name, number)
        if fire.state in OPEN:
            self._client.update_run(run, status=STATUS[fire.state])
        else:
            self._client.set_terminated(run, STATUS[fire.state], _milliseconds(fire.ended))

    def _create(self, fire: Fire) -> str:
        made = self._client.create_run(
            self._experiment,
            start_time=_milliseconds(fire.submitted or fire.time),
            run_name=fire.id,
            tags=_tags(fire),
        )
        self._runs[fire.id] = made.info.run_id
        return str(made.info.run_id)


def _tags(fire: Fire) -> dict[str, str]:
    values: Mapping[str, Any] = {
        "job": fire.job,
        "submission_id": fire.id,
        "fire_time": fire.time.isoformat(),
        "attempt": fire.attempt,
        "state": fire.state,
        "submitted": fire.submitted.isoformat() if fire.submitted else None,
        "ended": fire.ended.isoformat() if fire.ended else None,
        "exit_code": fire.exit_code,
        "message": fire.message,
        "snapshot": fire.snapshot,
        "command": fire.command,
    }
    return {
        PREFIX + name: masked(str(value))[:LONGEST_TAG] for name, value in values.items() if value not in (None, "")
    }


def _metrics(fire: Fire) -> dict[str, float]:
    metrics = {}
    if fire.submitted:
        metrics["schedule/delay_seconds"] = (fire.submitted - fire.time).total_seconds()
    if fire.submitted and fire.ended:
        metrics["schedule/duration_seconds"] = (fire.ended - fire.submitted).total_seconds()
    return metrics


def _fire(run: "Run") -> Fire:
    tags = {name.removeprefix(PREFIX): value for name, value in run.data.tags.items() if name.startswith(PREFIX)}
    moments = {name: datetime.fromisoformat(tags[name]) if name in tags else None for name in ("submitted", "ended")}
    return Fire(
        job=tags["job"],
        time=datetime.fromisoformat(tags["fire_time"]),
        attempt=int(tags["attempt"]),
        id=tags["submission_id"],
        state=tags["state"],  # type: ignore[arg-type]
        submitted=moments["submitted"],
        ended=moments["ended"],
        exit_code=int(tags["exit_code"]) if "exit_code" in tags else None,
        message=tags.get("message", ""),
        snapshot=tags.get("snapshot", ""),
        command=tags.get("command", ""),
    )


def _milliseconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp() * 1000) if moment else None
