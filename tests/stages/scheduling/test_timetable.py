"""Fire times compared with hand-made calendars, through both clock changes, and with brute force by cron's rules."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pipeline.config import from_yaml
from pipeline.errors import SettingError
from pipeline.stages.scheduling.timetable import (
    ScheduledJob,
    Timetable,
    fires,
    fires_after,
    last_fire,
    next_fire,
    submission_id,
)


def job(cron: str, timezone: str = "UTC", **more: Any) -> ScheduledJob:
    return ScheduledJob(name="refresh", cron=cron, timezone=timezone, command="python x.py", **more)


def at(text: str) -> datetime:
    """``2026-03-29 01:30`` in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def shown(times: list[datetime]) -> list[str]:
    return [f"{time.astimezone(UTC):%m-%d %H:%M}" for time in times]


@pytest.mark.parametrize(
    ("cron", "start", "expected"),
    [
        ("0 3 * * *", "2026-11-22 03:00", ["11-23 03:00", "11-24 03:00"]),
        ("*/20 * * * *", "2026-12-31 23:30", ["12-31 23:40", "01-01 00:00"]),
        ("0 0 29 2 *", "2026-01-01 00:00", ["02-29 00:00", "02-29 00:00"]),
        ("15 6 * * 0", "2026-11-22 06:15", ["11-29 06:15", "12-06 06:15"]),  # Sunday
        ("15 6 * * 7", "2026-11-22 06:00", ["11-22 06:15", "11-29 06:15"]),  # Sunday too
        ("15 6 * * 1", "2026-11-22 06:00", ["11-23 06:15", "11-30 06:15"]),  # Monday
        ("0 0 * * 5-7", "2026-11-23 00:00", ["11-27 00:00", "11-28 00:00", "11-29 00:00"]),
        ("0 0 * * sat-mon", "2026-11-24 00:00", ["11-28 00:00", "11-29 00:00", "11-30 00:00"]),
        ("0 0 * JAN Mon-Fri", "2026-11-24 00:00", ["01-01 00:00", "01-04 00:00"]),
        ("0 0 13 * fri", "2026-11-21 00:00", ["11-27 00:00", "12-04 00:00", "12-11 00:00", "12-13 00:00"]),
        ("@daily", "2026-11-22 12:00", ["11-23 00:00"]),
        ("@hourly", "2026-11-22 12:00", ["11-22 13:00"]),
        ("@weekly", "2026-11-23 12:00", ["11-29 00:00"]),
        ("@monthly", "2026-11-23 12:00", ["12-01 00:00"]),
    ],
)  # fmt: skip
def test_calendar(cron: str, start: str, expected: list[str]) -> None:
    assert shown(fires_after(job(cron), at(start), len(expected))) == expected


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # Berlin, 29 March 2026: 02:00 becomes 03:00 at 01:00 UTC. 02:30 does not exist: 03:30 stands for it.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28 00:00", ["03-28 01:30", "03-29 01:30", "03-30 00:30"]),
        ("0 3 * * *", "Europe/Berlin", "2026-03-28 12:00", ["03-29 01:00", "03-30 01:00"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29 00:40", ["03-29 01:00", "03-29 01:30", "03-29 02:00"]),
        # 25 October 2026: 03:00 becomes 02:00 at 01:00 UTC. 02:30 comes twice: the first counts.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", ["10-25 00:30", "10-26 01:30", "10-27 01:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25 00:30", ["10-26 01:30"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25 00:00", ["10-25 00:30", "10-25 01:30", "10-25 02:30"]),
        ("0 2,3 * * *", "Europe/Berlin", "2026-10-24 23:00", ["10-25 00:00", "10-25 02:00"]),
        # Lord Howe Island moves by half an hour; New York westwards; a zone without changes.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-02 20:00", ["10-03 15:45", "10-04 15:15"]),
        ("30 1 * * *", "America/New_York", "2026-10-31 12:00", ["11-01 05:30", "11-02 06:30"]),
        ("30 1 * * *", "Asia/Kolkata", "2026-10-31 12:00", ["10-31 20:00", "11-01 20:00"]),
    ],
)  # fmt: skip
def test_clock_changes(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert shown(fires_after(job(cron, zone), at(start), len(expected))) == expected


def reference(minute: set[int], hour: set[int], day: set[int], month: set[int], weekday: set[int]) -> list[datetime]:
    """Every fire of a quarter by looking at each minute of it; days and weekdays both have to fit (one is a star)."""
    time, found = at("2026-01-01 00:00"), []
    while time < at("2026-04-01 00:00"):
        fits = time.minute in minute and time.hour in hour and time.day in day and time.month in month
        if fits and time.isoweekday() % 7 in weekday:
            found.append(time)
        time += timedelta(minutes=1)
    return found


def test_a_quarter_by_brute_force() -> None:
    draws = random.Random(0)
    for _ in range(2):
        minute, hour = set(draws.sample(range(60), 2)), set(draws.sample(range(24), 3))
        month, weekday = set(draws.sample(range(1, 5), 2)), set(draws.sample(range(7), 3))
        fields = [",".join(map(str, sorted(values))) for values in (minute, hour, month, weekday)]
        expression = f"{fields[0]} {fields[1]} * {fields[2]} {fields[3]}"
        expected = reference(minute, hour, set(range(1, 32)), month, weekday)
        assert fires(job(expression), at("2026-01-01 00:00"), at("2026-03-31 23:59")) == expected, expression


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"])
def test_every_real_hour_fires_once(zone: str) -> None:
    for start in map(at, ("2026-03-07 00:00", "2026-03-28 00:00", "2026-10-03 00:00", "2026-10-24 00:00")):
        hourly = fires(job("0,30 * * * *", zone), start, start + timedelta(days=2))
        assert hourly == [start + timedelta(minutes=30) * number for number in range(2 * 48 + 1)]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Asia/Tokyo"])
def test_every_day_fires_once(zone: str) -> None:
    for hour in (1, 2, 3):
        daily = fires(job(f"30 {hour} * * *", zone), at("2026-01-02 00:00"), at("2026-12-31 00:00"))
        days = [time.astimezone(ZoneInfo(zone)).date() for time in daily]
        assert len(set(days)) == len(days) and max(days) - min(days) == timedelta(days=len(days) - 1)


def test_next_and_last_agree() -> None:
    one = job("17 */5 * * 1-5", "Europe/Berlin", misfire_grace_minutes=40_320)
    moment = at("2026-03-20 00:00")
    for _ in range(40):
        fire = next_fire(one, moment)
        assert fire is not None and fire > moment
        assert last_fire(one, fire) == fire and last_fire(one, fire - timedelta(seconds=1)) != fire
        moment = fire


def test_the_grace_limits_how_late() -> None:
    one = job("0 3 * * *", misfire_grace_minutes=60)
    assert last_fire(one, at("2026-11-22 02:59")) is None
    assert last_fire(one, at("2026-11-22 03:00")) == at("2026-11-22 03:00")
    assert last_fire(one, at("2026-11-22 04:00")) == at("2026-11-22 03:00")
    assert last_fire(one, at("2026-11-22 04:01")) is None


def test_ids_tell_job_and_time() -> None:
    fire = datetime(2026, 11, 22, 4, 0, tzinfo=ZoneInfo("Europe/Berlin"))
    assert submission_id(job("0 4 * * *"), fire) == "refresh-20261122T0300Z"
    assert submission_id(job("0 4 * * *"), fire, 2) == "refresh-20261122T0300Z-retry-2"


def test_an_impossible_date_never_fires() -> None:
    assert next_fire(job("0 0 31 2 *"), at("2026-01-01 00:00")) is None


@pytest.mark.parametrize(
    "cron",
    [
        "",
        "* * * *",
        "60 * * * *",
        "0 24 * * *",
        "0 0 * * 8",
        "0 0 * * mo",
        "0 0 * * 1-",
        "a b c d e",
        "0 0 0 * *",
        "@reboot",
        "0 0 * 13 *",
    ],
)
def test_wrong_expressions(cron: str) -> None:
    with pytest.raises(SettingError, match="cron"):
        job(cron)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "Refresh"}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "a/../b"}, "name"),
        ({"timezone": "Europe/Bonn"}, "timezone"),
        ({"timezone": "../../etc/passwd"}, "timezone"),
        ({"command": " "}, "command"),
        ({"retries": 11}, "retries"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "environment_from"),
        ({"environment": {"A B": "x"}}, "environment"),
        ({"misfire_grace_minutes": -1}, "misfire_grace_minutes"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        ScheduledJob(**{"name": "refresh", "cron": "0 0 * * *", "command": "x", **settings})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("jobs: [{name: a, cron: '0 0 * * *', command: x, colour: red}]", "colour"),
        ("jobs: []", "at least one"),
        ("jobs: [{name: a, cron: '0 0 * * *', command: x}, {name: a, cron: '1 0 * * *', command: y}]", "differ"),
        ("jobs: [{name: a, cron: '0 0 * * *', command: !!python/object/apply:os.system [ls]}]", "well-formed YAML"),
        ("- x", "Timetable|dictionary|instance"),
    ],
)
def test_files_are_checked(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text(text)
    with pytest.raises(SettingError, match=sentence):
        from_yaml(Timetable, tmp_path / "schedule.yaml")
