"""The evaluation job as users type it: a table, a JSON file, an MLflow run; wrong options in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.models.method import build_method
from pipeline.models.vild import Vild
from tests.jobs.conftest import Type, load_job

FEW = ["--evaluation-samples", "32", "--evaluation-batch", "16"]


def test_smoke_prints_a_table_and_writes_json(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("evaluate", "smoke", "--output", "result.json") == 0
    table = capsys.readouterr().out
    assert "drawn_shapes" in table and "top-1" in table
    assert "drawn_val" in table and "i2t R@1" in table
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checkpoint"] == "clipmill-tiny:untrained"
    assert result["metrics"]["zeroshot/drawn_shapes/chance"] == pytest.approx(1 / 24)
    assert result["metrics"]["retrieval/drawn_val/samples"] == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]  # no tracking unless asked for


def test_a_run_of_its_own_and_more_metrics_in_it(job: Type, tmp_path: Path, own_store: str) -> None:
    common = ["--tracking-uri", own_store, "--experiment", "tried", *FEW]
    assert job("evaluate", "smoke", "--track", *common) == 0
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("tried").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["checkpoint"] == "clipmill-tiny:untrained"
    assert run.data.tags["mlflow.source.name"] == "jobs/evaluate.py"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.json", "figures"}
    assert (
        job("evaluate", "smoke", "--run-id", run.info.run_id, "--step", "7", "--zero-shot", "drawn_colours", *common)
        == 0
    )
    (point,) = client.get_metric_history(run.info.run_id, "zeroshot/drawn_colours/top1")
    assert point.step == 7
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_detector_is_measured_and_shown_in_the_run(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    method = build_method(Vild.smallest()).eval()
    monkeypatch.setattr("pipeline.evaluation.models.load_method", lambda address, device: method)
    asked = ["--detection", "drawn_val", "--evaluation-samples", "10", "--step", "7"]
    tracked = ["--track", "--tracking-uri", own_store, "--experiment", "tried", "--output", "result.json"]
    assert job("evaluate", "sets", "--checkpoint", "some/run", *asked, *tracked) == 0
    text = capsys.readouterr().out
    assert "detection" in text and "AP50 novel" in text and "mask AP" in text and "AR300" in text
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("tried").experiment_id])
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    (point,) = client.get_metric_history(run.info.run_id, "det/drawn_val/ap50_novel")
    assert point.step == 7 and point.value == metrics["det/drawn_val/ap50_novel"]
    figures = [file.path for file in client.list_artifacts(run.info.run_id, "figures/detections")]
    assert figures == ["figures/detections/drawn_val.png"]


@pytest.mark.parametrize("preset", ["drawn", "stamps", "imagenet", "sets", "smoke"])
def test_presets_name_sets_that_exist(preset: str) -> None:
    from pipeline.dataset import load_card

    for one in load_job("evaluate")["PRESETS"][preset][1].evaluations.sets():
        card = load_card(one.data)
        assert card.classes or one.kind == "retrieval"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sets", "--checkpoint", "x"], "at least one set"),
        (["smoke", "--zero-shot", "drawn_shpaes"], "drawn_shpaes"),
        (["smoke", "--evaluation-samples", "0"], "--evaluation-samples: got 0"),
        (["smoke", "--classes", "missing.txt"], "--classes: no such file or folder: 'missing.txt'"),
        (["smoke", "--track", "--run-id", "a"], "either --run-id or --track"),
        (["smoke", "--run-id", "0" * 32, "--tracking-uri", "sqlite:///empty.db"], "--run-id"),
        (["smoke", "--track", "--tracking-uri", "http://127.0.0.1:9"], "MLflow server that answers"),
        (["smoke", "--detection", "drawn_shpaes"], "drawn_shpaes"),
        (
            ["smoke", "--detection", "drawn_val", "--detection-words", "missing.txt"],
            "--detection-words: no such file or folder: 'missing.txt'",
        ),
        (["smoke", "--detection", "drawn_val"], "a method with `predict`"),
        (["smoke", "--checkpoint", "nowhere"], "--checkpoint: got 'nowhere'"),
        (["samll"], "preset: got 'samll'"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("evaluate", *arguments) in (1, 2)
    out, error = capsys.readouterr()
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
    assert out == ""


@pytest.mark.parametrize(("kind", "settings"), [("zero_shot", 2), ("classification", 1), ("retrieval", 0)])
def test_the_imagenet_preset_takes_sets_of_every_kind(kind: str, settings: int) -> None:
    """Its classes and prompts are not those of a set that has none, and nobody typed them."""
    script = load_job("evaluate")
    asked = replace(script["PRESETS"]["imagenet"][1].evaluations, **{kind: ("drawn_shapes",)})
    used = script["with_used_settings"](asked)
    assert [used.classes, used.templates].count("imagenet") == settings
    used._check_used(used.sets())
