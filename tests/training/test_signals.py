"""A method without images, texts and a model of another library is trained from a snapshot that has none of them."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.models
from pipeline.errors import DataError, SettingError
from pipeline.models.method import method_class, method_names
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Shard, Snapshot, publish_shards
from pipeline.shards.storage import Folder, file_digest
from pipeline.shards.tar import TarWriter
from pipeline.training.checkpoint import load_method
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Run, prepare

TOYS = Path(__file__).parents[1] / "models" / "toys"
CPU = torch.device("cpu")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The config of the toy, which is found among the methods."""
    monkeypatch.setattr(pipeline.models, "__path__", [*pipeline.models.__path__, str(TOYS)])
    yield method_class("signals").smallest()
    sys.modules.pop("pipeline.models.signals", None)


@pytest.fixture(scope="module")
def signals(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Twenty signals of eight numbers."""
    folder = tmp_path_factory.mktemp("signals")
    path, random = folder / "00000.tar", np.random.default_rng(0)
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for number in range(20):
            content = io.BytesIO()
            np.save(content, random.standard_normal(8).astype(np.float32))
            writer.write(Sample(f"{number:09d}", {"npy": content.getvalue()}))
        writer.close()
    size = path.stat().st_size
    shard = Shard(name="00000", samples=20, bytes=size, sha256=file_digest(path), sidecars={})
    return publish_shards(Folder(folder), (shard,), fields=("npy",), card=None, options={}, rows=20, dropped={})


def test_an_epoch_lowers_the_loss(config: Any, signals: Snapshot, run: Callable[..., Run], remember: Any) -> None:
    tracker = remember()
    optimizer = AdamW(learning_rate=0.03, weight_decay=0, tower_rates={"signal": 0.5})
    settings = run(data=signals.folder, steps=30, batch_size=4, optimizer=optimizer)
    outcome = run_training(prepare(config, settings)[0], CPU, tracker)
    losses = tracker.series("train/loss")
    assert outcome.steps == 30 and losses[30] < losses[1] / 2
    loaded = load_method(outcome.checkpoint)
    assert set(loaded.state_dict()) == {"linear.weight", "linear.bias"} and not loaded.blocks()


def test_parts_of_a_batch_give_the_same_loss(
    config: Any, signals: Snapshot, run: Callable[..., Run], remember: Any, tmp_path: Path
) -> None:
    first, second = remember(), remember()
    settings = run(data=signals.folder, steps=5, batch_size=4)
    run_training(prepare(config, settings)[0], CPU, first)
    parts = replace(settings, micro_batch=2, output_folder=str(tmp_path / "parts"))
    run_training(prepare(config, parts)[0], CPU, second)
    assert second.series("train/loss") == pytest.approx(first.series("train/loss"), rel=1e-5)


def test_nothing_to_train_by_gradients(config: Any, signals: Snapshot, run: Callable[..., Run], remember: Any) -> None:
    settings = run(data=signals.folder, steps=5, batch_size=4)
    outcome = run_training(prepare(replace(config, trains=False), settings)[0], CPU, remember())
    assert outcome.steps == 5 and load_method(outcome.checkpoint).config.trains is False


def test_fields_are_checked_before_anything_starts(config: Any, data: Snapshot, run: Callable[..., Run]) -> None:
    with pytest.raises(DataError, match="has no field npy"):
        prepare(config, run())


def test_methods_are_found_without_a_list(config: Any) -> None:
    names = method_names()
    assert {"clip", "signals", "vild"} <= set(names)
    assert not {"method", "losses", "detections", "class_vectors", "towers", "configs", "adapters"} & set(names)
    with pytest.raises(SettingError, match="one of .*clap, classifier, clip"):
        method_class("losses")
