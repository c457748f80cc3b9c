"""The jobs of CLIP-ViL: stored grids, training with evaluation, presets, and questions about an image."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations
from pipeline.models.clipvil import ClipVil
from pipeline.models.towers import openclip
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.questions import RELATIONS
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method
from pipeline.training.optimizer import AdamW, AdamWWithSgd
from pipeline.training.run import prepare
from tests.jobs.conftest import Type, load_job


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return load_job("train_clipvil")


def test_stored_grids_then_training_then_a_question(
    training: dict[str, Any], job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way with ten annotators: grids, two steps from them, VQA's accuracy, and the five best answers."""
    data, run = tmp_path / "data", tmp_path / "run"
    drawn_snapshot(Folder(data), samples=16, card=None, more={"annotators": 10})
    grids = ("grid", "--data", str(data), "--checkpoint", "clipmill-tiny:untrained", "--image-size", "64", "64")
    assert job("embed_dataset", *grids, "--processes-count", "0") == 0
    assert "grid of 16 samples" in capsys.readouterr().out
    preset = training["PRESETS"]["smoke"][1]
    sets = Evaluations(vqa=(f"own={data}",), evaluation_samples=4)
    made = replace(
        preset,
        method=replace(preset.method, frozen=True, grid="grid"),
        run=replace(preset.run, data=str(data), output_folder=str(run), steps=2),
        tracking=Tracking(tracking_uri=own_store, system_metrics=False),
        evaluations=sets,
        most_answers=12,
        draw=0,
    )
    training["main"](made)
    (found,) = Checkpoints(str(run)).whole()
    method = load_method(found.folder.uri)
    assert isinstance(method, ClipVil) and len(method.config.answers) == 12
    from mlflow import MlflowClient

    client = MlflowClient(own_store)
    (one,) = [item for some in client.search_experiments() for item in client.search_runs([some.experiment_id])]
    assert {"vqa/own/accuracy", "vqa/own/constant", "train/answer"} <= set(one.data.metrics)
    assert one.data.tags["grid.teacher"] == method.facts["teacher"]
    kinds = ("answers", "attention")
    figures = [f.path for kind in kinds for f in client.list_artifacts(one.info.run_id, f"figures/{kind}")]
    assert figures == ["figures/answers/own.png", "figures/attention/own.png"]
    pixels = tmp_path / "image.png"
    Image.new("RGB", (90, 60), (200, 30, 30)).save(pixels)
    asked = ["picture", str(pixels), "--question", "how many stars are there?", "--checkpoint", str(run), "--json"]
    assert job("ask", *asked, "--output", str(tmp_path / "seen.png")) == 0
    answers = json.loads(capsys.readouterr().out)
    values = [one["probability"] for one in answers]
    assert len(answers) == 5 and values == sorted(values, reverse=True)
    assert {one["answer"] for one in answers} <= set(method.config.answers)
    with Image.open(tmp_path / "seen.png") as image:
        assert image.size[0] > 300


def test_asking_prints_a_table(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("ask", "smoke") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["answer", "probability"] and len(lines) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--question", " ", "--checkpoint", "x"), "question"),
        (("--question", "a?", "--checkpoint", "clipmill-tiny:untrained"), "a model that answers questions"),
        (("--question", "a?", "--checkpoint", "x", "--top", "0"), "top"),
        (("--question", "a?", "--checkpoint", "x", "--output", "seen.gif"), "output"),
    ],
)
def test_what_cannot_be_asked(
    words: tuple[str, ...], said: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "image.png")
    assert job("ask", "picture", str(tmp_path / "image.png"), *words) == 2
    assert said in capsys.readouterr().err


def test_the_presets(training: dict[str, Any]) -> None:
    presets = {name: preset for name, (_, preset) in training["PRESETS"].items()}
    for preset in presets.values():
        assert from_json(training["TrainClipVil"], to_json(preset)) == preset
    for name in ("vqa", "snli-ve", "gqa", "pretrain", "pretrain-answers"):
        method, run = presets[name].method, presets[name].run
        openclip.check(*openclip.parse_address(method.tower))  # type: ignore[misc]
        assert method.image_size == (384, 640) and isinstance(run.optimizer, AdamWWithSgd) and not method.frozen
        assert run.optimizer.sgd_momentum == 0 and run.clip_grad_norm == 1.0
    frozen = presets["vqa-frozen"]
    assert frozen.method.frozen and frozen.method.grid == "grid" and type(frozen.run.optimizer) is AdamW
    assert frozen.run.optimizer.learning_rate == presets["vqa"].run.optimizer.learning_rate
    with pytest.raises(SettingError, match="frozen: got True.*vqa-frozen"):
        replace(presets["vqa"], method=frozen.method)
    assert presets["snli-ve"].method.answers == RELATIONS and presets["snli-ve"].method.loss == "single"
    assert presets["pretrain"].method.questions == "" and presets["pretrain-answers"].method.asks
    assert presets["vqa"].run.optimizer.sgd_drops == (0.4,)
    assert [presets[name].method.most_cells for name in ("vqa", "pretrain")] == [0, 100]


def test_a_run_resumes_after_its_data_have_grown(training: dict[str, Any], job: Type, tmp_path: Path) -> None:
    """The answers are those of the snapshot on which it began."""
    data, run = tmp_path / "data", tmp_path / "run"
    draw = ("drawn", "--size", "64", "--processes-count", "0", "--output-folder", str(data))
    assert job("refresh_dataset", *draw, "--samples", "8") == 0
    preset = training["PRESETS"]["smoke"][1]
    start = replace(preset, run=replace(preset.run, data=str(data), output_folder=str(run)), draw=0)
    first = training["answered"](start)
    prepare(first.method, first.run)
    assert job("refresh_dataset", *draw, "--samples", "40", "--parent", "latest") == 0
    assert len(training["answered"](replace(start, run=replace(start.run, output_folder=""))).method.answers) > len(
        first.method.answers
    )
    again = training["answered"](start)
    assert again.method.answers == first.method.answers
    plan, _ = prepare(again.method, again.run)
    assert plan.snapshot.samples == 8
    with pytest.raises(SettingError, match="answers"):
        fewer = training["answered"](replace(start, most_answers=3))
        prepare(fewer.method, fewer.run)


def test_data_without_questions_are_refused(training: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    drawn_snapshot(Folder(tmp_path / "data"), samples=8, card=None, more={"questions": 0})
    preset = training["PRESETS"]["smoke"][1]
    run = replace(preset.run, data=str(tmp_path / "data"), output_folder=str(tmp_path / "run"))
    job = replace(preset, run=run, draw=0, tracking=Tracking(tracking_uri=own_store, system_metrics=False))
    with pytest.raises(SettingError, match="answers"):
        training["main"](job)
    with pytest.raises(SettingError, match="questions"):
        training["main"](replace(job, method=replace(job.method, questions="questions.json")))
    assert "boxes.json" in read_snapshot(str(tmp_path / "data")).fields
