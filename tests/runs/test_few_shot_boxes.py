"""Few images of every class: the rule of choice, and the snapshot that is written."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SettingError
from pipeline.loaders.samples import Samples
from pipeline.runs.few_shot_boxes import few_shot_snapshot, labels_of
from pipeline.runs.few_shot_samples import few_shot_numbers
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from tests.grounded import grounded, obj, publish

CLASSES = ("cat", "dog", "hot_dog")


def some_labels(seed: int = 0) -> list[set[str]]:
    random = np.random.default_rng(seed)
    return [{CLASSES[n] for n in np.flatnonzero(random.random(3) < (0.6, 0.3, 0.05))} for _ in range(200)]


@pytest.mark.parametrize("shots", [1, 3, 40])
def test_every_class_gets_its_images_and_none_is_without_need(shots: int) -> None:
    labels = some_labels()
    chosen = few_shot_numbers(labels, shots, seed=1)
    assert len(set(chosen)) == len(chosen)
    counts: Counter[str] = Counter()
    for number in chosen:
        assert any(counts[name] < shots for name in labels[number])  # it was needed when it was taken
        counts.update(labels[number])
    for name in CLASSES:
        available = sum(name in one for one in labels)
        assert counts[name] >= min(shots, available)
    assert few_shot_numbers(labels, shots, seed=1) == chosen
    assert set(few_shot_numbers(labels, shots, seed=2)) != set(chosen)


def test_labels_of_other_classes_and_crowds_do_not_count() -> None:
    sample = grounded([obj("Hot Dog"), obj("zebra"), obj("cat", iscrowd=1)])
    assert labels_of(sample, CLASSES) == {"hot dog"}
    assert few_shot_numbers([set(), {"cat"}, set()], 5, seed=0) == [1]
    with pytest.raises(SettingError, match="shots: got 0"):
        few_shot_numbers([{"cat"}], 0, seed=0)


def test_the_snapshot_has_the_chosen_samples_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [("cat", "dog"), ("cat",), ("dog",), (), ("cat", "cat")]
    rows = [grounded([obj(name) for name in some], key=f"{number:04d}") for number, some in enumerate(labels)]
    data = publish(tmp_path / "data", rows, classes=dict.fromkeys(CLASSES, ""), shard_size=2)
    made = few_shot_snapshot(data.folder, CLASSES, 1, 7, Folder(str(tmp_path / "run")))
    assert "hot_dog 0" in caplog.text and "cat" not in caplog.text
    found = list(Samples(made))
    assert 1 <= len(found) == made.samples < 4 and made.options["classes"] == data.options["classes"]
    everything = {one.key: one.fields for one in rows}
    assert all(one.fields == everything[one.key] for one in found)
    assert {name for one in found for name in labels_of(one, CLASSES)} == {"cat", "dog"}
    again = few_shot_snapshot(data.folder, CLASSES, 1, 7, Folder(str(tmp_path / "run")))
    assert again.uri == made.uri and read_snapshot(made.uri).digest == made.digest
    other = few_shot_snapshot(data.folder, CLASSES, 2, 7, Folder(str(tmp_path / "run")))
    assert other.folder != made.folder and other.samples >= made.samples


def test_data_that_cannot_be_sampled_are_refused(tmp_path: Path) -> None:
    data = publish(tmp_path / "data", [grounded([obj("cat")])]).folder
    other = publish(tmp_path / "other", [grounded([obj("dog")])]).folder
    run = Folder(str(tmp_path / "run"))
    with pytest.raises(SettingError, match="one snapshot with shots"):
        few_shot_snapshot(f"{data}=0.5,{other}=0.5", CLASSES, 1, 0, run)
    with pytest.raises(SettingError, match="samples of the classes"):
        few_shot_snapshot(data, ("zebra",), 1, 0, run)
