"""One's own images without a card: a folder of class folders, a divided one, a snapshot."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.evaluation.data import CardData, open_data
from pipeline.evaluation.few_shot import draw, read_data_set
from pipeline.loaders.readers import read_label
from pipeline.shards.selection import read_samples, select
from pipeline.shards.snapshot import publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.folder import ImageFolder
from pipeline.sources.source import Row
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from tests.conftest import image

COUNTS = {"apple pie": 10, "red_house": 5, "zoo": 2}


def fill(folder: Path, counts: dict[str, int], first: int = 0) -> Path:
    for label, count in counts.items():
        for number in range(count):
            path = folder / label / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(first + number))
    return folder


def stored(images: Path, place: Path) -> str:
    options = ShardOptions(media=MediaOptions(image=ImageOptions(resize_mode="no")), number_sample_per_shard=6)
    refresh(ImageFolder(folder=str(images)), Folder(place), options, Workers(processes_count=0))
    return str(place)


def rows_of(options: Mapping[str, Any], scratch: Path) -> list[Row]:
    source = open_source(options)
    return [row for one in source.slices(4, Folder(scratch)) for row in source.rows(one)]


@pytest.fixture(params=["folder", "snapshot"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    images = fill(tmp_path / "images", COUNTS)
    return str(images) if request.param == "folder" else stored(images, tmp_path / "snapshot")


def test_each_class_is_divided(own: str, tmp_path: Path) -> None:
    """50 and 20 % of each class, the rest to test: 5 2 3 of ten, 2 1 2 of five, 1 0 1 of two."""
    data = read_data_set(f"mine={own}")
    assert data.name == "mine" and data.classes == tuple(COUNTS) and data.templates == ("a photo of a {}.",)
    found = {part: [Counter(labels)[number] for number in range(3)] for part, labels in data.labels.items()}
    assert found == {"train": [5, 2, 1], "val": [2, 1, 0], "test": [3, 2, 1]}
    assert draw(data, 1, seed=1).train == draw(read_data_set(f"mine={own}"), 1, seed=1).train
    seen = set()
    for part, options in data.sources.items():
        rows = rows_of(options, tmp_path / part)
        assert [row.columns["label"] for row in rows] == [data.classes[one] for one in data.labels[part]]
        seen |= {row.url for row in rows}
        assert all(row.body("image") for row in rows)
    assert len(seen) == 17  # no image is in two parts


@pytest.mark.parametrize("names", [("train", "test"), ("training", "val"), ("train", "valid", "testing")])
def test_a_divided_folder_stays_divided(names: tuple[str, ...], tmp_path: Path) -> None:
    """Also where a part lacks a class."""
    for number, name in enumerate(names):
        fill(tmp_path / name, COUNTS if number == 0 else {"zoo": 3, "apple pie": 1}, 20 * number)
    data = read_data_set(str(tmp_path))
    assert data.classes == tuple(COUNTS) and len(data.labels["train"]) == 17
    assert [data.classes[one] for one in data.labels["test"]] == ["apple pie", "zoo", "zoo", "zoo"]
    assert ("val" in data.labels) == (len(names) == 3)


def test_a_folder_of_classes_is_evaluated(tmp_path: Path) -> None:
    data = open_data(str(fill(tmp_path / "images", COUNTS)))
    assert isinstance(data, CardData) and data.card.classes == tuple(COUNTS)
    labels = Counter(read_label(sample, "label") for sample in data.samples(None))
    assert labels == COUNTS


def test_a_folder_of_parts_is_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        fill(tmp_path / name, COUNTS)
    with pytest.raises(SettingError, match=f"expected a folder of class folders, such as {tmp_path}/test"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("opened", [open_data, read_data_set])
def test_a_name_that_is_nearly_a_cards(opened: Callable[[str], object]) -> None:
    with pytest.raises(SettingError, match=r"\(did you mean drawn_shapes\?\)"):
        opened("drawn_shape")


def test_hidden_samples_are_not_drawn(tmp_path: Path) -> None:
    """The rows are those that readers see: here without the first sample of each shard of six."""
    whole = read_snapshot(stored(fill(tmp_path / "images", COUNTS), tmp_path / "snapshot"))
    folder = Folder(whole.folder)
    shards = tuple(select(folder, one, np.arange(one.stored) > 0) for one in whole.shards)
    publish_shards(folder, shards, fields=whole.fields, card=None, options={}, rows=17, dropped={})
    data = read_data_set(whole.folder)
    assert sum(map(len, data.labels.values())) == 14
    keys = {row.url for part in data.sources for row in rows_of(data.sources[part], tmp_path / part)}
    assert len(keys) == 14 and not keys & {next(read_samples(folder, one)).key for one in whole.shards}
