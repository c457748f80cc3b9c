"""The record of a run: the same command again, another command, other data."""

import json
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, SettingError, SnapshotError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Config
from pipeline.models.method import Method, build_method
from pipeline.models.slip import Config as SlipConfig
from pipeline.shards.snapshot import Snapshot, publish_shards
from pipeline.shards.storage import Folder
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run, prepare, read_record, write_record
from pipeline.training.tracker import LogTracker

MakeRun = Callable[..., Run]


def test_the_same_command_finds_its_record(run: MakeRun, tiny_config: Config, data: Snapshot) -> None:
    plan, record = prepare(tiny_config, run())
    assert plan.snapshot == data and plan.steps == 10 and record.digest == data.digest
    assert plan.run.data == data.uri
    folder = Folder(plan.run.output_folder)
    write_record(folder, replace(record, tracking_run="abc"))
    again, record = prepare(tiny_config, run())
    assert again == plan and record.tracking_run == "abc"


def test_what_may_change_between_starts(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    prepare(tiny_config, run())
    changed = run(
        workers=2,
        micro_batch=2,
        exchange="ring",
        log_every_steps=7,
        checkpoint_every_steps=None,
        checkpoint_every_minutes=None,
        keep_checkpoints=1,
        keep_waiting=2,
        evaluate_every_steps=5,
        loader=LoaderConfig(loader_workers=3),
        cluster=Cluster(max_failures=0),
    )
    assert prepare(tiny_config, changed)[0].run.workers == 2
    (tmp_path / "run").rename(tmp_path / "moved")
    prepare(tiny_config, run(output_folder=str(tmp_path / "moved")))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"batch_size": 16}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"optimizer": AdamW(learning_rate=1e-4)}, "optimizer.learning_rate"),
        ({"precision": "bf16"}, "precision"),
        ({"caption": "json:caption"}, "caption"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    run: MakeRun, tiny_config: Config, change: dict[str, object], field: str
) -> None:
    prepare(tiny_config, run())
    with pytest.raises(SettingError, match="or another folder") as caught:
        prepare(tiny_config, run(**change))
    assert caught.value.field == field


def test_a_run_of_another_method_is_named_alone(run: MakeRun, tiny_config: Config) -> None:
    """Not by the settings that only one of the two methods has."""
    prepare(tiny_config, run())
    shared = {field.name: getattr(tiny_config, field.name) for field in fields(tiny_config)}
    with pytest.raises(SettingError, match="^output_folder: .* another folder, since .* a run of clip, not of slip$"):
        prepare(SlipConfig(**shared), run())


def test_all_differing_settings_are_named(run: MakeRun, tiny_config: Config) -> None:
    prepare(tiny_config, run())
    with pytest.raises(SettingError, match=r"a run with flip 0\.0, seed 0; or another folder"):
        prepare(replace(tiny_config, flip=0.5), run(seed=3))


def test_a_run_may_become_longer_and_not_shorter(run: MakeRun, tiny_config: Config, tmp_path: Path, caplog) -> None:
    assert prepare(tiny_config, run(steps=None, epochs=2))[0].steps == 10  # 40 samples, 8 a step
    with caplog.at_level(logging.INFO):
        assert prepare(tiny_config, run(steps=None, epochs=4))[0].steps == 20
    assert "extended from 10 to 20 steps" in caplog.text
    assert prepare(tiny_config, run(steps=21))[0].steps == 21
    with pytest.raises(SettingError, match="^epochs: got 2, expected 21 steps or more, .*; or another folder$"):
        prepare(tiny_config, run(steps=None, epochs=2))
    record = read_record(Folder(tmp_path / "run"))
    assert record is not None and record.steps == 21


def test_a_batch_larger_than_the_data_is_refused(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="^batch_size: got 41, expected at most 40, the number of samples"):
        prepare(tiny_config, run(batch_size=41))
    assert not (tmp_path / "run").exists()
    prepare(tiny_config, run(batch_size=40))


def test_pretrained_takes_a_run_and_its_average(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    """As --checkpoint does: the newest checkpoint of the run."""
    first = tmp_path / "first"
    plan, _ = prepare(tiny_config, run(steps=2, ema_decay=0.5, output_folder=str(first)))
    run_training(plan, torch.device("cpu"), LogTracker())
    weights = first / "checkpoints" / "step-00000002"
    for address, place in ((str(first), weights), (f"{first}:ema", weights / "model_ema.safetensors")):
        method = replace(tiny_config, pretrained=address)
        plan, record = prepare(method, run(output_folder=f"{tmp_path}/{place.name}"))
        assert plan.method.pretrained == str(place) and record.settings["pretrained"] == address
        build_method(plan.method)


def test_parts_of_a_batch_need_a_method_that_embeds(
    run: MakeRun, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole(Method):
        """Its losses cannot be had apart from its towers."""

    monkeypatch.setattr("pipeline.training.run.method_class", lambda name: Whole)
    with pytest.raises(SettingError, match="micro_batch: got 2, expected none, since"):
        prepare(tiny_config, run(micro_batch=2))


def test_a_run_keeps_its_snapshot(
    run: MakeRun, tiny_config: Config, make_snapshot: Callable[..., Snapshot], tmp_path: Path, caplog
) -> None:
    first = make_snapshot((8,), folder=tmp_path / "data")
    prepare(tiny_config, run(data=str(tmp_path / "data")))
    second = make_snapshot((8, 8), folder=tmp_path / "data")
    assert second.id != first.id
    with caplog.at_level(logging.INFO):
        plan, _ = prepare(tiny_config, run(data=str(tmp_path / "data")))
    assert plan.snapshot.id == first.id and "newer snapshot" in caplog.text
    with pytest.raises(SettingError, match="on which the run in this folder is trained"):
        prepare(tiny_config, run(data=second.uri))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for moved in (f"{tmp_path}/elsewhere@{first.id}", f"{tmp_path}/elsewhere"):
        plan, _ = prepare(tiny_config, run(data=moved))
        assert plan.snapshot.folder == f"{tmp_path}/elsewhere" and plan.snapshot.id == first.id


def test_epochs_become_steps(run: MakeRun, tiny_config: Config) -> None:
    plan, _ = prepare(tiny_config, run(steps=None, epochs=2))
    assert plan.steps == 10  # 40 samples, 8 a step


def test_a_record_that_is_none(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    Folder(tmp_path / "run").write_atomic("run.json", b"[1, 2]")
    with pytest.raises((DataError, SettingError), match=r"run\.json"):
        prepare(tiny_config, run())
    assert read_record(Folder(tmp_path / "none")) is None


def test_missing_data(run: MakeRun, tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="data: nothing given, expected"):
        prepare(tiny_config, run(data=""))
    with pytest.raises(SnapshotError, match="has no snapshot"):
        prepare(tiny_config, run(data=str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()


def test_data_without_captions(run: MakeRun, tiny_config: Config, data: Snapshot, tmp_path: Path) -> None:
    """Known before a worker starts, and nothing is left behind."""
    bare = tmp_path / "bare"
    publish_shards(
        Folder(bare), data.shards, fields=("jpg", "json"), card=None, options={}, rows=data.samples, dropped={}
    )
    with pytest.raises(DataError, match="no field txt; its samples have: jpg, json"):
        prepare(tiny_config, run(data=str(bare)))
    assert not (tmp_path / "run").exists()
    prepare(tiny_config, run(data=str(bare), caption="json:caption"))


def test_a_relative_folder_inside_a_ray_job_is_refused(
    run: MakeRun, tiny_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    with pytest.raises(SettingError, match="working directory vanishes"):
        prepare(tiny_config, run(output_folder="results"))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert prepare(tiny_config, run(output_folder="results"))[0].run.output_folder == str(tmp_path / "results")


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"batch_size": 10, "workers": 4},
        {"workers": -1},
        {"epochs": 0},
        {"steps": 0},
        {"warmup_steps": -1},
        {"clip_grad_norm": 0.0},
        {"seed": -1},
        {"caption": "jpg"},
        {"lanes": 0},
        {"shuffle_block": 0},
        {"log_every_steps": 0},
        {"checkpoint_every_steps": 0},
        {"checkpoint_every_minutes": 0},
        {"keep_checkpoints": 0},
        {"keep_waiting": 0},
        {"micro_batch": 0},
        {"evaluate_every_steps": 0},
    ],
)
def test_bad_settings_are_named(run: MakeRun, bad: dict[str, object]) -> None:
    with pytest.raises(SettingError) as caught:
        run(**bad)
    assert caught.value.field == next(iter(bad))


@pytest.mark.parametrize("bad", [{"cpus_per_worker": 0}, {"max_failures": -2}, {"start_timeout_seconds": 0}])
def test_bad_cluster_settings(bad: dict[str, int]) -> None:
    with pytest.raises(SettingError):
        Cluster(**bad)  # type: ignore[arg-type]
