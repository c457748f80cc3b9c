"""Features for few-shot methods and of frames of videos, made by the embedding job."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.loaders.samples import Samples
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.filmed import draw_clip
from pipeline.stages.annotate.frame_features import read_frame_features
from pipeline.stages.annotate.view_features import read_views


def test_raw_features_of_views(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn_snapshot(Folder(tmp_path), samples=4)
    words = ["views", "--data", str(tmp_path), "--checkpoint", "clipmill-tiny:untrained", "--views", "2"]
    assert job("embed_dataset", *words, "--processes-count", "0") == 0
    assert "views of 4 samples" in capsys.readouterr().out
    assert read_views(read_snapshot(str(tmp_path))).features.shape[:2] == (4, 3)


def test_views_are_not_exported(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["views", "--data", str(tmp_path), "--checkpoint", "x", "--export", str(tmp_path / "out")]
    assert job("embed_dataset", *words) == 2
    assert "export:" in capsys.readouterr().err


def test_raw_features_of_frames(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn_snapshot(Folder(tmp_path), samples=3, card=None, more={"video": True, "clip_seconds": 2.0})
    words = ["frames", "--data", str(tmp_path), "--checkpoint", "clipmill-tiny:untrained", "--processes-count", "0"]
    assert job("embed_dataset", *words, "--frames-per-second", "4") == 0
    assert "frames of 3 samples" in capsys.readouterr().out
    snapshot = read_snapshot(str(tmp_path))
    found = read_frame_features(Folder(tmp_path), snapshot.shards[0])
    assert [found[row].times.tolist() for row in range(3)] == [[number / 4 for number in range(8)]] * 3
    assert job("embed_dataset", *words, "--frames-per-second", "2") == 1
    assert "another --name keeps both" in capsys.readouterr().err


def test_drawn_videos_are_stored_byte_for_byte_as_typed(job: Any, tmp_path: Path) -> None:
    words = ["drawn", "--split", "events", "--samples", "2", "--size", "64", "--video", "--clip-seconds", "2"]
    assert job("refresh_dataset", *words, "--output-folder", str(tmp_path), "--processes-count", "0") == 0
    samples = Samples(read_snapshot(str(tmp_path)))
    for number in range(2):
        clip, stored = draw_clip("events", 0, number, 64, 2.0), samples[number]
        assert stored.fields["mp4"] == clip.mp4 and stored.fields["txt"].decode() == clip.caption
        assert json.loads(stored.fields["json"])["timed_captions"] == clip.columns["timed_captions"]
