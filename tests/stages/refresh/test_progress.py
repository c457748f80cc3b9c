"""The progress line: correct numbers, few lines, and a stop at too many failures."""

import logging
import time

import pytest

from pipeline.errors import SettingError, TooManyFailures
from pipeline.shards.writer import ShardStats
from pipeline.stages.refresh import progress
from pipeline.stages.refresh.progress import Floor, Progress


def stats(count: int, successes: int, made: bool = True, size: int = 2_000_000) -> ShardStats:
    end = time.time() + 3600 if made else 0.0
    failed = count - successes
    return ShardStats(
        shard="00000",
        count=count,
        successes=successes,
        failed_to_download=failed,
        failed_to_resize=0,
        duration=1.0,
        start_time=end - 1,
        end_time=end,
        status_dict={},
        unit="",
        bytes=size,
        sha256="",
        fields=("jpg",),
        reasons={"timeout": failed} if failed else {},
    )


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_the_line_counts_only_what_this_run_made_for_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    counter = Progress(1000, Floor())
    counter.seen(stats(400, 200, made=False))
    clock.now += 10
    counter.seen(stats(100, 80))
    # 100 rows and 80 samples of 2 MB in 10 s; 500 rows left at 10 rows a second; 280 of 500 good.
    assert counter.line() == "500 of 1000 rows, 8 samples/s, 0.2 MB/s, 56.0 % good, 50 s left"


def test_it_is_quiet_between_two_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO)
    counter = Progress(10_000, Floor())
    for _ in range(250):
        clock.now += 0.1
        counter.seen(stats(10, 9))
    assert len(caplog.records) == 2
    counter.finish()
    assert caplog.records[-1].message == "dropped 250 rows: timeout"


def test_the_end_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO)
    counter = Progress(10, Floor())
    clock.now += 60
    counter.seen(stats(10, 10))
    counter.finish()
    assert [record.message[:16] for record in caplog.records] == ["10 of 10 rows, 0"]


def test_too_little_success_is_judged_late_enough_and_by_all_shards() -> None:
    floor = Floor(minimum_success=0.5, minimum_success_after=20)
    counter = Progress(100, floor)
    counter.seen(stats(10, 0))
    with pytest.raises(TooManyFailures, match=r"20.0% of 20 rows.*--minimum-success 0.5.*timeout \(16\)"):
        counter.seen(stats(10, 4))
    # Shards of an earlier run count too; a fraction equal to the floor is enough.
    counter = Progress(100, floor)
    counter.seen(stats(10, 10, made=False))
    counter.seen(stats(10, 0))


@pytest.mark.parametrize(("name", "value"), [("minimum_success", 1.5), ("minimum_success", -0.1)])
def test_a_floor_is_a_share(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        Floor(**{name: value})
    with pytest.raises(SettingError, match="minimum_success_after"):
        Floor(minimum_success_after=0)
