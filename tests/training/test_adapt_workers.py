"""Work on two workers of Ray Train: the adaptation of one process, and errors as they were raised."""

from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.adapters import coop
from pipeline.shards.storage import Folder
from pipeline.training import distributed
from pipeline.training.adapt import Adapted, adapt
from pipeline.training.adapt_artifact import load_adapted, read_record, save
from pipeline.training.adapt_recipes import AdaptRecipe
from pipeline.training.adapt_workers import _worker, on_workers
from tests.training import few_shot
from tests.training.few_shot import NAMES, make_clip, make_images


def learn(folder: Path) -> Adapted:
    clip = make_clip(folder)
    recipe = AdaptRecipe(epochs=3, batch_size=4, learning_rate=0.05)
    train, validation = make_images(clip, 12, 0), make_images(clip, 9, 1)
    return adapt("coop", coop.Config(context=3), recipe, clip, NAMES, (), train, validation, seed=2)


def learn_and_save(clip: Path, folder: Path, device: torch.device) -> None:
    adapted = learn(clip)
    assert device.type == "cpu" and distributed.world() == 2
    if distributed.rank() == 0:
        save(adapted, Folder(folder), {"data": "colours"})


def refuses(device: torch.device) -> None:
    raise SettingError("learning_rate", 1e9, "less")


@pytest.mark.slow
def test_two_workers_learn_what_one_process_does(tmp_path: Path, ray_cluster: Any) -> None:
    """The tests are pickled by value, since Ray's workers cannot import them."""
    import sys

    for module in (few_shot, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    try:
        (tmp_path / "clip").mkdir()
        on_workers(partial(learn_and_save, tmp_path / "clip", tmp_path / "out"), workers=2)
    finally:
        for module in (few_shot, sys.modules[__name__]):
            cloudpickle.unregister_pickle_by_value(module)
    here = learn(tmp_path / "clip")
    there = load_adapted(Folder(tmp_path / "out"), here.adapter.clip)
    torch.testing.assert_close(there.adapter.context, here.adapter.context, rtol=1e-3, atol=1e-6)
    assert there.chosen == here.chosen and read_record(Folder(tmp_path / "out")).about == {"data": "colours"}


def test_what_is_wrong_is_said_as_in_one_process(monkeypatch: pytest.MonkeyPatch, ray_cluster: Any) -> None:
    """Ray gives back the text alone of what a worker raises, so it comes as a value."""
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    threads = torch.get_num_threads()
    error = _worker({"work": refuses, "threads": threads})
    assert isinstance(error, SettingError) and "learning_rate" in str(error)
    assert _worker({"work": lambda device: "lost", "threads": threads}) is None
    with pytest.raises(SettingError, match="workers: got 9.*at most 4 on this machine"):
        on_workers(refuses, workers=9)
