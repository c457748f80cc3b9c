"""Refreshing from a parent as its users start it: flags, exit codes, one sentence."""

import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from pipeline.shards.snapshot import read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from tests.conftest import picture

JOB = Path(__file__).resolve().parents[2] / "jobs" / "refresh_dataset.py"


class Job:
    """The urls job over a list of five pictures and a dead url, in this process."""

    def __init__(self, tmp_path: Path, serve: Any) -> None:
        self.server = serve({f"{number}.jpg": picture(number) for number in range(8)})
        self.list, self.out = tmp_path / "list.csv", tmp_path / "out"

    def rows(self, numbers: Any) -> None:
        urls = [f"{self.server.url}/{number}.jpg" for number in numbers]
        pandas.DataFrame({"url": urls, "caption": [f"number {number}" for number in numbers]}).to_csv(self.list)

    def __call__(self, *more: str) -> None:
        fixed = ["--url-list", str(self.list), "--caption-col", "caption", "--output-folder", str(self.out)]
        fixed += ["--allow-hosts", "127.0.0.1", "--processes-count", "0", "--image-size", "32"]
        before, sys.argv = sys.argv, [str(JOB), "urls", *fixed, "--number-sample-per-shard", "3", *more]
        try:
            runpy.run_path(str(JOB), run_name="__main__")
        finally:
            sys.argv = before


@pytest.fixture
def job(tmp_path: Path, serve: Any) -> Job:
    return Job(tmp_path, serve)


def test_latest_begins_a_folder_and_keeps_it_current(job: Job, tmp_path: Path) -> None:
    job.rows([0, 1, 2, 3, 4, 99])
    job("--parent", "latest")
    first = read_snapshot(str(job.out))
    job.rows([1, 2, 3, 4, 5, 99])
    opt_out = tmp_path / "opt-out.txt"
    opt_out.write_text(f"{job.server.url}/2.jpg\n")
    job("--parent", "latest", "--opt-out", str(opt_out))
    second = read_snapshot(str(job.out))
    assert (first.samples, second.samples, second.parent) == (5, 4, first.id)
    assert second.changes == {"added": 1, "removed": 1, "changed": 0, "kept": 3, "failed": 0, "opt_out": 1}
    assert second.dropped == {"http_4xx": 1, "opt_out": 1} and second.rows == 6
    job.server.requests.clear()
    job("--retry-failed", "--opt-out", str(opt_out))
    assert snapshot_ids(Folder(job.out)) == [first.id, second.id] and job.server.requests == []
    job("--opt-out", str(opt_out), "--purge")
    assert read_snapshot(str(job.out)).samples == 4 and len(snapshot_ids(Folder(job.out))) == 1


def test_a_floor_stops_the_job_with_exit_code_1(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.rows([0, 91, 92, 93, 1, 2])
    with pytest.raises(SystemExit) as stopped:
        job("--minimum-success", "0.5", "--minimum-success-after", "3")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "33.3% of 3 rows" in error and "http_4xx (2)" in error
    assert "Traceback" not in error and not snapshot_ids(Folder(job.out))
    job("--minimum-success", "0.3", "--minimum-success-after", "3")
    assert read_snapshot(str(job.out)).samples == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parent", "OUT@00009-x"], "parent: "),
        (["--parent", "/somewhere/else"], "parent: '/somewhere/else'"),
        (["--parent", "latest", "--image-size", "48"], "image_size: 48"),
        (["--opt-out", "/no/such.txt"], "opt_out: '/no/such.txt'"),
        (["--minimum-success", "20"], "minimum_success: 20"),
        (["--engine", "img2dataset", "--parent", "latest"], "engine: 'img2dataset'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    arguments: list[str], said: str, job: Job, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job.rows([0, 1])
    job()
    capsys.readouterr()
    caplog.set_level(logging.WARNING)
    with pytest.raises(SystemExit) as stopped:
        job(*[word.replace("OUT", str(job.out)) for word in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and "Traceback" not in error
    assert len(snapshot_ids(Folder(job.out))) == 1
