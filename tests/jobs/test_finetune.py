"""The fine-tuning job as users type it, with WiSE-FT behind it; wrong options in one sentence."""

import json
from pathlib import Path

import pytest

from pipeline.config import from_json, to_json
from tests.jobs.conftest import Type, load_job


def test_tune_then_average_then_evaluate(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, wise = str(tmp_path / "run"), str(tmp_path / "wise")
    assert job("finetune", "smoke", "--output-folder", run, "--learning-rate", "0.01") == 0
    assert job("average_checkpoints", "wise-ft", "--checkpoints", f"{run}/start", run, "--output", wise) == 0
    words = ("--classification", "drawn_shapes", "--evaluation-samples", "24", "--output", "result.json")
    tops = []
    for checkpoint in (f"{run}/start", run, wise):
        assert job("evaluate", "sets", "--checkpoint", checkpoint, *words) == 0
        tops.append(json.loads((tmp_path / "result.json").read_text())["metrics"]["classification/drawn_shapes/top1"])
    assert len(tops) == 3
    assert "classification" in capsys.readouterr().out
    assert job("finetune", "smoke", "--output-folder", run, "--learning-rate", "0.01") == 0  # finished: nothing to do


def test_presets_survive_being_saved() -> None:
    script = load_job("finetune")
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Finetune"], to_json(preset)) == preset


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "--card", "drawn_shpaes"], "drawn_shpaes"),
        (["smoke", "--card", ""], "card"),
        (["smoke", "--features", "tower"], "--features: got 'tower'"),
        (["smoke", "--pretrained", "nowhere"], "--pretrained: got 'nowhere'"),
        (["wise-ft"], "data"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("finetune", *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
