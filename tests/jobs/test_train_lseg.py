"""The job that trains LSeg: its smoke preset end to end, evaluated; the presets against the paper."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method
from tests.jobs.conftest import load_job


def test_smoke_trains_a_segmenter(tmp_path: Path, own_store: str) -> None:
    """Base classes of the card and the background; any words afterwards."""
    script = load_job("train_lseg")
    smoke = script["PRESETS"]["smoke"][1]
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    script["main"](replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(tmp_path / "run"))))
    (saved,) = Checkpoints(str(tmp_path / "run")).whole()
    method: Any = load_method(saved.folder.uri)
    assert saved.meta.step == 3 and method.config.class_names == (*load_card("drawn_base").classes, "background")
    (found,) = method.segment([torch.full((3, 40, 60), 90, dtype=torch.uint8)], ["disc", "zebra"])
    assert found.labels.shape == (40, 60)
    sets = ("drawn_val,words=drawn_base,unlabelled=background,background_word=background,samples=4",)
    metrics = evaluate(method, Evaluations(segmentation=sets).prepare())
    assert 0 <= metrics["seg/drawn_val/miou"] <= 1 and metrics["seg/drawn_val/samples"] == 4
    from mlflow import MlflowClient

    assert [model.name for model in MlflowClient(own_store).search_registered_models()] == ["lseg"]


def test_presets_are_the_papers() -> None:
    """SGD, 0.004 / 16 for each of a process's four images, ten times that for the decoder, poly 0.9."""
    presets = load_job("train_lseg")["PRESETS"]
    for name, backbone in (("paper-vit-l-16", "vit_large_patch16_384"), ("paper-resnet-101", "resnet101")):
        preset = presets[name][1]
        optimizer: Any = preset.run.optimizer
        assert preset.method.backbone == backbone and preset.method.text_tower == "ViT-B-32-quickgelu:openai"
        assert optimizer.learning_rate == 0.004 / 16 * preset.run.batch_size / preset.run.workers
        assert (optimizer.momentum, optimizer.weight_decay, optimizer.decay_power) == (0.9, 1e-4, 0.9)
        assert optimizer.tower_rates == {"decoder": 10.0} and preset.run.precision == "fp32"
        assert preset.method.image_size == 480 and preset.method.norm == "batch"


def test_presets_go_through_json() -> None:
    script = load_job("train_lseg")
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Train"], to_json(preset)) == preset


def test_wrong_options_are_one_sentence(job: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert job("train_lseg", "drawn") != 0
    assert "Traceback" not in capsys.readouterr().err
    assert job("train_lseg", "smoke", "--decay-power", "0") == 2
    assert "--decay-power" in capsys.readouterr().err
    assert job("train_lseg", "smoke", "--block", "none") == 2
    assert "block_depth" in capsys.readouterr().err
