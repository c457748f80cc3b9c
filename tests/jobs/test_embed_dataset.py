"""The embedding job as its users start it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from tests.jobs.conftest import Type


def test_smoke_embeds_and_exports(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["smoke", "--data", str(tmp_path / "data"), "--export", str(tmp_path / "features")]
    assert job("embed_dataset", *words) == 0
    assert "64 rows in 1 files" in capsys.readouterr().out
    images = np.load(tmp_path / "features" / "img_emb" / "img_emb_0.npy")
    assert images.shape[0] == 64 and images.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(images.astype(np.float32), axis=1), 1, atol=2e-3)
    first = read_snapshot(str(tmp_path / "data"))
    assert job("embed_dataset", *words) == 0 and read_snapshot(str(tmp_path / "data")) == first


@pytest.mark.slow
def test_on_a_cluster_a_wrong_checkpoint_is_one_sentence(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: Any
) -> None:
    drawn_snapshot(Folder(tmp_path), samples=4)
    assert job("embed_dataset", "snapshot", "--data", str(tmp_path), "--checkpoint", "nowhere") == 2
    said = capsys.readouterr().err
    assert "checkpoint: got 'nowhere'" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["snapshot", "--data", "EMPTY", "--checkpoint", "x"], "has no snapshot", 1),
        (["snapshot", "--data", "EMPTY", "--checkpoint", "x", "--name", "a/b"], "--name: got 'a/b'", 2),
        (["snapshot", "--data", "EMPTY", "--checkpoint", "x", "--batch-size", "0"], "--batch-size: got 0", 2),
        (["smoke", "--export-rows", "0"], "--export-rows: got 0", 2),
    ],
)
def test_wrong_settings_are_one_sentence(
    arguments: list[str], said: str, code: int, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("embed_dataset", *[str(tmp_path) if word == "EMPTY" else word for word in arguments]) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
