"""The pre-training job: its smoke preset end to end, its presets, its errors."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.config import from_json, run_job, to_json
from pipeline.errors import DataError, StorageError
from pipeline.evaluation.suite import Evaluations
from pipeline.shards.lease import lease
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method, read_evaluation
from tests.jobs.conftest import JOBS, Type, load_job

JOB = JOBS / "pretrain_clip.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("pretrain_clip")


@pytest.fixture(scope="module")
def store(migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """A store of this file's own."""
    path = shutil.copy(migrated_store, tmp_path_factory.mktemp("mlflow"))
    return Tracking(tracking_uri=f"sqlite:///{path}", system_metrics=False)


def test_smoke(
    script: dict[str, Any],
    store: Tracking,
    make_snapshot: Callable[..., Snapshot],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Drawn, trained, evaluated, recorded; started again it is finished; another setting is another run."""
    smoke = script["PRESETS"]["smoke"][1]
    smoke = replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(tmp_path / "run")))
    script["run_pretraining"](smoke)
    (checkpoint,) = Checkpoints(str(tmp_path / "run")).whole()
    assert checkpoint.meta.step == 4
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None
    assert {"zeroshot/drawn_shapes/top1", "retrieval/drawn_val/i2t_r1"} <= set(evaluation.metrics)

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    from mlflow import MlflowClient

    client = MlflowClient(store.tracking_uri)
    run = client.get_run(record["tracking_run"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["zeroshot/drawn_shapes/top1"] == evaluation.metrics["zeroshot/drawn_shapes/top1"]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert run.inputs.dataset_inputs[0].dataset.digest == record["digest"][:36]
    (version,) = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    assert version.tags["checkpoint"] == checkpoint.folder.uri

    opened = open_clip.create_model(f"local-dir:{checkpoint.folder.path}").eval()
    method = load_method(checkpoint.folder.uri)
    tokens = open_clip.get_tokenizer("clipmill-tiny")(["a red star"])
    assert torch.equal(opened.encode_text(tokens, normalize=True), method.encode_text(tokens))

    assert not Path(record["snapshot"].rpartition("@")[0]).exists()  # what was drawn goes with the job
    with caplog.at_level("INFO"):
        script["run_pretraining"](smoke)
    assert "is finished: 4 steps" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == record


def test_a_drawing_job_leaves_nothing_in_the_temporary_folder(
    script: dict[str, Any],
    store: Tracking,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Nor a model version that would point to a checkpoint which is gone; also where the training fails."""
    from mlflow import MlflowClient

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    smoke = script["PRESETS"]["smoke"][1]
    settings = replace(smoke.run, steps=1, log_every_steps=1)
    smoke = replace(smoke, tracking=replace(store, experiment="left"), run=settings, evaluations=Evaluations())
    with caplog.at_level("INFO"):
        script["run_pretraining"](smoke)
    assert "is deleted; --output-folder FOLDER keeps it" in caplog.text
    client = MlflowClient(store.tracking_uri)
    experiment = client.get_experiment_by_name("left")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and not client.search_model_versions(f"run_id = '{run.info.run_id}'")

    monkeypatch.setattr("pipeline.runs.train.launch", lambda *_: (_ for _ in ()).throw(DataError("a damaged shard")))
    with pytest.raises(DataError, match="a damaged shard"):
        script["run_pretraining"](smoke)
    assert not list(tmp_path.glob("clipmill-pretrain-*"))


def test_presets_are_the_papers(script: dict[str, Any]) -> None:
    """Radford et al. 2021, tables 18 to 20 of appendix F."""
    presets = {name: preset for name, (_, preset) in script["PRESETS"].items()}
    assert set(presets) == {"paper-vit-b-32", "paper-vit-b-16", "paper-rn50", "one-node", "demo", "smoke"}
    for name, architecture in {
        "paper-vit-b-32": "ViT-B-32",
        "paper-vit-b-16": "ViT-B-16",
        "paper-rn50": "RN50",
    }.items():
        run, method = presets[name].run, presets[name].method
        assert method.architecture == architecture and method.crop == "square" and method.flip == 0
        assert (run.batch_size, run.epochs, run.steps, run.warmup_steps) == (32768, 32, None, 2000)
        assert (run.optimizer.learning_rate, run.optimizer.weight_decay, run.optimizer.beta1) == (5e-4, 0.2, 0.9)
        betas = (0.999, 1e-8) if name == "paper-rn50" else (0.98, 1e-6)
        assert (run.optimizer.beta2, run.optimizer.epsilon) == betas
        assert (method.temperature, method.max_logit_scale) == (0.07, 100)


def test_presets_go_through_json(script: dict[str, Any]) -> None:
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Pretrain"], to_json(preset)) == preset


def test_flags_reach_the_config(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    got: list[Any] = []
    flags = {
        "data": "/d",
        "output-folder": "/o",
        "workers": "2",
        "batch-size": "64",
        "epochs": "3",
        "steps": "7",
        "architecture": "RN50",
        "pretrained": "openai",
        "precision": "bf16",
        "checkpoint-every-steps": "5",
        "evaluate-every-steps": "6",
        "tracking-uri": "sqlite:////x",
        "experiment": "e",
        "learning-rate": "0.1",
        "seed": "9",
        "caption": "json:title",
        "loader-workers": "1",
        "cpus-per-worker": "3",
    }
    monkeypatch.setattr(sys, "argv", [str(JOB), "demo", *(word for k, v in flags.items() for word in (f"--{k}", v))])
    run_job(script["PRESETS"], got.append)
    run, method = got[0].run, got[0].method
    assert (run.data, run.output_folder, run.workers, run.batch_size, run.epochs, run.steps) == (
        "/d",
        "/o",
        2,
        64,
        3,
        7,
    )
    assert (method.architecture, method.pretrained, run.precision, run.seed) == ("RN50", "openai", "bf16", 9)
    assert (run.checkpoint_every_steps, run.evaluate_every_steps, run.optimizer.learning_rate) == (5, 6, 0.1)
    assert (run.loader.loader_workers, run.cluster.cpus_per_worker, run.caption) == (1, 3, "json:title")
    assert (got[0].tracking.tracking_uri, got[0].tracking.experiment) == ("sqlite:////x", "e")


def test_a_second_training_in_the_folder_is_refused(
    script: dict[str, Any],
    store: Tracking,
    make_snapshot: Callable[..., Snapshot],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the first one lives; nothing of it is touched."""
    monkeypatch.setattr("pipeline.shards.lease.BEAT_SECONDS", 0.05)
    smoke = script["PRESETS"]["smoke"][1]
    data, output = make_snapshot((20,)).folder, str(tmp_path / "run")
    second = replace(smoke, tracking=store, run=replace(smoke.run, data=data, output_folder=output))
    with lease(Folder(output), "a training"):
        with pytest.raises(StorageError, match=r"a training \(process \d+ on .*\) is at work here"):
            script["run_pretraining"](second)
        # The heartbeat of the first one writes through a temporary file.
        assert all(path.name.startswith(("_", ".tmp-")) for path in (tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["papre-vit"], "error: preset: got 'papre-vit', expected one of paper-vit-b-32"),
        (["demo", "--output-folder", "{tmp}/run"], "error: data: nothing given, expected"),
        (["demo", "--data", "{data}"], "error: output_folder: nothing given, expected"),
        (["demo", "--data", "{tmp}/none", "--output-folder", "{tmp}/run"], "has no snapshot"),
        (
            ["demo", "--data", "{data}", "--output-folder", "{tmp}/run", "--architecture", "ViT-B-33"],
            "error: --architecture: got 'ViT-B-33'",
        ),
        (
            ["demo", "--batch-size", "64", "--workers", "3"],
            "error: --batch-size: got 64, expected a multiple of",
        ),
        (["demo", "--data", "{data}", "--output-folder", "{tmp}/run", "--zero-shot", "nothing"], "nothing"),
    ],
)
def test_bad_settings_are_one_sentence(
    job: Type,
    capsys: pytest.CaptureFixture[str],
    make_snapshot: Callable[..., Snapshot],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    """Before a cluster or a tracking server is asked for, and before anything is written."""
    data = make_snapshot((3,)).folder
    filled = [word.format(tmp=tmp_path, data=data) for word in words]
    assert job("pretrain_clip", *filled) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_the_script_can_be_the_entry_point() -> None:
    assert JOB.read_text().startswith("#!/usr/bin/env python\n")
    assert os.access(JOB, os.X_OK)
    assert "ray job submit --working-dir . -- python jobs/pretrain_clip.py" in JOB.read_text()
