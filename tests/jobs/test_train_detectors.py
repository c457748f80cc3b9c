"""The jobs that train a proposer and ViLD: their smoke presets end to end, and the presets against the paper."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.errors import SettingError, SidecarError
from pipeline.loaders.classes import OF_DATA
from pipeline.models import class_vectors
from pipeline.models.vild import Config
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, clip_address, load_method, resolved
from pipeline.training.run import Run
from tests.jobs.conftest import load_job

JOBS = ("train_proposer", "train_vild")


def scripts() -> dict[str, dict[str, Any]]:
    return {name: load_job(name) for name in JOBS}


def tracked(smoke: Any, folder: Path, uri: str) -> Any:
    store = Tracking(tracking_uri=uri, system_metrics=False)
    return replace(smoke, tracking=store, run=replace(smoke.run, output_folder=str(folder / "run")))


def test_a_proposer_then_a_detector_that_begins_with_it(tmp_path: Path, own_store: str) -> None:
    """Both smoke presets; the second begins with the first's network and knows novel words, too."""
    proposer, vild = (scripts()[name] for name in JOBS)
    proposer["main"](tracked(proposer["PRESETS"]["smoke"][1], tmp_path / "proposer", own_store))
    (first,) = Checkpoints(str(tmp_path / "proposer" / "run")).whole()
    method: Any = load_method(first.folder.uri)
    boxes, scores = method.propose([torch.full((3, 64, 64), 90, dtype=torch.uint8)])[0]
    assert len(boxes) == len(scores) > 0
    assert method.config.class_names == load_card("drawn_base").classes

    smoke = tracked(vild["PRESETS"]["smoke"][1], tmp_path / "vild", own_store)
    smoke = replace(smoke, method=replace(smoke.method, start_from=str(tmp_path / "proposer" / "run")))
    vild["main"](smoke)
    (second,) = Checkpoints(str(tmp_path / "vild" / "run")).whole()
    detector: Any = load_method(second.folder.uri)
    assert second.meta.step == 3 and detector.config.start_from == first.folder.uri
    assert detector.config.prompts == load_card("drawn_base").templates
    from mlflow import MlflowClient

    names = [model.name for model in MlflowClient(own_store).search_registered_models()]
    assert sorted(names) == ["proposals", "vild"]
    found = detector.predict([torch.full((3, 64, 80), 90, dtype=torch.uint8)], ["disc", "key"])[0]
    assert len(found) and found.masks is not None


def test_regions_that_were_not_made_are_asked_for(tmp_path: Path, own_store: str) -> None:
    """Before the first step, with the job that makes them."""
    script = load_job("train_vild")
    smoke = tracked(script["PRESETS"]["smoke"][1], tmp_path, own_store)
    with script["in_place"](smoke) as placed, pytest.raises(SidecarError, match="jobs/extract_region_features.py"):
        script["main"](replace(placed, draw=0, method=replace(placed.method, mode="vild")))


def test_addresses_are_those_of_checkpoints(tmp_path: Path, make_checkpoint: Callable[..., str]) -> None:
    address = make_checkpoint(tmp_path)
    assert resolved(str(tmp_path)) == address and resolved("") == "" and resolved("/nowhere") == "/nowhere"
    assert clip_address(str(tmp_path)) == f"clipmill-tiny:{address}"
    assert clip_address("ViT-B-32:openai") == "ViT-B-32:openai"


def test_averaged_weights_can_be_asked_for(tmp_path: Path, make_checkpoint: Callable[..., str]) -> None:
    """As a file, which open_clip and the detector read, and which is not the weights as trained."""
    address = make_checkpoint(tmp_path)
    with pytest.raises(SettingError, match="an address without :ema"):
        clip_address(f"{address}:ema")
    average = Path(address) / "model_ema.safetensors"
    average.write_bytes((Path(address) / "model.safetensors").read_bytes())
    assert resolved(f"{address}:ema") == str(average)
    teacher = class_vectors.open_teacher(clip_address(f"{tmp_path}:ema"))
    state = load_method(address).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.model.state_dict().items())


@pytest.fixture
def make_checkpoint() -> Callable[..., str]:
    from pipeline.models.method import build_method, method_class
    from pipeline.training.checkpoint import Meta
    from pipeline.training.optimizer import AdamW, make_optimizer

    def make(folder: Path) -> str:
        method = build_method(method_class("clip").smallest())
        meta = Meta(step=1, samples_seen=1, batch_size=1, lanes=1, seed=0, snapshot="x")
        return Checkpoints(str(folder)).save(method, make_optimizer(AdamW(), method), meta).folder.uri

    return make


def test_presets_are_the_papers() -> None:
    """Gu et al. 2021, appendix; the learning rate falls after 90, 95 and 97.5 % of 180,000 steps of 256."""
    for script in scripts().values():
        for name in ("paper", "lvis", "lvis-ensemble"):
            if name not in script["PRESETS"]:
                continue
            preset = script["PRESETS"][name][1]
            run: Run = preset.run
            assert (run.batch_size, run.steps, run.warmup_steps) == (256, 180_000, 1000)
            optimizer: Any = run.optimizer
            assert (optimizer.learning_rate, optimizer.first_learning_rate) == (0.32, 0.0032)
            assert (optimizer.momentum, optimizer.weight_decay, optimizer.drops) == (0.9, 4e-5, (0.9, 0.95))
            assert preset.method.norm == "batch" and preset.base == OF_DATA
    assert scripts()["train_vild"]["PRESETS"]["lvis-ensemble"][1].method == Config(mode="ensemble")


@pytest.mark.parametrize("name", JOBS)
def test_presets_go_through_json(name: str) -> None:
    script = load_job(name)
    for _, preset in script["PRESETS"].values():
        assert from_json(script["Train"], to_json(preset)) == preset


def test_flags_of_the_optimiser_are_those_of_the_preset(
    job: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """SGD in the paper's presets, AdamW in the small ones; each refuses the other's flags."""
    assert job("train_vild", "lvis", "--momentum", "2", "--teacher", "x") == 2
    assert "momentum" in capsys.readouterr().err
    assert job("train_vild", "drawn", "--momentum", "0.8") == 2
    assert job("train_vild", "drawn", "--beta1", "2") == 2
    assert "beta1" in capsys.readouterr().err
