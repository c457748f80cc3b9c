"""The GroupViT job: its smoke preset end to end, and its presets against the paper."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GroupViTConfig, GroupViTModel

from pipeline.config import from_json, to_json
from pipeline.models.groupvit import NETWORK
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, load_method, read_evaluation
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("pretrain_groupvit")


def test_smoke(script: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    """Phrases found, trained, evaluated; transformers opens the network; the checkpoint segments."""
    smoke = script["PRESETS"]["smoke"][1]
    store = Tracking(tracking_uri=own_store, system_metrics=False)
    script["main"](replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(tmp_path / "run"))))
    (checkpoint,) = Checkpoints(str(tmp_path / "run")).whole()
    assert checkpoint.meta.step == 3
    evaluation = read_evaluation(checkpoint)
    assert evaluation is not None and "zeroshot/drawn_shapes/top1" in evaluation.metrics
    method: Any = load_method(checkpoint.folder.uri)
    folder = Path(checkpoint.folder.path)
    theirs = GroupViTModel(GroupViTConfig.from_json_file(folder / NETWORK)).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    tokens = method.tokenizer(["a red star"])
    with torch.no_grad():
        expected = theirs.get_text_features(tokens).pooler_output
        torch.testing.assert_close(method.encode_text(tokens), torch.nn.functional.normalize(expected, dim=-1))
    (found,) = method.segment([torch.zeros(3, 40, 50, dtype=torch.uint8)], ["star", "disc"])
    assert found.labels.shape == (40, 50)


def test_presets_are_the_papers(script: dict[str, Any]) -> None:
    """The authors' default configuration."""
    presets = {name: preset for name, (_, preset) in script["PRESETS"].items()}
    for name in ("paper-yfcc", "paper-redcaps", "paper-cc"):
        run, method = presets[name].run, presets[name].method
        optimizer = run.optimizer
        assert (run.batch_size, run.epochs, run.workers, run.clip_grad_norm) == (4096, 30, 16, 5.0)
        assert (optimizer.learning_rate, optimizer.first_learning_rate) == (1.6e-3, 4e-6)
        assert (optimizer.final_learning_rate, optimizer.weight_decay, optimizer.epsilon) == (4e-5, 0.05, 1e-8)
        assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
        assert (method.depths, method.group_tokens, method.width, method.heads) == ((6, 3, 3), (64, 8), 384, 6)
        assert (method.drop_path, method.crop_scale, method.flip) == (0.1, (0.08, 1.0), 0.5)
        assert method.prompts == (0 if name == "paper-redcaps" else 3)
    assert presets["paper-yfcc"].run.warmup_steps == 2 * (2_891_445 + 11_156_203 + 14_615_499) // 4096


def test_presets_go_through_json(script: dict[str, Any]) -> None:
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Pretrain"], to_json(preset)) == preset
