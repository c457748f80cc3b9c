"""The jobs of GLIPv2: their smoke presets end to end, stages that go on from one another, and the presets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations
from pipeline.runs.grounding import pretrain_grounding
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return load_job("pretrain_glipv2")


@pytest.fixture(scope="module")
def tuning() -> dict[str, Any]:
    return load_job("finetune_glipv2")


def smoke(script: dict[str, Any], store: str, folder: Path, **changes: Any) -> Any:
    preset = script["PRESETS"]["smoke"][1]
    run = replace(preset.run, output_folder=str(folder), steps=2)
    return replace(preset, run=run, tracking=Tracking(tracking_uri=store, system_metrics=False), **changes)


def loaded(folder: Path) -> Any:
    (found,) = Checkpoints(str(folder)).whole()
    return load_method(found.folder.uri).eval()


def test_pretraining_then_answers_with_their_evaluation(
    training: dict[str, Any], tuning: dict[str, Any], tmp_path: Path, own_store: str
) -> None:
    """Two runs of two steps; the second begins with the first one's weights and takes its answers from its data."""
    pretrain_grounding(smoke(training, own_store, tmp_path / "v2"))
    first = loaded(tmp_path / "v2")
    assert first.config.class_names == load_card("drawn_base").classes
    (boxes,) = first.ground([torch.full((3, 64, 80), 90, dtype=torch.uint8)], ["a red star"], [[(2, 10)]])
    assert boxes.masks.shape == (len(boxes), 28, 28)

    job = smoke(tuning, own_store, tmp_path / "answers", most_answers=12)
    sets = Evaluations(vqa=("drawn_val",), evaluation_samples=4)
    tuning["main"](replace(job, method=replace(job.method, start_from=str(tmp_path / "v2")), evaluations=sets))
    second = loaded(tmp_path / "answers")
    assert second.config.start_from.startswith(str(tmp_path / "v2")) and len(second.config.answers) == 12
    assert (
        second.answer([torch.full((3, 64, 80), 90, dtype=torch.uint8)], [["is it red?"]])[0][0] in second.config.answers
    )
    from mlflow import MlflowClient

    client = MlflowClient(own_store)
    assert {model.name for model in client.search_registered_models()} == {"glipv2", "glipv2_language"}
    metrics = [
        run.data.metrics for one in client.search_experiments() for run in client.search_runs([one.experiment_id])
    ]
    assert any("vqa/drawn_val/accuracy" in some for some in metrics)
    assert any({"train/inter_image", "train/language", "train/mask"} <= set(some) for some in metrics)


@pytest.mark.slow
def test_the_mask_head_and_captions_of_a_trained_network(
    training: dict[str, Any], tuning: dict[str, Any], tmp_path: Path, own_store: str
) -> None:
    """The mask stage leaves the network as it is; captions are written and evaluated."""
    pretrain_grounding(smoke(training, own_store, tmp_path / "v2"))
    first = loaded(tmp_path / "v2")
    job = smoke(training, own_store, tmp_path / "masks")
    pretrain_grounding(replace(job, method=replace(job.method, masks="head", start_from=str(tmp_path / "v2"))))
    masks = loaded(tmp_path / "masks")
    assert all(torch.equal(value, masks.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    assert not torch.equal(masks.segment.project.weight, first.segment.project.weight)

    job = smoke(tuning, own_store, tmp_path / "captions")
    method = replace(job.method, task="captions", start_from=str(tmp_path / "v2"), caption_tokens=8)
    sets = Evaluations(captioning=("drawn_val",), evaluation_samples=4)
    tuning["main"](replace(job, method=method, evaluations=sets))
    assert isinstance(loaded(tmp_path / "captions").describe([torch.zeros(3, 50, 70, dtype=torch.uint8)])[0], str)


def test_the_presets(training: dict[str, Any], tuning: dict[str, Any]) -> None:
    presets = {name: preset for name, (_, preset) in training["PRESETS"].items()}
    assert set(presets) == {"t", "b", "h", "masks", "drawn", "smoke"}
    backbones = [presets[name].method.backbone.split("_")[1] for name in ("t", "b", "h")]
    assert backbones == ["tiny", "base", "large"]
    assert [name for name in ("t", "b", "h") if "clip" in presets[name].method.text] == ["b"]
    for name in ("t", "b", "h"):
        method = presets[name].method
        assert (method.contrast_width, method.contrast_anchors, method.masked_tokens) == (64, 100, 0.15)
        assert method.masks == "no" and method.grounding.pseudo_boxes == "boxes"
    assert presets["masks"].method.masks == "head"
    for script, kind in ((training, "TrainGlipv2"), (tuning, "FinetuneGlipv2")):
        for _, preset in script["PRESETS"].values():
            assert from_json(script[kind], to_json(preset)) == preset
    tasks = {name: preset.method.task for name, (_, preset) in tuning["PRESETS"].items()}
    assert all(task in name for name, task in tasks.items() if name != "smoke")


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"start_from": "/nowhere/at/all"}, "start_from|checkpoint"), ({"backbone": "resnet50"}, "backbone")],
)
def test_settings_are_refused(
    changes: dict[str, Any], field: str, tuning: dict[str, Any], tmp_path: Path, own_store: str
) -> None:
    job = smoke(tuning, own_store, tmp_path / "run")
    with pytest.raises(SettingError, match=field):
        tuning["main"](replace(job, method=replace(job.method, **changes)))


def test_data_without_questions_are_refused(
    tuning: dict[str, Any], tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = smoke(tuning, own_store, tmp_path / "run", most_answers=1)
    with pytest.raises(SettingError, match="most_answers"):
        tuning["main"](job)
    job = smoke(tuning, own_store, tmp_path / "run")
    with pytest.raises(SettingError, match="answers: .* has questions with fewer answers or none"):
        tuning["main"](replace(job, method=replace(job.method, questions="json")))  # drawn samples have none there
    assert "Logging error" not in capsys.readouterr().err
