"""The jobs of CLIP4Clip and ActionCLIP: their smoke presets end to end, and their presets against the papers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.evaluation.models import load_any
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.frames import FrameSampling
from pipeline.models.actionclip import TEMPLATES, ActionClip
from pipeline.models.clip4clip import Clip4Clip
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.motion import MOTIONS
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, read_evaluation
from tests.jobs.conftest import load_job


def trained(job: str, main: str, folder: Path, store: str, **changes: Any) -> Any:
    """The only checkpoint of a smoke run."""
    script = load_job(job)
    smoke = script["PRESETS"]["smoke"][1]
    tracking = Tracking(tracking_uri=store, system_metrics=False)
    run = replace(smoke.run, output_folder=str(folder / "run"))
    script[main](replace(smoke, tracking=tracking, run=run, **changes))
    (checkpoint,) = Checkpoints(str(folder / "run")).whole()
    return checkpoint


def test_clip4clip(tmp_path: Path, own_store: str) -> None:
    """Trained on drawn videos and evaluated on them; its CLIP opens in open_clip."""
    data = drawn_snapshot(Folder(str(tmp_path / "val")), samples=8, card=None, more={"video": True, "split": "val"})
    sets = Evaluations(retrieval=(f"val={data.folder}",), evaluation_threads=1)
    checkpoint = trained("train_clip4clip", "run_pretraining", tmp_path, own_store, evaluations=sets)
    assert checkpoint.meta.step == 3
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None and {"retrieval/val/t2v_r1", "retrieval/val/v2t_mean_rank"} <= set(evaluation.metrics)
    opened = open_clip.create_model(f"local-dir:{checkpoint.folder.path}").eval()
    method = load_any(checkpoint.folder.uri, "cpu")
    assert isinstance(method, Clip4Clip) and method.head is not None
    tokens = method.tokenizer(["a red star"])
    whole = open_clip.get_tokenizer("clipmill-tiny")(["a red star"])
    torch.testing.assert_close(opened.encode_text(whole, normalize=True), method.encode_text(tokens))


@pytest.mark.parametrize("objective", ["text", "linear"])
def test_actionclip(objective: str, tmp_path: Path, own_store: str) -> None:
    """Trained on few drawn motions, and evaluated on others by its templates or by its linear layer."""
    script = load_job("train_actionclip")
    method = replace(script["PRESETS"]["smoke"][1].method, objective=objective)
    checkpoint = trained("train_actionclip", "main", tmp_path, own_store, method=method, shots=1)
    model = load_any(checkpoint.folder.uri, "cpu")
    assert isinstance(model, ActionClip) and model.config.class_names == MOTIONS
    (few,) = [one for one in (tmp_path / "run").iterdir() if "-1-shots-" in one.name]
    assert read_snapshot(str(few)).samples == len(MOTIONS)
    options = {"video": True, "split": "motions"}
    data = drawn_snapshot(Folder(str(tmp_path / "test")), samples=12, card="drawn_motions", more=options).folder
    if objective == "text":
        sets = Evaluations(zero_shot=(f"it={data},templates=model,ensemble=probabilities,clips=2",))
    else:
        sets = Evaluations(classification=(f"it={data},clips=2",))
    found = evaluate(model, sets.prepare())
    kind = "zeroshot" if objective == "text" else "classification"
    assert found[f"{kind}/it/samples"] == 12 and found[f"{kind}/it/chance"] == pytest.approx(1 / 12)


def test_actions_come_from_a_card_or_a_file(tmp_path: Path) -> None:
    """The job fills in the names before anything starts."""
    script = load_job("train_actionclip")
    seen: list[Any] = []
    script["main"].__globals__["pretrain"] = lambda job, keeps: seen.append(job.method)
    preset = script["PRESETS"]["k400"][1]
    preset = replace(preset, run=replace(preset.run, data="x", output_folder=str(tmp_path / "run")))
    script["main"](replace(preset, card="esc50"))
    assert len(seen[0].class_names) == 50 and seen[0].label_key == "label"
    (tmp_path / "names.txt").write_text("running\nbrush_hair\n")
    script["main"](replace(preset, card=str(tmp_path / "names.txt")))
    assert seen[1].class_names == ("running", "brush_hair")
    with pytest.raises(SettingError, match="shots: got -1"):
        script["main"](replace(preset, shots=-1))


def test_presets_are_the_papers() -> None:
    """The authors' commands and configurations."""
    presets = {name: preset for name, (_, preset) in load_job("train_clip4clip")["PRESETS"].items()}
    for name, frames, tokens, workers in (
        ("msrvtt", 12, 32, 4),
        ("msvd", 12, 32, 4),
        ("lsmdc", 12, 32, 4),
        ("activitynet", 64, 64, 8),
        ("didemo", 64, 64, 8),
    ):
        method, run = presets[name].method, presets[name].run
        assert method.sampling == FrameSampling(mode="uniform", frames=frames, rate=1.0), name
        assert (method.text_tokens, run.workers, run.batch_size) == (tokens, workers, 128)
        assert (method.architecture, method.pretrained, method.head) == ("ViT-B-32-quickgelu", "openai", "meanP")
        assert method.freeze_layers == 0 and method.head_layers == 4 and method.head_dropout == 0.1
        optimizer = run.optimizer
        assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.weight_decay) == (0.9, 0.98, 1e-6, 0.2)
        assert optimizer.learning_rate == 1e-4 and optimizer.tower_rates == {"image": 1e-3, "text": 1e-3}
        assert run.clip_grad_norm == 1.0
    assert presets["msrvtt"].run.caption == "json:captions" and presets["msrvtt"].run.epochs == 5 * 20
    actions = {name: preset for name, (_, preset) in load_job("train_actionclip")["PRESETS"].items()}
    method, run = actions["k400"].method, actions["k400"].run
    assert method.sampling == FrameSampling(mode="segments", frames=8) and method.head == "Transf"
    assert method.head_layers == 6 and method.prompts == TEMPLATES and method.augment == "rand-m9-n2"
    colours = method.colours
    assert (colours.brightness, colours.contrast, colours.saturation, colours.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (colours.jitter, colours.grey, colours.blur, method.flip) == (0.8, 0.2, 0.0, 0.5)
    assert (run.batch_size, run.epochs, run.warmup_steps) == (128, 50, 5 * 240_000 // 128)
    optimizer = run.optimizer
    assert (optimizer.learning_rate, optimizer.epsilon, optimizer.weight_decay) == (5e-6, 1e-8, 0.2)
    assert optimizer.tower_rates == {"head": 10.0} and optimizer.beta2 == 0.98
    assert actions["hmdb51"].method.augment == "" and actions["k400-b16"].method.architecture == "ViT-B-16-quickgelu"
