"""The refresh job as its users start it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import webdataset

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import JOBS, Type


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_smoke_makes_a_snapshot_that_webdataset_reads(job: Type, tmp_path: Path) -> None:
    assert job("refresh_dataset", "smoke", "--output-folder", str(tmp_path)) == 0
    snapshot = read_snapshot(str(tmp_path))
    assert snapshot.samples == 64 and snapshot.options["source"]["size"] == 64
    pipe = webdataset.WebDataset([str(tmp_path / shard.tar) for shard in snapshot.shards], shardshuffle=False)
    read = list(pipe.decode("rgb8").to_tuple("jpg", "txt", "json"))
    assert len(read) == 64 and {image.shape for image, _, _ in read} == {(64, 64, 3)}
    assert all(text and columns["label"] for _, text, columns in read)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["url"], "one of class-masks, clips, coco, depth-maps"),
        (
            ["urls", "--url-list", "/no/such.parquet", "--output-folder", "OUT"],
            "--url-list: no such file or folder: '/no/such.parquet'",
        ),
        (["urls", "--url-list", "LIST", "--url-col", "link", "--output-folder", "OUT"], "--url-col: got 'link'"),
        (["urls", "--url-list", "EMPTY", "--output-folder", "OUT"], "at least one row"),
        (["urls", "--url-list", "LIST", "--output-folder", "OUT", "--image-size", "0"], "--image-size: got 0"),
        (
            ["urls", "--url-list", "LIST", "--output-folder", "OUT", "--encode-quality", "500"],
            "--encode-quality: got 500",
        ),
        (["urls", "--url-list", "LIST", "--output-folder", "OUT", "--number-sample-per-shard", "0"], "--number-sample"),
        (["urls", "--url-list", "LIST", "--output-folder", "OUT", "--timeout", "-1"], "--timeout: got -1"),
        (["folder", "--folder", "/no/such", "--output-folder", "OUT"], "--folder: no such file or folder: '/no/such'"),
        (["drawn", "--split", "tset", "--output-folder", "OUT"], "--split: got 'tset'"),
        (["drawn", "--engine", "img2dataset", "--output-folder", "OUT"], "--engine: got 'img2dataset'"),
        (["card", "drwan", "--output-folder", "OUT"], "card: got 'drwan'"),
        (["card", "BADCARD", "--output-folder", "OUT"], "tilte"),
        (["card", "esc50", "--source-options", "folds", "--output-folder", "OUT"], "--source-options: got 'folds'"),
        (["card", "esc50", "--source-options", "folds=[1", "--output-folder", "OUT"], "the value in YAML"),
        (["card", "esc50", "--source-options", "flods=[1]", "--output-folder", "OUT"], "flods"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_any_cluster_starts(
    arguments: list[str],
    said: str,
    job: Type,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = pandas.DataFrame({"url": ["http://x/a.jpg"]})
    frame.to_parquet(tmp_path / "list.parquet")
    frame.iloc[:0].to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "bad.yaml").write_text("name: bad\ntilte: x\n")
    places = {"LIST": "list.parquet", "EMPTY": "empty.parquet", "OUT": "out", "BADCARD": "bad.yaml"}
    monkeypatch.setattr("pipeline.stages.ray_session.connect", pytest.fail)
    monkeypatch.setattr("pipeline.stages.shard_tasks.connect", pytest.fail)
    typed = [str(tmp_path / places[word]) if word in places else word for word in arguments]
    assert job("refresh_dataset", *typed) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 2 and "Traceback" not in error


def test_options_of_the_source_replace_those_of_a_card(job: Type, tmp_path: Path) -> None:
    words = ["card", "drawn", "--source-options", "samples=3", "size=64", "split=val", "--processes-count", "0"]
    words += ["--resize-mode", "no"]
    assert job("refresh_dataset", *words, "--output-folder", str(tmp_path)) == 0
    snapshot = read_snapshot(str(tmp_path))
    assert snapshot.samples == 3 and snapshot.options["source"]["split"] == "val"


def test_a_private_ray_that_does_not_start_is_one_sentence(
    job: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray raises a plain exception where its processes take longer than 30 s."""

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", late)
    drawn = ["drawn", "--samples", "4", "--size", "64", "--processes-count", "1", "--output-folder", str(tmp_path)]
    assert job("refresh_dataset", *drawn) == 1
    error = capsys.readouterr().err
    assert "Ray did not start here (The current node timed out during startup.)" in error and "Traceback" not in error


def test_an_unknown_flag_exits_with_2(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("refresh_dataset", "urls", "--url-lst", "x", "--output-folder", "y") == 2
    assert "--url-list" in capsys.readouterr().err


def command(out: Path, *more: str) -> list[str]:
    sizes = ["--samples", "400", "--size", "64", "--number-sample-per-shard", "50"]
    return [sys.executable, str(JOBS / "refresh_dataset.py"), "drawn", *sizes, "--output-folder", str(out), *more]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("0*") if not path.name.endswith(".json")}


@pytest.mark.slow
@pytest.mark.alone
def test_killed_at_any_moment_and_run_again_it_ends_in_the_same_bytes(tmp_path: Path, ray_cluster: Any) -> None:
    environment = ray_cluster.environment
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, timeout=200)
    started = subprocess.Popen(command(tmp_path / "cut"), env=environment, start_new_session=True)
    until = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("*_stats.json")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait(timeout=30)
    assert not (tmp_path / "cut" / "_snapshots").exists()
    subprocess.run(command(tmp_path / "cut"), env=environment, check=True, timeout=200)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".tmp-*"))
    digests = {read_snapshot(str(tmp_path / name)).digest for name in ("cut", "whole")}
    assert len(digests) == 1
    counts = [json.loads(path.read_text())["count"] for path in sorted((tmp_path / "cut").glob("*_stats.json"))]
    assert counts == [50] * 8
