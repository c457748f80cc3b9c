"""The tokenising job as its users start it."""

from pathlib import Path

import pytest

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import Type


def test_smoke_then_a_training_reads_the_tokens(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "data")
    assert job("tokenize_dataset", "smoke", "--data", data) == 0
    assert "tokens of 64 captions" in capsys.readouterr().out
    first = read_snapshot(data)
    assert job("tokenize_dataset", "smoke", "--data", data) == 0 and read_snapshot(data) == first
    words = ["smoke", "--data", data, "--tokens", "tokens", "--output-folder", str(tmp_path / "run")]
    assert job("pretrain_clip", *words) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "meta.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--architecture", "ViT-B-33"], "--architecture: got 'ViT-B-33'"),
        (["--name", "a/b"], "--name: got 'a/b'"),
        (["--caption", "jpg"], "--caption: got 'jpg'"),
        (["--context-length", "0"], "--context-length: got 0"),
    ],
)
def test_wrong_settings_are_one_sentence(
    arguments: list[str], said: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("tokenize_dataset", "smoke", "--data", str(tmp_path / "data"), *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
