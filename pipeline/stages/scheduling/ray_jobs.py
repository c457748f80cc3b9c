"""Client of Ray's job server for the scheduler: list, submit, stop, read the log."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import SettingError
from pipeline.stages.scheduling.scheduler import AlreadyThere, Refused, Submitted, Unreachable
from pipeline.stages.scheduling.timetable import ScheduledJob

logger = logging.getLogger(__name__)


class RayJobs:
    """The jobs of the cluster whose dashboard is at ``address`` (``http://127.0.0.1:8265``).

    The token of the cluster, if any, is read as by `ray job submit`: from ``RAY_AUTH_TOKEN`` or
    ``~/.ray/auth_token``, with ``RAY_AUTH_MODE=token``.

    Raises:
        SettingError: no server answers at the address.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        try:
            self._client = JobSubmissionClient(address)
            self._client.list_jobs()
        except (ConnectionError, RuntimeError, OSError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise SettingError("address", address, f"a Ray job server that answers ({reason})") from error

    def jobs(self) -> list[Submitted]:
        """All submissions in Ray's list; drivers without a submission are left out."""
        return [_submitted(one) for one in self._ask(self._client.list_jobs) if one.submission_id]

    def submit(self, job: ScheduledJob, id: str, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Submit the job's command under ``id``."""
        runtime = {"working_dir": job.working_dir, "env_vars": dict(environment)}
        try:
            self._client.submit_job(
                entrypoint=job.command,
                submission_id=id,
                runtime_env=runtime,
                metadata=dict(metadata),
                entrypoint_num_cpus=job.num_cpus or None,
                entrypoint_resources=dict(job.resources) or None,
            )
        except ValueError as error:
            raise Refused(_first_line(error)) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            if any(one.id == id for one in self.jobs()):
                raise AlreadyThere(id) from error
            raise Unreachable(_first_line(error)) from error

    def stop(self, id: str) -> None:
        """Ask Ray to stop the job: SIGTERM, and SIGKILL some seconds later."""
        self._ask(lambda: self._client.stop_job(id))

    def log(self, id: str) -> str:
        """The log of the job; empty where it was lost with its node."""
        try:
            return str(self._client.get_job_logs(id))
        except (ConnectionError, RuntimeError, OSError) as error:
            logger.info("the log of %s cannot be read: %s", id, _first_line(error))
            return ""

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except (ConnectionError, RuntimeError, OSError) as error:
            raise Unreachable(_first_line(error)) from error


def _submitted(details: Any) -> Submitted:
    return Submitted(
        id=str(details.submission_id),
        status=str(getattr(details.status, "value", details.status)),
        started=_moment(details.start_time),
        ended=_moment(details.end_time),
        exit_code=details.driver_exit_code,
        message=str(details.message or ""),
        metadata=dict(details.metadata or {}),
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
