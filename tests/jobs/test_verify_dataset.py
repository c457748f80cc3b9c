"""The verifying job as its users start it: what it prints, its JSON, its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.storage import Folder
from tests.jobs.conftest import Type


def test_smoke_finds_a_drawn_snapshot_well(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("verify_dataset", "smoke", str(tmp_path)) == 0
    assert "64 samples in 4 shards, all well" in capsys.readouterr().out


def test_damage_is_one_line_a_shard_and_exit_code_1(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: Any
) -> None:
    drawn_snapshot(Folder(tmp_path / "set"), samples=12, rows_per_shard=4)
    (tmp_path / "set" / "00001.tar").write_bytes(b"short")
    (tmp_path / "set" / "00002.parquet").unlink()
    assert (
        job("verify_dataset", "snapshot", str(tmp_path / "set"), "--json", str(tmp_path / "found.json"), "--decode")
        == 1
    )
    said = capsys.readouterr()
    lines = sorted(said.out.splitlines())
    assert len(lines) == 2 and lines[0].startswith("00001: 00001.tar is truncated: 5 bytes")
    assert lines[1] == "00002: 00002.parquet is missing"
    assert "2 of 3 shards are wrong" in said.err and "Traceback" not in said.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["problems"]) == ["00001", "00002"] and found["folder"] == [] and found["shards"] == 3


def test_no_snapshot_is_one_sentence(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("verify_dataset", "snapshot", str(tmp_path)) == 1
    assert "has no snapshot" in capsys.readouterr().err
