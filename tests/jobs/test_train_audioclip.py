"""The jobs of AudioCLIP and CLAP: their smoke presets end to end, and their presets against the papers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import ClapModel

from pipeline.evaluation.models import load_any, load_model
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, read_evaluation
from tests.jobs.conftest import load_job


def trained(script: dict[str, Any], main: str, folder: Path, store: str) -> Any:
    """The only checkpoint of a smoke run."""
    smoke = script["PRESETS"]["smoke"][1]
    tracking = Tracking(tracking_uri=store, system_metrics=False)
    script[main](replace(smoke, tracking=tracking, run=replace(smoke.run, output_folder=str(folder / "run"))))
    (checkpoint,) = Checkpoints(str(folder / "run")).whole()
    return checkpoint


def test_audioclip(tmp_path: Path, own_store: str) -> None:
    """Trained on samples of all kinds and evaluated on images; the CLIP in it opens in open_clip."""
    checkpoint = trained(load_job("train_audioclip"), "main", tmp_path, own_store)
    assert checkpoint.meta.step == 3
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None and "zeroshot/drawn_shapes/top1" in evaluation.metrics
    opened = open_clip.create_model(f"local-dir:{checkpoint.folder.path}").eval()
    method: Any = load_model(checkpoint.folder.uri)
    tokens = open_clip.get_tokenizer("clipmill-tiny")(["a red star"])
    assert torch.equal(opened.encode_text(tokens, normalize=True), method.encode_text(tokens))
    sound = 0.1 * torch.randn(2, 1, method.audio_reader().samples)
    features = method.encode_audio(sound)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert features.shape == (2, 32) and method.sample_rate == 16_000


def test_clap(tmp_path: Path, own_store: str) -> None:
    """Trained on sounds and captions, exported, and opened by transformers."""
    checkpoint = trained(load_job("train_clap"), "run_pretraining", tmp_path, own_store)
    assert checkpoint.meta.step == 2
    export = load_job("export_model")
    job = replace(export["PRESETS"]["hugging-face"][1], checkpoint=checkpoint.folder.uri, output=str(tmp_path / "out"))
    export["main"](job)
    theirs, ours = ClapModel.from_pretrained(tmp_path / "out"), load_any(checkpoint.folder.uri, "cpu")
    assert all(torch.equal(one, ours.model.state_dict()[name]) for name, one in theirs.state_dict().items())


def test_presets_are_the_papers() -> None:
    """The authors' protocols of ESC-50 and UrbanSound8K, and the three stages."""
    presets = {name: preset for name, (_, preset) in load_job("train_audioclip")["PRESETS"].items()}
    for name, rate, samples in (("paper-esc50", 5e-5, 220_500), ("paper-us8k", 1e-5, 176_400)):
        run, method = presets[name].run, presets[name].method
        optimizer = run.optimizer
        assert (run.batch_size, run.epochs, run.warmup_steps) == (64, 50, 0)
        assert (optimizer.learning_rate, optimizer.momentum, optimizer.nesterov) == (rate, 0.9, True)
        assert optimizer.weight_decay == 5e-4 and optimizer.exponential == pytest.approx(0.96**50, abs=1e-4)
        assert method.cut().samples == samples and method.cut().sample_rate == 44_100
        assert method.lock_image and method.lock_text and not method.lock_audio
        assert method.audio_tower == "esresnext-fbsp" and method.pairs() == {("audio", "text"): 1.0}
        augmentation = method.audio_augmentation
        assert (augmentation.invert, augmentation.time_scale, augmentation.noise) == (0.5, 1.5, 0.25)
        assert augmentation.noise_snr == (10, 120) and method.augment_audio
    stages = [presets[name].method for name in ("paper-tags", "paper-audio", "paper")]
    assert [stage.modalities for stage in stages[1:]] == [("audio", "image", "text")] * 2
    assert stages[0].modalities == ("audio",) and stages[0].audio_pretrained == "imagenet"
    assert [stage.lock_image and stage.lock_text for stage in stages] == [True, True, False]
    assert all(stage.cut().samples == 441_000 and stage.cut().channels == 2 for stage in stages)
    assert all(stage.audio_scale == 100 for stage in stages)
    clap = {name: preset for name, (_, preset) in load_job("train_clap")["PRESETS"].items()}["paper"].run
    assert (clap.batch_size, clap.epochs, clap.warmup_steps, clap.optimizer.weight_decay) == (2304, 45, 3200, 0)


def test_tags_take_the_classes_of_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The job fills in the names before anything starts."""
    script = load_job("train_audioclip")
    seen: list[Any] = []
    script["main"].__globals__["pretrain"] = lambda job, keeps: seen.append(job.method.class_names)
    preset = script["PRESETS"]["paper-tags"][1]
    script["main"](replace(preset, card="esc50", run=replace(preset.run, data="x", output_folder=str(tmp_path))))
    assert len(seen[0]) == 50 and all(isinstance(name, str) for name in seen[0])
