"""The adopting job as its users start it."""

from pathlib import Path

import pytest

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import Type


def test_smoke_adopts_plain_tars(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("adopt_dataset", "smoke", str(tmp_path)) == 0
    snapshot = read_snapshot(str(tmp_path))
    assert snapshot.samples == 48 and snapshot.options["engine"] == "adopted" and snapshot.card == "drawn"
    assert "48 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["folder", "EMPTY"], "a folder with .tar files"),
        (["folder", "EMPTY", "--card", "drwan"], "--card: got 'drwan'"),
        (["folder", "EMPTY", "--processes-count", "-1"], "--processes-count: got -1"),
        (["fodler", "EMPTY"], "preset: got 'fodler'"),
    ],
)
def test_wrong_settings_are_one_sentence(
    arguments: list[str], said: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("adopt_dataset", *[str(tmp_path) if word == "EMPTY" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
