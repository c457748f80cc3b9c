"""The SLIP job: its smoke preset end to end, and its presets against the paper."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method, read_evaluation
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("pretrain_slip")


def test_smoke(script: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    """Trained and evaluated; the encoder opens in open_clip, the head is in the checkpoint beside it."""
    smoke = script["PRESETS"]["smoke"][1]
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    script["run_pretraining"](
        replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(tmp_path / "run")))
    )
    (checkpoint,) = Checkpoints(str(tmp_path / "run")).whole()
    assert checkpoint.meta.step == 4
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None and "zeroshot/drawn_shapes/top1" in evaluation.metrics
    opened = open_clip.create_model(f"local-dir:{checkpoint.folder.path}").eval()
    method = load_method(checkpoint.folder.uri)
    tokens = open_clip.get_tokenizer("clipmill-tiny")(["a red star"])
    assert torch.equal(opened.encode_text(tokens, normalize=True), method.encode_text(tokens))
    assert not torch.equal(method.state_dict()["head.first_norm.running_mean"], torch.zeros(64))  # it has seen batches


def test_presets_are_the_papers(script: dict[str, Any]) -> None:
    """Mu et al. 2021, section 4.1, as their code has it."""
    presets = {name: preset for name, (_, preset) in script["PRESETS"].items()}
    epochs = {
        f"{data}-vit-{size}": count for data, count in (("paper", 25), ("cc3m", 40), ("cc12m", 35)) for size in "sbl"
    }
    for name, count in epochs.items():
        run, method = presets[name].run, presets[name].method
        optimizer = run.optimizer
        assert (run.batch_size, run.epochs) == (4096, count)
        assert run.warmup_steps == {25: 3564, 40: 708, 35: 2685}[count]  # an epoch of 14.6, 2.9 or 11 million
        assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.epsilon) == (3e-3, 0.1, 1e-8)
        assert (optimizer.first_learning_rate, optimizer.final_learning_rate) == (1e-6, 1e-5)
        assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.98)
        assert (method.crop, method.crop_scale, method.view_scale, method.flip) == ("resized", (0.5, 1), (0.08, 1), 0)
        assert (method.ssl_hidden, method.ssl_width, method.ssl_temperature, method.self_supervision) == (
            4096,
            256,
            0.1,
            1,
        )
        width = open_clip.get_model_config(method.architecture)["vision_cfg"]["width"]
        assert width == {"s": 384, "b": 768, "l": 1024}[name[-1]]


def test_presets_go_through_json(script: dict[str, Any]) -> None:
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Pretrain"], to_json(preset)) == preset
