"""An adaptation on two workers of Ray Train is that of this process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.adapters import coop
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.shards.storage import Folder
from pipeline.training.adapt_artifact import load_adapted, read_record
from pipeline.training.adapt_recipes import Recipe
from pipeline.training.adapt_workers import Adaptation, _worker, adapt_on_workers
from tests.training.few_shot import NAMES, make_clip, make_pictures


class MakeClip:
    """Pickled by value, since Ray's workers cannot import the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, device: torch.device) -> FrozenClip:
        raise AssertionError("unpickled as a function")

    def __reduce__(self) -> Any:
        import cloudpickle

        return cloudpickle.loads, (cloudpickle.dumps(_loader(str(self.folder))),)


def _loader(folder: str) -> Any:
    import sys

    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules["tests.training.few_shot"])
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return lambda device: make_clip(Path(folder))


@pytest.fixture
def work(tmp_path: Path) -> tuple[Adaptation, FrozenClip]:
    (tmp_path / "clip").mkdir()
    clip = make_clip(tmp_path / "clip")
    made = Adaptation(
        method="coop",
        config=coop.Config(context=3),
        recipe=Recipe(epochs=3, batch_size=4, learning_rate=0.05),
        classes=NAMES,
        templates=(),
        train=make_pictures(clip, 12, 0),
        validation=make_pictures(clip, 9, 1),
        seed=2,
    )
    return made, clip


def test_two_workers_learn_what_one_process_does(work: Any, tmp_path: Path, ray_cluster: Any) -> None:
    adaptation, clip = work
    folder = Folder(tmp_path / "out")
    adapt_on_workers(adaptation, MakeClip(tmp_path / "clip"), folder, workers=2, about={"data": "colours"})
    there, here = load_adapted(folder, clip), adaptation.run(clip)
    torch.testing.assert_close(there.adapter.context, here.adapter.context, rtol=1e-3, atol=1e-6)
    assert there.chosen == here.chosen and read_record(folder).about == {"data": "colours"}


def test_what_is_wrong_is_said_as_in_one_process(work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives back the text alone of what a worker raises, so it comes as a value."""
    adaptation, clip = work
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    config = {"make_clip": lambda device: clip, "folder": str(tmp_path / "out"), "about": {}, "threads": 1}
    error = _worker({**config, "work": Adaptation(**{**vars(adaptation), "recipe": None})})
    assert isinstance(error, SettingError) and "learns by gradients" in str(error)
    assert not (tmp_path / "out").exists()
    assert _worker({**config, "work": adaptation}) is None
    assert read_record(Folder(tmp_path / "out")).method == "coop"
    with pytest.raises(SettingError, match="workers: 4 .*1 to 3"):
        adapt_on_workers(adaptation, MakeClip(tmp_path / "clip"), Folder(tmp_path / "out"), workers=4)
