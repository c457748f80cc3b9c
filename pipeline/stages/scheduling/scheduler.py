"""Submit the jobs of a timetable to Ray when they are due: each fire once, one run per job at a time.

The state survives this process in two places: Ray's list of jobs, where a submission id consists of the job's name and
its fire time, and the history (MLflow), which also survives Ray's head node. After any number of restarts each due fire
is submitted once; of several missed fires, only the last one.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

from pipeline.stages.scheduling.timetable import ScheduledJob, Timetable, last_fire, submission_id

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "succeeded", "failed", "stopped", "lost", "skipped"]
OPEN: tuple[State, ...] = ("waiting", "running")
RETRIED: tuple[State, ...] = ("failed", "lost")
SNAPSHOT = re.compile(r"snapshot (\S+@\d{5,}-[0-9a-f]{12})")
TAGS = ("clipmill.schedule", "clipmill.fire", "clipmill.attempt")


@dataclass(frozen=True, kw_only=True)
class Fire:
    """One submission of a job, past or pending; times are UTC."""

    job: str
    time: datetime
    attempt: int
    id: str
    state: State
    submitted: datetime | None = None
    ended: datetime | None = None
    exit_code: int | None = None
    message: str = ""
    snapshot: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job in Ray's list. ``status`` is Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""

    id: str
    status: str
    started: datetime | None
    ended: datetime | None
    exit_code: int | None
    message: str
    metadata: Mapping[str, str]


class AlreadyThere(Exception):
    """Ray already has a job with this id."""


class Refused(Exception):
    """Ray's client rejects this submission permanently, for example for a missing working directory."""


class Unreachable(Exception):
    """Ray's job server does not answer, or temporarily rejects submissions."""


class JobCluster(Protocol):
    """The scheduler's interface to Ray. Every method may raise :class:`Unreachable`."""

    def jobs(self) -> list[Submitted]:
        """All jobs in Ray's list."""
        ...

    def submit(self, job: ScheduledJob, id: str, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Submit a job's command; raises :class:`AlreadyThere` and :class:`Refused`."""
        ...

    def stop(self, id: str) -> None:
        """Stop a job."""
        ...

    def log(self, id: str) -> str:
        """The log of a job."""
        ...


class History(Protocol):
    """Persistent record of fires, which survives Ray."""

    def fires(self, job: str) -> list[Fire]:
        """Recorded fires of a job, latest first; includes all open ones."""
        ...

    def save(self, fire: Fire) -> None:
        """Record a fire, or its new state."""
        ...


class Scheduler:
    """Updates cluster and history at each call of :meth:`tick`."""

    def __init__(self, timetable: Timetable, cluster: JobCluster, history: History) -> None:
        self._timetable, self._cluster, self._history = timetable, cluster, history
        self._known = {job.name: {fire.id: fire for fire in history.fires(job.name)} for job in timetable.jobs}
        self._reachable = True

    def tick(self, now: datetime | None = None) -> None:
        """Record finished fires, and submit the fires due at ``now``."""
        now = now or datetime.now(UTC)
        try:
            present = {one.id: one for one in self._cluster.jobs()}
            for job in self._timetable.jobs:
                self._settle(job, present, now)
        except Unreachable as error:
            self._tell_unreachable(str(error))
            return
        self._reachable = True
        for job in self._timetable.jobs:
            try:
                self._serve(job, now)
            except Unreachable as error:
                # A job that Ray rejects for now must not delay the others.
                logger.warning("%s could not be submitted (%s); trying again", job.name, error)

    @property
    def idle(self) -> bool:
        """Whether no fire is waiting or running."""
        return not any(fire.state in OPEN for fires in self._known.values() for fire in fires.values())

    def _tell_unreachable(self, why: str) -> None:
        if self._reachable:
            logger.warning("Ray's job server does not answer (%s); asking again", why)
        self._reachable = False

    def _settle(self, job: ScheduledJob, present: Mapping[str, Submitted], now: datetime) -> None:
        """Update the record from Ray's list: jobs submitted before a crash, finished jobs, lost jobs."""
        known = self._known[job.name]
        for one in present.values():
            if one.metadata.get(TAGS[0]) == job.name and one.id not in known:
                self._record(_adopted(job, one))
        for fire in list(known.values()):
            seen = present.get(fire.id)
            if fire.state == "running" and seen is None:
                self._record(replace(fire, state="lost", ended=now, message="Ray does not know the job any more"))
            elif seen is not None and fire.state in OPEN:
                self._follow(fire, seen, now)
                self._stop_if_late(job, known[fire.id], now)

    def _stop_if_late(self, job: ScheduledJob, fire: Fire, now: datetime) -> None:
        """Stop a fire that exceeds its time limit; every later tick repeats the request until the job has stopped."""
        longest = job.stop_after_minutes
        if longest is None or fire.state != "running" or fire.submitted is None:
            return
        if now >= fire.submitted + timedelta(minutes=longest):
            self._cluster.stop(fire.id)
            if not fire.message:
                self._record(replace(fire, message=f"stopped since it ran longer than {longest:g} minutes"))

    def _follow(self, fire: Fire, seen: Submitted, now: datetime) -> None:
        states: dict[str, State] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}
        state = states.get(seen.status, "running")
        submitted = fire.submitted or seen.started or now
        if state == "running":
            if fire.state != state or fire.submitted is None:
                self._record(replace(fire, state=state, submitted=submitted))
            return
        published = SNAPSHOT.findall(self._cluster.log(fire.id))
        self._record(
            replace(
                fire,
                state=state,
                submitted=submitted,
                ended=seen.ended or now,
                exit_code=seen.exit_code,
                message=fire.message if state == "stopped" and fire.message else seen.message,
                snapshot=published[-1] if published else "",
            )
        )

    def _serve(self, job: ScheduledJob, now: datetime) -> None:
        """Submit the job if a fire or a retry is due and no fire of it runs."""
        wanted = self._wanted(job, now)
        if wanted is None:
            return
        running = next((fire for fire in self._known[job.name].values() if fire.state == "running"), None)
        if running is None:
            self._submit(job, wanted, now)
        elif wanted.state == "waiting" and wanted.id in self._known[job.name]:
            return
        else:
            state: State = "waiting" if job.when_running == "wait" else "skipped"
            ended = None if state == "waiting" else now
            self._record(replace(wanted, state=state, ended=ended, message=f"{running.id} was still running"))

    def _wanted(self, job: ScheduledJob, now: datetime) -> Fire | None:
        """The fire to submit: the one due now, else a waiting one, else a retry; only for the latest time."""
        known = self._known[job.name]
        due = last_fire(job, now)
        if due is not None and not any(fire.time >= due for fire in known.values()):
            self._drop_waiting(job, now, due)
            return self._fire(job, due, 0)
        latest = max(known.values(), key=lambda fire: (fire.time, fire.attempt), default=None)
        if latest is None or latest.state == "waiting":
            return latest
        delay = timedelta(minutes=job.retry_delay_minutes)
        again = latest.state in RETRIED and latest.attempt < job.retries
        if again and latest.ended is not None and now >= latest.ended + delay:
            return self._fire(job, latest.time, latest.attempt + 1)
        return None

    def _drop_waiting(self, job: ScheduledJob, now: datetime, due: datetime) -> None:
        for fire in list(self._known[job.name].values()):
            if fire.state == "waiting" and fire.time < due:
                self._record(replace(fire, state="skipped", ended=now, message="the next fire was due before it began"))

    def _fire(self, job: ScheduledJob, time: datetime, attempt: int) -> Fire:
        name = submission_id(job, time, attempt)
        return Fire(job=job.name, time=time, attempt=attempt, id=name, state="waiting", command=job.command)

    def _submit(self, job: ScheduledJob, fire: Fire, now: datetime) -> None:
        metadata = dict(zip(TAGS, (job.name, fire.time.isoformat(), str(fire.attempt)), strict=True))
        missing = [name for name in job.environment_from if name not in os.environ]
        if missing:
            message = f"not in the scheduler's environment: {', '.join(missing)}"
            self._record(replace(fire, state="failed", ended=now, message=message))
            return
        environment = {**job.environment, **{name: os.environ[name] for name in job.environment_from}}
        try:
            self._cluster.submit(job, fire.id, environment, metadata)
        except AlreadyThere:
            logger.info("%s is in Ray already; another scheduler was faster", fire.id)
        except Refused as error:
            self._record(replace(fire, state="failed", ended=now, message=str(error)))
            return
        self._record(replace(fire, state="running", submitted=now, message=""))

    def _record(self, fire: Fire) -> None:
        self._known[fire.job][fire.id] = fire
        self._history.save(fire)
        late = f" {(fire.submitted - fire.time).total_seconds():.0f} s after its time" if fire.submitted else ""
        took = (
            f" after {(fire.ended - fire.submitted).total_seconds():.0f} s" if fire.ended and fire.submitted else late
        )
        facts = [fire.message.splitlines()[0] if fire.message else "", fire.snapshot and f"snapshot {fire.snapshot}"]
        said = "; ".join(fact for fact in facts if fact)
        logger.info("%s %s%s%s", fire.id, fire.state, took, f": {said}" if said else "")


def _adopted(job: ScheduledJob, one: Submitted) -> Fire:
    """The record of a job that was submitted, but not recorded before the scheduler died."""
    time = datetime.fromisoformat(one.metadata.get(TAGS[1], "")) if one.metadata.get(TAGS[1]) else datetime.now(UTC)
    attempt = int(one.metadata.get(TAGS[2], "0") or 0)
    return Fire(
        job=job.name, time=time, attempt=attempt, id=one.id, state="running", submitted=one.started, command=job.command
    )


def latest_first(fires: Iterable[Fire]) -> list[Fire]:
    """Fires by time and attempt, latest first."""
    return sorted(fires, key=lambda fire: (fire.time, fire.attempt), reverse=True)
