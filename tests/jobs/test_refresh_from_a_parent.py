"""Refreshing from a parent as its users start it: flags, exit codes, one sentence."""

import logging
from pathlib import Path
from typing import Any

import pandas
import pytest

from pipeline.shards.snapshot import read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from tests.conftest import image
from tests.jobs.conftest import Type


class Urls:
    """The urls job over a list of five images and a dead url, in this process."""

    def __init__(self, job: Type, tmp_path: Path, serve: Any) -> None:
        self._job = job
        self.server = serve({f"{number}.jpg": image(number) for number in range(8)})
        self.list, self.out = tmp_path / "list.csv", tmp_path / "out"

    def rows(self, numbers: Any) -> None:
        urls = [f"{self.server.url}/{number}.jpg" for number in numbers]
        pandas.DataFrame({"url": urls, "caption": [f"number {number}" for number in numbers]}).to_csv(self.list)

    def __call__(self, *more: str) -> int:
        fixed = ["--url-list", str(self.list), "--caption-col", "caption", "--output-folder", str(self.out)]
        fixed += ["--allow-hosts", "127.0.0.1", "--processes-count", "0", "--image-size", "32"]
        return self._job("refresh_dataset", "urls", *fixed, "--number-sample-per-shard", "3", *more)


@pytest.fixture
def urls(job: Type, tmp_path: Path, serve: Any) -> Urls:
    return Urls(job, tmp_path, serve)


def test_latest_begins_a_folder_and_keeps_it_current(urls: Urls, tmp_path: Path) -> None:
    urls.rows([0, 1, 2, 3, 4, 99])
    assert urls("--parent", "latest") == 0
    first = read_snapshot(str(urls.out))
    urls.rows([1, 2, 3, 4, 5, 99])
    opt_out = tmp_path / "opt-out.txt"
    opt_out.write_text(f"{urls.server.url}/2.jpg\n")
    assert urls("--parent", "latest", "--opt-out", str(opt_out)) == 0
    second = read_snapshot(str(urls.out))
    assert (first.samples, second.samples, second.parent) == (5, 4, first.id)
    assert second.changes == {"added": 1, "removed": 1, "changed": 0, "kept": 3, "failed": 0, "opt_out": 1}
    assert second.dropped == {"http_4xx": 1, "opt_out": 1} and second.rows == 6
    urls.server.requests.clear()
    assert urls("--retry-failed", "--opt-out", str(opt_out)) == 0
    assert snapshot_ids(Folder(urls.out)) == [first.id, second.id] and urls.server.requests == []
    assert urls("--opt-out", str(opt_out), "--purge") == 0
    assert read_snapshot(str(urls.out)).samples == 4 and len(snapshot_ids(Folder(urls.out))) == 1


def test_a_floor_stops_the_job_with_exit_code_1(urls: Urls, capsys: pytest.CaptureFixture[str]) -> None:
    urls.rows([0, 91, 92, 93, 1, 2])
    assert urls("--minimum-success", "0.5", "--minimum-success-after", "3") == 1
    error = capsys.readouterr().err
    assert "33.3% of 3 rows" in error and "http_4xx (2)" in error
    assert "Traceback" not in error and not snapshot_ids(Folder(urls.out))
    assert urls("--minimum-success", "0.3", "--minimum-success-after", "3") == 0
    assert read_snapshot(str(urls.out)).samples == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parent", "OUT@00009-x"], "--parent: "),
        (["--parent", "/somewhere/else"], "--parent: got '/somewhere/else'"),
        (["--parent", "latest", "--image-size", "48"], "--image-size: got 48"),
        (["--opt-out", "/no/such.txt"], "--opt-out: no such file or folder: '/no/such.txt'"),
        (["--minimum-success", "20"], "--minimum-success: got 20"),
        (["--engine", "img2dataset", "--parent", "latest"], "--engine: got 'img2dataset'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    arguments: list[str], said: str, urls: Urls, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    urls.rows([0, 1])
    assert urls() == 0
    capsys.readouterr()
    caplog.set_level(logging.WARNING)
    assert urls(*[word.replace("OUT", str(urls.out)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert len(snapshot_ids(Folder(urls.out))) == 1
