"""The job of VideoCLIP: its smoke preset end to end, and its presets against the paper."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.evaluation.models import load_any
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, read_evaluation
from tests.evaluation.conftest import publish_fields
from tests.jobs.conftest import load_job


def test_smoke(tmp_path: Path, own_store: str) -> None:
    """Drawn videos get features; two epochs are planned; the checkpoint is evaluated and encodes."""
    script = load_job("pretrain_videoclip")
    smoke = script["PRESETS"]["smoke"][1]
    run = replace(smoke.run, output_folder=str(tmp_path / "run"))
    script["main"](replace(smoke, tracking=Tracking(tracking_uri=own_store, system_metrics=False), run=run))
    (checkpoint,) = Checkpoints(str(tmp_path / "run")).whole()
    assert checkpoint.meta.step == 3 and len(checkpoint.meta.plan) == 64
    assert sorted(path.name for path in (tmp_path / "run/plans").iterdir()) == [
        "epoch-00000.parquet",
        "epoch-00001.parquet",
    ]
    assert read_evaluation(checkpoint) is None
    method: Any = load_any(checkpoint.folder.uri, "cpu")
    features = method.encode_text(method.tokenizer(["a red disc is moving to the left"]))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(1))


def test_the_width_of_the_features_follows_the_data(tmp_path: Path) -> None:
    """Of any CLIP that made them; a width that was set and differs is refused before the work starts."""
    script = load_job("pretrain_videoclip")
    content = io.BytesIO()
    np.save(content, np.ones((4, 6), np.float32))
    folder = publish_fields(tmp_path / "data", [{"frames.npy": content.getvalue(), "json": b"{}"}] * 2).folder
    drawn = script["PRESETS"]["drawn"][1]
    job = replace(drawn, method=replace(drawn.method, features=""), run=replace(drawn.run, data=folder))
    assert script["with_width"](job).method.feature_width == 6
    with pytest.raises(SettingError, match="feature_width: got 128, expected 6"):
        script["with_width"](replace(job, method=replace(job.method, feature_width=128)))


def test_presets_are_the_papers() -> None:
    """The authors' how2.yaml and their fine-tuning on MSR-VTT."""
    presets = {name: preset for name, (_, preset) in load_job("pretrain_videoclip")["PRESETS"].items()}
    paper, tuned = presets["paper"], presets["fine-tune"]
    optimizer = paper.run.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (5e-5, 0.9, 0.98, 0.0)
    assert (paper.run.epochs, paper.run.warmup_steps, paper.run.clip_grad_norm, paper.run.workers) == (25, 1000, 2.0, 8)
    method = paper.method
    assert (method.pairs, method.cluster, method.candidates, method.frames) == (16, 32, 64, 32)
    assert (method.overlap.budget, method.overlap.clip_frames, method.text_tokens) == ((8, 64), (3, 32), 61)
    assert (method.bert, method.video_layers, method.normalise, method.logit_scale) == (
        "bert-base-uncased",
        6,
        False,
        1,
    )
    assert paper.run.batch_size == 8 * method.cluster and method.batches == "retrieved"
    assert (tuned.run.batch_size, tuned.run.epochs, tuned.run.warmup_steps) == (224, 10, 122)
    assert (tuned.method.objective, tuned.method.positives, tuned.method.pairs) == ("text_to_video", "whole", 1)
