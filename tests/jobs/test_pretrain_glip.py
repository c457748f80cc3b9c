"""The job that trains GLIP: its smoke preset end to end, and its presets against the paper."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations
from pipeline.models.glip import Config
from pipeline.runs.grounding import pretrain_grounding
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("pretrain_glip")


def test_smoke_then_detection_and_a_second_run(
    script: dict[str, Any], tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detector of drawn data, drawn by the job of all detectors, and a run that begins with its weights."""
    smoke = script["PRESETS"]["smoke"][1]
    tracking = Tracking(tracking_uri=own_store, system_metrics=False)
    run = replace(smoke.run, output_folder=str(tmp_path / "run"))
    pretrain_grounding(replace(smoke, tracking=tracking, run=run))
    (found,) = Checkpoints(str(tmp_path / "run")).whole()
    method: Any = load_method(found.folder.uri)
    assert found.meta.step == 3 and method.config.class_names == load_card("drawn_base").classes
    (boxes,) = method.ground([torch.full((3, 64, 80), 90, dtype=torch.uint8)], ["a red star"], [[(2, 10)]])
    assert boxes.spans.unique().tolist() in ([0], [])

    detect = load_job("detect")
    preset = detect["PRESETS"]["smoke"][1]
    shown = replace(preset, checkpoint=str(tmp_path / "run"), output=str(tmp_path / "found.png"), json=True)
    options = {name: getattr(shown, name) for name in shown.__dataclass_fields__}
    detect["main"](detect["Detect"](**{**options, "words": ("star", "disc", "pentagram")}))
    assert {one["word"] for one in json.loads(capsys.readouterr().out)} <= {"star", "disc", "pentagram"}
    assert (tmp_path / "found.png").stat().st_size > 1000

    again = replace(smoke, method=replace(smoke.method, start_from=str(tmp_path / "run")))
    pretrain_grounding(
        replace(again, tracking=tracking, run=replace(run, output_folder=str(tmp_path / "second"), steps=1))
    )
    (second,) = Checkpoints(str(tmp_path / "second")).whole()
    assert load_method(second.folder.uri).config.start_from == found.folder.uri
    from mlflow import MlflowClient

    assert [model.name for model in MlflowClient(own_store).search_registered_models()] == ["glip"]


def test_the_presets_are_the_papers(script: dict[str, Any]) -> None:
    """Table 1 and section 4: A has no fusion; L has the large Swin, eight blocks and a million steps."""
    presets = {name: preset for name, (_, preset) in script["PRESETS"].items()}
    assert {"a", "b", "c", "t", "l", "drawn", "smoke"} == set(presets)
    assert [name for name in presets if not presets[name].method.fusion] == ["a"]
    assert presets["b"].method == presets["c"].method == Config(pretrained_backbone=True)
    large = presets["l"].method
    assert (large.backbone, large.blocks, large.drop_path) == ("swin_large_patch4_window12_384", 8, 0.4)
    assert [name for name in presets if presets[name].method.grounding.pseudo_boxes] == ["t", "l"]
    for name in "abct":
        run = presets[name].run
        assert (run.batch_size, run.epochs, run.warmup_steps, run.ema_decay) == (64, 30, 2000, 0.999)
        optimizer = run.optimizer
        assert (optimizer.learning_rate, optimizer.text_rate, optimizer.weight_decay) == (1e-4, 0.1, 1e-4)
        assert optimizer.first_learning_rate == pytest.approx(1e-4 * 0.001) and run.clip_grad_norm == 1.0
    run = presets["l"].run
    assert run.steps == 1_000_000 and run.optimizer.weight_decay == 0.01 and run.ema_decay is None


def test_presets_go_through_json(script: dict[str, Any]) -> None:
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Train"], to_json(preset)) == preset


def test_settings_are_refused_before_anything_is_drawn(script: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    """No such card, no such initial weights, no sidecar of pseudo boxes."""
    smoke = script["PRESETS"]["smoke"][1]
    tracking = Tracking(tracking_uri=own_store, system_metrics=False)
    for changes, field in (
        ({"base": "no_card"}, "card"),
        ({"method": replace(smoke.method, backbone="resnet50")}, "backbone"),
    ):
        with pytest.raises(SettingError, match=field):
            pretrain_grounding(replace(smoke, tracking=tracking, evaluations=Evaluations(), **changes))
