"""The adopting job as its users start it."""

import runpy
import sys
from pathlib import Path

import pytest

from pipeline.shards.snapshot import read_snapshot

JOB = Path(__file__).resolve().parents[2] / "jobs" / "adopt_dataset.py"


def run(*arguments: str) -> None:
    before, sys.argv = sys.argv, [str(JOB), *arguments]
    try:
        runpy.run_path(str(JOB), run_name="__main__")
    finally:
        sys.argv = before


def test_smoke_adopts_plain_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("smoke", str(tmp_path))
    snapshot = read_snapshot(str(tmp_path))
    assert snapshot.samples == 48 and snapshot.options["engine"] == "adopted" and snapshot.card == "drawn"
    assert "48 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["folder", "EMPTY"], "a folder with .tar files"),
        (["folder", "EMPTY", "--card", "drwan"], "card: 'drwan'"),
        (["folder", "EMPTY", "--processes-count", "-1"], "processes_count: -1"),
        (["fodler", "EMPTY"], "preset: 'fodler'"),
    ],
)
def test_wrong_settings_are_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*[str(tmp_path) if word == "EMPTY" else word for word in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and "Traceback" not in error
