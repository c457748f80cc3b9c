"""Each fire once through crashes and restarts, no concurrent runs of a job, retries; with a fake Ray and history."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.stages.scheduling.scheduler import (
    AlreadyThere,
    Fire,
    Refused,
    Scheduler,
    Submitted,
    Unreachable,
    latest_first,
)
from pipeline.stages.scheduling.timetable import ScheduledJob, Timetable

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


class FakeRay:
    """A job server that can be away, refuse, or die just after it took a job."""

    def __init__(self) -> None:
        self.list: dict[str, Submitted] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.stopped: list[str] = []
        self.away = self.refuses = self.dies_after = False
        self.now = NOON

    def jobs(self) -> list[Submitted]:
        if self.away:
            raise Unreachable("nobody there")
        return list(self.list.values())

    def submit(self, job: ScheduledJob, id: str, environment: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        if self.away or self.refuses:
            raise Refused("no such folder") if self.refuses else Unreachable("nobody there")
        if id in self.list:
            raise AlreadyThere(id)
        self.environments[id] = dict(environment)
        self.list[id] = Submitted(
            id=id, status="RUNNING", started=self.now, ended=None, exit_code=None, message="", metadata=metadata
        )
        if self.dies_after:
            raise KeyboardInterrupt

    def log(self, id: str) -> str:
        return "INFO snapshot s3://b/x@00001-aaaaaaaaaaaa: 3\nINFO snapshot s3://b/x@00002-0123456789ab: 5 samples in"

    def stop(self, id: str) -> None:
        self.stopped.append(id)

    def end(self, id: str, status: str = "SUCCEEDED", code: int = 0) -> None:
        self.list[id] = replace(self.list[id], status=status, ended=self.now, exit_code=code, message=f"it {status}")


class FakeHistory:
    """Remembers through restarts."""

    def __init__(self) -> None:
        self.saved: dict[str, Fire] = {}

    def fires(self, job: str) -> list[Fire]:
        return latest_first(fire for fire in self.saved.values() if fire.job == job)

    def save(self, fire: Fire) -> None:
        self.saved[fire.id] = fire


class World:
    """A timetable, its scheduler and a clock."""

    def __init__(self, **settings: Any) -> None:
        job = ScheduledJob(**{"name": "a", "cron": "0 * * * *", "command": "x", **settings})
        self.timetable = Timetable(jobs=(job,))
        self.ray, self.history = FakeRay(), FakeHistory()
        self.restart()

    def restart(self) -> None:
        self.scheduler = Scheduler(self.timetable, self.ray, self.history)

    def tick(self, minutes: float = 0) -> list[str]:
        """Move the clock from noon and tick; all ids that Ray has."""
        self.ray.now = NOON + timedelta(minutes=minutes)
        self.scheduler.tick(self.ray.now)
        return list(self.ray.list)

    def states(self) -> dict[str, str]:
        return {fire.id: fire.state for fire in self.history.saved.values()}


def test_a_fire_is_submitted_once_and_its_end_recorded() -> None:
    world = World()
    assert world.tick(1) == world.tick(2) == ["a-20261122T1200Z"]
    world.ray.now += timedelta(minutes=3)
    world.ray.end("a-20261122T1200Z")
    world.tick(6)
    (fire,) = world.history.saved.values()
    assert (fire.state, fire.exit_code, fire.snapshot) == ("succeeded", 0, "s3://b/x@00002-0123456789ab")
    assert fire.submitted == NOON + timedelta(minutes=1) and fire.ended == NOON + timedelta(minutes=5)
    assert world.scheduler.idle


@pytest.mark.parametrize("keeps", ["both", "ray", "history"])
def test_a_restart_neither_misses_nor_doubles(keeps: str) -> None:
    """Ray loses its jobs when its head is recreated, and MLflow may be new: either one is enough."""
    world = World()
    world.tick(0)
    world.ray.end("a-20261122T1200Z")
    world.tick(1)
    if keeps == "ray":
        world.history = FakeHistory()
    if keeps == "history":
        world.ray = FakeRay()
    world.restart()
    known = world.tick(2)
    assert known == ([] if keeps == "history" else ["a-20261122T1200Z"])
    assert world.tick(60) == [*known, "a-20261122T1300Z"]


def test_a_crash_between_submitting_and_recording() -> None:
    world = World()
    world.ray.dies_after = True
    with pytest.raises(KeyboardInterrupt):
        world.tick(0)
    world.ray.dies_after = False
    assert world.history.saved == {}
    world.restart()
    assert world.tick(1) == ["a-20261122T1200Z"] and world.states() == {"a-20261122T1200Z": "running"}
    world.ray.end("a-20261122T1200Z", "FAILED", 1)
    world.tick(2)
    assert world.states() == {"a-20261122T1200Z": "failed"}


def test_of_several_missed_the_last_is_submitted_within_the_grace() -> None:
    world = World(misfire_grace_minutes=30)
    assert world.tick(5 * 60 + 20) == ["a-20261122T1700Z"]
    other = World(misfire_grace_minutes=30)
    assert other.tick(5 * 60 + 31) == [] and other.tick(6 * 60) == ["a-20261122T1800Z"]


def test_two_schedulers_at_once() -> None:
    world = World()
    second = Scheduler(world.timetable, world.ray, FakeHistory())
    world.tick(0)
    second.tick(NOON)
    assert list(world.ray.list) == ["a-20261122T1200Z"]
    # The second saw the list just before the first submitted.
    race = Scheduler(world.timetable, world.ray, FakeHistory())
    jobs, world.ray.jobs = world.ray.jobs, list  # type: ignore[method-assign]
    race.tick(NOON)
    world.ray.jobs = jobs  # type: ignore[method-assign]
    assert list(world.ray.list) == ["a-20261122T1200Z"]


def test_skip_leaves_out_what_comes_while_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    world = World(when_running="skip")
    world.tick(0)
    with caplog.at_level(logging.INFO):
        assert world.tick(61) == ["a-20261122T1200Z"]
    assert "a-20261122T1300Z skipped" in caplog.text and "a-20261122T1200Z was still running" in caplog.text
    world.ray.end("a-20261122T1200Z")
    world.restart()
    assert world.tick(65) == ["a-20261122T1200Z"], "skipped is skipped, also after a restart"
    assert world.tick(120) == ["a-20261122T1200Z", "a-20261122T1400Z"]


def test_wait_submits_later_and_only_the_latest() -> None:
    world = World(when_running="wait", misfire_grace_minutes=10)
    world.tick(0)
    assert world.tick(61) == ["a-20261122T1200Z"] and world.states()["a-20261122T1300Z"] == "waiting"
    world.tick(121)
    assert world.states()["a-20261122T1300Z"] == "skipped" and world.states()["a-20261122T1400Z"] == "waiting"
    world.restart()
    world.ray.end("a-20261122T1200Z")
    # Long after the grace, since it was not missed but waited.
    assert world.tick(170) == ["a-20261122T1200Z", "a-20261122T1400Z"]


def test_retries() -> None:
    world = World(retries=2, retry_delay_minutes=5)
    world.tick(0)
    world.ray.end("a-20261122T1200Z", "FAILED", 1)
    assert len(world.tick(1)) == 1 and len(world.tick(4)) == 1
    assert world.tick(6)[1:] == ["a-20261122T1200Z-retry-1"]
    world.ray.end("a-20261122T1200Z-retry-1", "FAILED", 1)
    world.restart()
    world.tick(7)
    assert world.tick(12)[2:] == ["a-20261122T1200Z-retry-2"]
    world.ray.end("a-20261122T1200Z-retry-2", "FAILED", 1)
    world.tick(13)
    assert len(world.tick(59)) == 3
    assert world.tick(60)[3:] == ["a-20261122T1300Z"]


def test_what_was_stopped_by_hand_is_not_retried() -> None:
    world = World(retries=2, retry_delay_minutes=0)
    world.tick(0)
    world.ray.end("a-20261122T1200Z", "STOPPED")
    world.tick(1)
    assert len(world.tick(2)) == 1 and world.states() == {"a-20261122T1200Z": "stopped"}


def test_a_head_that_died_loses_the_job_and_a_retry_brings_it_back() -> None:
    world = World(retries=1, retry_delay_minutes=0)
    world.tick(0)
    world.ray.list.clear()
    assert world.tick(1) == ["a-20261122T1200Z-retry-1"]
    assert world.states() == {"a-20261122T1200Z": "lost", "a-20261122T1200Z-retry-1": "running"}


def test_a_server_that_is_away_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.ray.away = True
    assert world.tick(0) == world.tick(1) == world.tick(2) == []
    assert caplog.text.count("does not answer") == 1
    world.ray.away = False
    assert world.tick(20) == ["a-20261122T1200Z"]


def test_a_job_that_cannot_be_submitted_does_not_hold_up_others() -> None:
    world = World()
    second = replace(world.timetable.jobs[0], name="b")
    world.timetable = Timetable(jobs=(*world.timetable.jobs, second))
    world.restart()
    submit = world.ray.submit

    def pick(job: ScheduledJob, *rest: Any) -> None:
        world.ray.refuses = job.name == "a"
        submit(job, *rest)

    world.ray.submit = pick  # type: ignore[method-assign]
    assert world.tick(0) == ["b-20261122T1200Z"]
    assert world.states() == {"a-20261122T1200Z": "failed", "b-20261122T1200Z": "running"}


def test_secrets_come_from_the_environment_and_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THE_PASSWORD", "hunter2")
    world = World(environment_from=("THE_PASSWORD",), environment={"MODE": "fast"})
    with caplog.at_level(logging.DEBUG):
        world.tick(0)
    assert world.ray.environments == {"a-20261122T1200Z": {"MODE": "fast", "THE_PASSWORD": "hunter2"}}
    assert "hunter2" not in caplog.text + str(world.history.saved)
    monkeypatch.delenv("THE_PASSWORD")
    other = World(environment_from=("THE_PASSWORD",))
    assert other.tick(0) == [] and other.states() == {"a-20261122T1200Z": "failed"}


def test_other_people_s_jobs_do_not_count() -> None:
    world = World()
    world.ray.list["raysubmit_1"] = Submitted(
        id="raysubmit_1", status="RUNNING", started=NOON, ended=None, exit_code=None, message="", metadata={}
    )
    assert world.tick(0) == ["raysubmit_1", "a-20261122T1200Z"]


def test_a_job_that_hangs_is_stopped_and_the_next_fire_starts() -> None:
    world = World(stop_after_minutes=30, retries=2)
    world.tick(0)
    world.tick(29)
    assert world.ray.stopped == []
    world.tick(30)
    assert world.ray.stopped == ["a-20261122T1200Z"] and world.states() == {"a-20261122T1200Z": "running"}
    world.restart()
    world.tick(31)
    assert world.ray.stopped == ["a-20261122T1200Z"] * 2  # asked again until it is done
    world.ray.end("a-20261122T1200Z", "STOPPED", 143)
    world.tick(32)
    (fire,) = world.history.saved.values()
    assert (fire.state, fire.message) == ("stopped", "stopped since it ran longer than 30 minutes")
    assert world.tick(60) == ["a-20261122T1200Z", "a-20261122T1300Z"]
