"""The queue against servers that are away, slow, or refuse."""

import logging
import threading
import time

import pytest

from pipeline.tracking import writer as module
from pipeline.tracking.writer import MetricWriter, Point


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.0)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)


class Server:
    """Keeps what it gets; refuses names that begin with "bad"; can be away."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.requests = 0
        self.away = False

    def send(self, points: list[Point]) -> None:
        self.requests += 1
        if self.away:
            raise ConnectionError("away")
        if any(point.name.startswith("bad") for point in points):
            raise ValueError("bad name")
        self.points += points


def refuses(error: Exception) -> bool:
    return isinstance(error, ValueError)


def test_metrics_arrive_in_order_and_in_batches() -> None:
    server = Server()
    writer = MetricWriter(server.send, refuses)
    for step in range(2500):
        writer.put({"loss": step / 10}, step)
    assert writer.close(10) == 0
    assert [point.step for point in server.points] == list(range(2500))
    assert server.points[7].value == 0.7
    assert server.requests < 2500


def test_put_does_not_wait_for_a_slow_server() -> None:
    gate = threading.Event()
    writer = MetricWriter(lambda points: gate.wait(5) and None, refuses)
    start = time.perf_counter()
    for step in range(1000):
        writer.put({"loss": 1.0}, step)
    assert time.perf_counter() - start < 1.0
    gate.set()
    assert writer.close(10) == 0


def test_nothing_is_lost_while_the_server_is_away_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.away = True
    writer = MetricWriter(server.send, refuses)
    for step in range(20):
        writer.put({"loss": 1.0}, step)
    while server.requests < 3:
        time.sleep(0.01)
    server.away = False
    assert writer.close(10) == 0
    assert [point.step for point in server.points] == list(range(20))
    assert caplog.text.count("does not answer") == 1
    assert caplog.text.count("answers again; 0 items were lost meanwhile") == 1


def test_what_is_never_sent_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.away = True
    writer = MetricWriter(server.send, refuses, limit=5)
    with caplog.at_level(logging.WARNING):
        for step in range(8):
            writer.put({"loss": 1.0}, step)
        start = time.perf_counter()
        dropped = writer.close(0.2)
    assert time.perf_counter() - start < 3
    assert dropped == 8
    assert "did not take it: 8 values of metrics at steps 0 to 7" in caplog.text


def test_what_was_lost_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """Metrics by number and steps, ten other tasks by name; also what hangs in a request that has no end."""
    hung = threading.Event()
    writer = MetricWriter(lambda points: hung.wait(20) and None, refuses)
    writer.put({"loss": 1.0, "lr": 0.1}, 7)
    while not writer._under_way:
        time.sleep(0.01)
    writer.put({"loss": 1.0}, 9)
    for number in range(12):
        writer.do(lambda: None, f"figure {number}")
    assert writer.close(0.1) == 15
    assert writer.close(0.1) == 15
    hung.set()
    (message,) = (record.getMessage() for record in caplog.records)
    figures = ", ".join(f"figure {number}" for number in range(10))
    assert message.endswith(f"did not take it: 3 values of metrics at steps 7 to 9, {figures}, 2 more")


def test_an_end_without_a_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that rests is asked at once; one that stays away is given up after some questions."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    server = Server()
    server.away = True
    writer = MetricWriter(server.send, refuses)
    writer.put({"loss": 1.0}, 1)
    while server.requests < 5:
        time.sleep(0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 60.0)
    monkeypatch.setattr(module, "FIRST_PAUSE", 60.0)
    time.sleep(0.2)
    asked = server.requests
    start = time.perf_counter()
    assert not writer.flush(30)
    assert server.requests == asked + 1
    server.away = False
    assert writer.flush(30) and len(server.points) == 1
    assert time.perf_counter() - start < 5


def test_a_full_queue_loses_the_oldest() -> None:
    server = Server()
    there = threading.Event()
    writer = MetricWriter(server.send, refuses, is_there=there.is_set, limit=5)
    for step in range(50):
        writer.put({"loss": 1.0}, step)
    there.set()
    dropped = writer.close(10)
    steps = [point.step for point in server.points]
    assert steps == sorted(steps) and steps[-1] == 49
    assert dropped + len(steps) == 50


def test_one_refused_metric_does_not_take_the_others_with_it(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    writer = MetricWriter(server.send, refuses)
    for step in range(30):
        writer.put({"bad name" if step == 13 else "loss": 1.0}, step)
    assert writer.close(10) == 1
    assert [point.step for point in server.points] == [step for step in range(30) if step != 13]
    assert "refused bad name" in caplog.text


def test_refusals_without_end_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """As those of a server that has lost the run."""
    writer = MetricWriter(Server().send, refuses)
    for step in range(50):
        writer.put({"bad": 1.0}, step)
    assert writer.close(10) == 50
    assert caplog.text.count("refused bad") == 10 and caplog.text.count("only counted") == 1


def test_tasks_keep_their_place_and_a_failing_one_is_dropped() -> None:
    server = Server()
    seen: list[int] = []
    writer = MetricWriter(server.send, refuses)

    def fail() -> None:
        raise ValueError("no")

    writer.put({"a": 1.0}, 1)
    writer.do(lambda: seen.append(len(server.points)), "look")
    writer.do(fail, "failing task")
    writer.put({"a": 1.0}, 2)
    assert writer.flush(10)
    assert seen == [1]
    assert len(server.points) == 2
    assert writer.close(10) == 1


def test_a_server_that_does_not_answer_is_not_asked() -> None:
    server = Server()
    writer = MetricWriter(server.send, refuses, is_there=lambda: False)
    writer.put({"a": 1.0}, 1)
    assert not writer.flush(0.2)
    assert writer.close(0.1) == 1
    assert server.requests == 0


def test_only_metrics_that_nobody_waits_for_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child run has a dozen uploads; a pause before each would make a job of many small runs wait for minutes."""
    monkeypatch.setattr(module, "LINGER", 60.0)
    server, done = Server(), threading.Event()
    writer = MetricWriter(server.send, refuses)
    writer.put({"loss": 1.0}, 1)
    writer.put({"loss": 2.0}, 2)
    assert not server.points
    for _ in range(20):
        writer.do(lambda: None, "an upload")
    writer.do(done.set, "the last upload")
    assert done.wait(10)
    assert [point.step for point in server.points] == [1, 2] and server.requests == 1
    writer.put({"loss": 3.0}, 3)
    assert writer.flush(10) and server.points[-1].step == 3
    writer.put({"loss": 4.0}, 4)
    assert writer.close(10) == 0 and server.points[-1].step == 4
