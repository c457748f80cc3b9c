"""Due times of scheduled jobs: cron expressions in a time zone, as pure functions of time.

The rules are cron's:

- Sunday is 0 and 7.
- If both the day of the month and the day of the week are restricted, either matches.
- A wall-clock time skipped by the change to summer time fires later, by the length of the jump.
- A wall-clock time that occurs twice in autumn fires the first time only. If the hour begins with ``*`` it means real
  hours, and fires both times.

APScheduler's trigger finds the wall-clock times. It is not used for time zones: it would repeat the second of two equal
times for ever. It also numbers Monday as 0.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipeline.config import require
from pipeline.errors import SettingError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"password|passwd|secret|token|credential|api_?key|access_?key", re.IGNORECASE)
WEEK = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# Upper bound of a clock change, and of the difference between wall time and real time around one.
CHANGE = timedelta(hours=3)
SEARCHED = timedelta(days=5 * 366)


@dataclass(frozen=True, kw_only=True)
class ScheduledJob:
    """A command that is submitted to Ray on a schedule.

    Raises:
        SettingError: an invalid name, expression, time zone or setting.
    """

    name: str
    """Name: lower-case letters, digits and hyphens, at most 62; prefix of the submission ids."""
    cron: str
    """Cron expression: minute, hour, day of month, month, day of week; or @hourly, @daily, @weekly, @monthly."""
    command: str
    """Command, as after the `--` of `ray job submit`."""
    timezone: str = "UTC"
    """Time zone by its IANA name, such as Europe/Berlin."""
    working_dir: str = "."
    """Working directory to upload: a folder, or the URI of a zip file."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the job; no secrets."""
    environment_from: tuple[str, ...] = ()
    """Names of environment variables to copy from the scheduler's environment; use it for secrets."""
    num_cpus: float = 0
    """CPUs reserved for the job's driver."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources reserved for the job's driver."""
    misfire_grace_minutes: float = 60
    """Longest delay of a fire after a restart or outage, in minutes; only the last missed fire is submitted."""
    when_running: Literal["skip", "wait"] = "skip"
    """Policy for a fire while an earlier one runs: skip it, or submit it after the earlier one."""
    stop_after_minutes: float | None = None
    """Time limit of a fire in minutes, so that a hanging job does not block its next fires; None = no limit."""
    retries: int = 0
    """Number of further attempts after a failed fire; none once the next fire is due."""
    retry_delay_minutes: float = 5

    def __post_init__(self) -> None:
        require(NAME.fullmatch(self.name) is not None, "name", self.name, "a-z, 0-9 and hyphens, at most 62 characters")
        require(bool(self.command.strip()), "command", self.command, "what `ray job submit --` would run")
        require(self.misfire_grace_minutes >= 0, "misfire_grace_minutes", self.misfire_grace_minutes, "0 or more")
        require(self.misfire_grace_minutes <= 40_320, "misfire_grace_minutes", self.misfire_grace_minutes, "four weeks")
        longest = self.stop_after_minutes
        require(longest is None or longest > 0, "stop_after_minutes", longest, "more than 0, or none")
        require(0 <= self.retries <= 10, "retries", self.retries, "0 to 10")
        require(self.retry_delay_minutes >= 0, "retry_delay_minutes", self.retry_delay_minutes, "0 or more")
        require(self.num_cpus >= 0, "num_cpus", self.num_cpus, "0 or more")
        for name in (*self.environment, *self.environment_from):
            require(VARIABLE.fullmatch(name) is not None, "environment", name, "names of environment variables")
        secrets = sorted(name for name in self.environment if SECRET.search(name))
        require(not secrets, "environment", ", ".join(secrets), "no secrets: name them in environment_from")
        zone_of(self.timezone)
        parse_cron(self.cron)


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """The scheduled jobs of one file."""

    jobs: tuple[ScheduledJob, ...]

    def __post_init__(self) -> None:
        names = [job.name for job in self.jobs]
        require(bool(names), "jobs", names, "at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "jobs", ", ".join(twice), "names that differ")


@dataclass(frozen=True)
class Cron:
    """A parsed expression: its triggers (any may fire), and whether its hours are real hours."""

    triggers: tuple["object", ...]
    every_hour: bool


SHORTHANDS = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}


def parse_cron(expression: str) -> Cron:
    """Parse an expression of five fields, or a shorthand.

    Raises:
        SettingError: not five fields, or an invalid field.
    """
    from apscheduler.triggers.cron import CronTrigger

    allowed = "minute hour day month weekday, such as `0 3 * * mon-fri`"
    fields = SHORTHANDS.get(expression.strip(), expression).lower().split()
    require(len(fields) == 5, "cron", expression, allowed)
    minute, hour, day, month, weekday = fields
    named = _named_days(weekday, expression)
    either = not day.startswith("*") and not weekday.startswith("*")
    days = [{"day": day}, {"day_of_week": named}] if either else [{"day": day, "day_of_week": named}]
    try:
        triggers = tuple(CronTrigger(minute=minute, hour=hour, month=month, timezone=UTC, **one) for one in days)
    except ValueError as error:
        raise SettingError("cron", expression, f"{allowed} ({error})") from error
    return Cron(triggers, every_hour=hour.startswith("*"))


def zone_of(name: str) -> ZoneInfo:
    """The time zone ``name``; raises :class:`SettingError`."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise SettingError("timezone", name, "a name of the IANA database, such as Europe/Berlin") from error


def last_fire(job: ScheduledJob, now: datetime) -> datetime | None:
    """The job's latest fire time (UTC) at or before ``now``, within its grace period."""
    since = now - timedelta(minutes=job.misfire_grace_minutes)
    due = [fire for fire in fires(job, since, now) if since <= fire <= now]
    return due[-1] if due else None


def next_fire(job: ScheduledJob, now: datetime) -> datetime | None:
    """The first fire time (UTC) after ``now``; ``None`` if there is none within five years."""
    zone, cron = zone_of(job.timezone), parse_cron(job.cron)
    wall = now.astimezone(zone).replace(tzinfo=None) - CHANGE
    best: datetime | None = None
    limit = wall + SEARCHED
    for time in _wall_times(cron, wall, limit):
        later = [fire for fire in _instants(time, zone, cron.every_hour) if fire > now]
        best = min([*later, *([best] if best else [])], default=None)
        if best and time > best.astimezone(zone).replace(tzinfo=None) + CHANGE:
            break
    return best


def fires(job: ScheduledJob, start: datetime, end: datetime) -> list[datetime]:
    """All fire times (UTC) from ``start`` to ``end`` inclusive, ascending."""
    zone, cron = zone_of(job.timezone), parse_cron(job.cron)
    first, last = (moment.astimezone(zone).replace(tzinfo=None) for moment in (start, end))
    found = {
        fire
        for time in _wall_times(cron, first - CHANGE, last + CHANGE)
        for fire in _instants(time, zone, cron.every_hour)
    }
    return sorted(fire for fire in found if start <= fire <= end)


def fires_after(job: ScheduledJob, now: datetime, count: int) -> list[datetime]:
    """The next ``count`` fire times after ``now``, in the job's time zone."""
    found: list[datetime] = []
    while len(found) < count:
        fire = next_fire(job, found[-1] if found else now)
        if fire is None:
            break
        found.append(fire)
    return [fire.astimezone(zone_of(job.timezone)) for fire in found]


def submission_id(job: ScheduledJob, fire: datetime, attempt: int = 0) -> str:
    """``refresh-20261122T0300Z``, and ``refresh-20261122T0300Z-retry-1`` for a further attempt."""
    stem = f"{job.name}-{fire.astimezone(UTC):%Y%m%dT%H%MZ}"
    return f"{stem}-retry-{attempt}" if attempt else stem


def _wall_times(cron: Cron, start: datetime, end: datetime) -> Iterator[datetime]:
    """Distinct wall-clock times without a zone, from ``start`` to ``end``, ascending."""
    previous: datetime | None = None
    for time in heapq.merge(*(_of_trigger(trigger, start, end) for trigger in cron.triggers)):
        if time != previous:
            yield time
        previous = time


def _of_trigger(trigger: object, start: datetime, end: datetime) -> Iterator[datetime]:
    moment = start.replace(tzinfo=UTC)
    while True:
        found = trigger.get_next_fire_time(None, moment)  # type: ignore[attr-defined]
        if found is None or found.replace(tzinfo=None) > end:
            return
        yield found.replace(tzinfo=None)
        moment = found + timedelta(seconds=1)


def _instants(wall: datetime, zone: ZoneInfo, every_hour: bool) -> list[datetime]:
    """The UTC times of a wall-clock time."""
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first == second:
        return [first]
    is_twice = first < second
    return [first, second] if is_twice and every_hour else [first]


def _named_days(weekday: str, expression: str) -> str:
    """The field with weekday names for numbers: 0 is Sunday in cron and Monday in the trigger."""
    if weekday == "*":
        return weekday
    days: set[int] = set()
    for part in weekday.split(","):
        found = re.fullmatch(r"(\*|[a-z0-9]+)(?:-([a-z0-9]+))?(?:/([1-9]\d?))?", part)
        require(
            found is not None and (found[1] != "*" or not found[2]), "cron", expression, "days such as mon-fri or 1,3"
        )
        assert found is not None
        low, high = (0, 6) if found[1] == "*" else (_day(found[1], expression), _day(found[2] or found[1], expression))
        high = 6 if found[3] and not found[2] and found[1] != "*" else high
        high += 7 if high < low else 0
        days |= {day % 7 for day in range(low, high + 1, int(found[3] or 1))}
    return ",".join(WEEK[day] for day in sorted(days))


def _day(text: str, expression: str) -> int:
    if text in WEEK:
        return WEEK.index(text)
    require(
        text.isdigit() and int(text) <= 7, "cron", expression, "days of the week from 0 (Sunday) to 7, or sun to sat"
    )
    return int(text)
