"""A line every ten seconds, with the time that is left."""

import logging

import pytest

from pipeline.loaders.work_progress import WorkProgress


def test_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One image in four seconds, twenty images: lines after 12, 24, ... seconds, none at the end."""
    now = [100.0]
    monkeypatch.setattr("pipeline.loaders.work_progress.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        progress = WorkProgress(logging.getLogger("x"), "detection", "images", 6)
        for _ in range(6):
            now[0] += 4
            progress.advance()
    assert caplog.messages == ["detection: 3 of 6 images in 12 s, 12 s left"]


def test_short_work_is_silent_and_unknown_totals_have_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = WorkProgress(logging.getLogger("x"), "evaluation", "samples")
        progress.advance(30)
    assert not caplog.messages and progress.line(60) == "evaluation: 30 samples in 60 s, 0.5/s"
