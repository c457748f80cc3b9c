"""The job that tunes a GLIP: its smoke preset from a trained run, its presets against the paper, and wrong settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.dataset import load_card
from pipeline.errors import SettingError
from pipeline.models.glip import Glip
from pipeline.models.method import build_method
from pipeline.shards.snapshot import read_snapshot
from pipeline.tracking.runs import Tracking
from pipeline.training.checkpoint import Checkpoints, Meta, load_method
from pipeline.training.optimizer import AdamW, make_optimizer
from tests.jobs.conftest import load_job


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return load_job("finetune_glip")


def test_smoke_tunes_the_table_of_a_trained_model(script: dict[str, Any], tmp_path: Path, own_store: str) -> None:
    """On a few images, whose snapshot is kept with the run; all other weights are those of the run it begins with."""
    smoke = script["PRESETS"]["smoke"][1]
    torch.manual_seed(7)
    trained = build_method(replace(smoke.method, tuning="full"))
    assert isinstance(trained, Glip)
    meta = Meta(step=1, samples_seen=8, batch_size=8, lanes=1, seed=0, snapshot="0" * 64)
    place = Checkpoints(str(tmp_path / "trained")).save(trained, make_optimizer(AdamW(), trained), meta).folder.uri
    job = replace(
        smoke,
        method=replace(smoke.method, start_from=str(tmp_path / "trained")),
        run=replace(smoke.run, output_folder=str(tmp_path / "run")),
        tracking=Tracking(tracking_uri=own_store, system_metrics=False),
    )
    script["main"](job)
    (found,) = Checkpoints(str(tmp_path / "run")).whole()
    method: Any = load_method(found.folder.uri)
    assert method.config.start_from == place and method.config.class_names == load_card("drawn").classes
    assert method.model.prompt.abs().max() > 0.01
    before, after = trained.state_dict(), method.state_dict()
    assert set(after) - set(before) == {"model.prompt"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    (shots,) = (tmp_path / "run").glob("*-2-shots-*")
    assert 0 < read_snapshot(str(shots)).samples < 32


def test_the_presets_are_the_papers(script: dict[str, Any]) -> None:
    """Rates, decay and frozen parts of section 9 of the authors' commands; prompts are the same in every step."""
    presets = {name: preset for name, (_, preset) in script["PRESETS"].items()}
    for name, rate, decay, frozen in (("full", 1e-4, 0.05, 2), ("prompt", 0.05, 0.25, 0), ("linear", 1e-4, 0.05, 0)):
        for preset in (presets[name], presets[f"drawn-{name}"]):
            optimizer = preset.run.optimizer
            assert (preset.method.tuning, preset.method.frozen_stages) == (name, frozen)
            assert (optimizer.learning_rate, optimizer.weight_decay, preset.run.batch_size) == (rate, decay, 4)
            assert preset.method.grounding.fixed_prompts and preset.run.ema_decay is None
    assert presets["full"].run.optimizer.text_rate == 0.1
    for preset in presets.values():
        assert from_json(script["Finetune"], to_json(preset)) == preset


def test_settings_are_refused_before_anything_is_trained(
    script: dict[str, Any], tmp_path: Path, own_store: str
) -> None:
    smoke = replace(
        script["PRESETS"]["smoke"][1],
        tracking=Tracking(tracking_uri=own_store, system_metrics=False),
    )
    many = tuple(f"star {number}" for number in range(50))
    for changes, field in (
        ({"draw": 0}, "start_from"),
        ({"shots": -1}, "shots"),
        ({"card": ""}, "class_names|base"),
        ({"card": "no_card"}, "card"),
        ({"method": replace(smoke.method, class_names=many)}, "class_names.*fit one prompt"),
    ):
        with pytest.raises(SettingError, match=field):
            script["main"](replace(smoke, **changes))
