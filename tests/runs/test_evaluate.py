"""A checkpoint evaluated in another process, its numbers in the run that made it."""

import math
import multiprocessing
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from pipeline.errors import SettingError
from pipeline.evaluation.models import load_model, trained_steps
from pipeline.evaluation.suite import Evaluations
from pipeline.models.clip import Clip
from pipeline.runs.evaluate import CheckpointEvaluation, evaluate_checkpoint
from pipeline.shards.waveforms import read_header
from pipeline.tracking.runs import Tracking, start
from pipeline.training.checkpoint import Checkpoints, Meta
from tests.evaluation.sounds_and_colours import PITCHES, SoundAndColourModel, sound


@pytest.fixture
def card(tmp_path: Path) -> str:
    """A card over twelve images in two colours."""
    for number in range(12):
        name = ("red", "blue")[number % 2]
        place = tmp_path / "images" / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 20, 3), (250, 0, 0) if number % 2 else (0, 0, 250), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
        (place / f"{number}.txt").write_text(f"a {name} image, number {number}")
    source = {"kind": "folder", "folder": str(tmp_path / "images")}
    plain = {"name": "two", "title": "Two colours", "source": source, "classes": ["red", "blue"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(plain))
    return str(tmp_path / "two.yaml")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the smallest CLIP at step 30; its run's folder is two above."""
    method = Clip(Clip.smallest())
    optimizer = torch.optim.AdamW(method.parameters())
    meta = Meta(step=30, samples_seen=90, batch_size=3, lanes=1, seed=0, snapshot="0")
    return Checkpoints(str(tmp_path_factory.mktemp("run"))).save(method, optimizer, meta).folder.uri


def in_a_process(evaluation: CheckpointEvaluation, uri: str, step: int) -> Mapping[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(evaluation, (uri, step))


def test_a_spawned_process_logs_into_the_run(card: str, checkpoint: str, store: str) -> None:
    evaluations = Evaluations(zero_shot=(card,), retrieval=(card,))
    settings = Tracking(tracking_uri=store, experiment="follow", system_metrics=False)
    with start(settings, evaluations) as tracker:
        found = in_a_process(CheckpointEvaluation(evaluations=evaluations, run=tracker.handle), checkpoint, 30)
        client = MlflowClient(store)
        run = client.get_run(tracker.run_id)
        assert run.info.status == "RUNNING"
    assert run.data.metrics == {name: value for name, value in found.items() if not name.endswith("/samples")}
    assert client.get_metric_history(tracker.run_id, "zeroshot/two/top1")[0].step == 30
    folders = {file.path for file in client.list_artifacts(tracker.run_id, "figures")}
    assert folders == {"figures/similarity", "figures/examples"}
    assert found == evaluate_checkpoint(checkpoint, evaluations, None, 30)
    assert all(math.isfinite(value) for value in found.values())


def test_sounds_are_beside_their_predictions(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of sounds in a card; the run has spectrograms, and each sound with its label and the best class."""
    (tmp_path / "sounds").mkdir()
    for colour in PITCHES:
        (tmp_path / "sounds" / f"{colour}.flac").write_bytes(sound(colour))
    (tmp_path / "sounds" / "list.csv").write_text("file,class\n" + "".join(f"{name}.flac,{name}\n" for name in PITCHES))
    source = {"kind": "sound-table", "folder": str(tmp_path / "sounds"), "table": "list.csv", "file": "{file}"}
    plain = {"name": "three", "title": "Three", "source": {**source, "label": "class"}, "classes": list(PITCHES)}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.setattr("pipeline.runs.evaluate.load_any", lambda checkpoint, device: SoundAndColourModel())
    evaluations = Evaluations(zero_shot=(str(tmp_path / "three.yaml"),))
    with start(Tracking(tracking_uri=store, experiment="heard", system_metrics=False), evaluations) as tracker:
        found = evaluate_checkpoint("any", evaluations, tracker.handle, 1)
        client = MlflowClient(store)
        files = [file.path for file in client.list_artifacts(tracker.run_id, "predictions/zeroshot/three")]
        played = client.download_artifacts(tracker.run_id, files[0], str(tmp_path))
        assert [file.path for file in client.list_artifacts(tracker.run_id, "figures/sounds")] == [
            "figures/sounds/three.png"
        ]
    assert found["zeroshot/three/top1"] == 1
    names = [re.sub(r"_\d.*", "", Path(file).name.partition("_")[2]) for file in files]
    assert sorted(names) == [f"{name}_found_{name}" for name in sorted(PITCHES)]
    assert read_header(Path(played).read_bytes()).kind == "flac"


def test_a_runs_folder_means_its_newest_checkpoint(checkpoint: str) -> None:
    run = str(Path(checkpoint).parents[1])
    assert trained_steps(checkpoint) == trained_steps(run) == 30
    assert trained_steps("ViT-B-32:openai") is None
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(load_model(run).encode_image(image), load_model(checkpoint).encode_image(image))


def test_untrained_models_are_always_the_same() -> None:
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    first, second = (load_model("clipmill-tiny:untrained") for _ in range(2))
    assert torch.equal(first.encode_image(image), second.encode_image(image))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("address", ["nowhere", "no-such-architecture:untrained", "ViT-B-32:no_such_tag"])
def test_unknown_models_are_refused(address: str) -> None:
    with pytest.raises(SettingError):
        load_model(address)
