"""Label lists by hand-made cases and by counting: own data sets, sampled labels, two words, mixtures."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import LoaderConfig, SamplePosition, training_batches
from pipeline.loaders.label_lists import LabelLists, ListedSegmentationReader
from pipeline.loaders.mixture import make_order, read_data
from pipeline.loaders.segmentation import VOID, LabelClasses, SegmentationReader
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from tests.loaders.test_segmentation import png

UNION = ("cat", "dog", "car", "road", "tree", "other")
ANIMALS, STREET = ("dog", "lion", "cat"), ("Car", "road", "cat")


def reader_of(lists: LabelLists, *sets: tuple[str, ...], **more: Any) -> ListedSegmentationReader:
    settings = {"classes": UNION, "field": "mask.png", "unlabelled": "other", **more}
    each = [SegmentationReader(classes=LabelClasses(mask_classes=names, **settings), resize=None) for names in sets]
    return ListedSegmentationReader(datasets=tuple(each), lists=lists, seed=5)


def sample_of(values: list[list[int]], part: int = 0) -> Sample:
    mask = np.array(values, np.uint8)
    return Sample("k", {"png": png(np.zeros((*mask.shape, 3), np.uint8)), "mask.png": png(mask)}, part=part)


def test_a_value_means_what_its_data_set_says() -> None:
    """Value 1 is a dog in one and a car in the other; a lion is no class of either."""
    reader = reader_of(LabelLists(), ANIMALS, STREET)
    for part, expected in ((0, [5, 1, VOID, 0]), (1, [5, 2, 3, 0])):
        row = reader.read(sample_of([[0, 1, 2, 3]], part), SamplePosition(0, 0))
        assert row["labels"].tolist() == [expected] and "label_list" not in row
    alone = reader_of(LabelLists(), ANIMALS).read(sample_of([[1]], 4))
    assert alone["labels"].tolist() == [[1]]  # one for all
    with pytest.raises(DataError, match="data set 3, but there are classes of 2 data sets"):
        reader.read(sample_of([[0]], 2))


def test_lists_of_data_sets_are_padded_with_void() -> None:
    lions = reader_of(LabelLists(kind="dataset"), ANIMALS, STREET)
    batch = lions.collate([lions.read(sample_of([[1, 3]], part), SamplePosition(0, part)) for part in (0, 1)])
    assert batch["label_list"].tolist() == [[0, 1, 5, VOID], [0, 2, 3, 5]]
    assert batch["label_list"].dtype == torch.int64
    void = reader_of(LabelLists(kind="dataset"), ANIMALS, unlabelled="")
    assert void.read(sample_of([[0, 1]]))["label_list"].tolist() == [0, 1]


def test_an_images_own_labels_are_always_listed_and_others_equally_often() -> None:
    reader = reader_of(LabelLists(per_image=3), STREET)
    counts: Counter[int] = Counter()
    for epoch in range(600):
        listed = reader.read(sample_of([[1, 0, 255]]), SamplePosition(epoch, 3))["label_list"].tolist()
        assert len(listed) == len(set(listed)) == 3 and {2, 5} <= set(listed)
        counts.update(set(listed) - {2, 5})
    assert set(counts) == {0, 1, 3, 4} and all(110 < count < 190 for count in counts.values())  # 150 ± 4 deviations
    many = reader.read(sample_of([[0, 1, 2, 3]]), SamplePosition(0, 3))["label_list"].tolist()
    assert many == [0, 2, 3, 5]  # more own labels than asked for
    again = [reader.read(sample_of([[1]]), SamplePosition(2, 7))["label_list"].tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_sampled_labels_come_from_the_images_own_data_set() -> None:
    reader = reader_of(LabelLists(kind="dataset", per_image=3), ANIMALS, STREET)
    found = {
        label
        for epoch in range(40)
        for label in reader.read(sample_of([[1]], 1), SamplePosition(epoch, 0))["label_list"].tolist()
    }
    assert found == {0, 2, 3, 5}


def test_two_words_are_a_class_of_the_image_and_the_rest() -> None:
    reader = reader_of(LabelLists(two_words=True), STREET)
    chosen = set()
    for epoch in range(30):
        row = reader.read(sample_of([[0, 1, 2, 255]]), SamplePosition(epoch, 0))
        ground, label = row["label_list"].tolist()
        assert ground == 5 and label in (2, 3)
        assert row["labels"].tolist() == [[5, 2 if label == 2 else 5, 3 if label == 3 else 5, VOID]]
        chosen.add(label)
    assert chosen == {2, 3}
    row = reader.read(sample_of([[0, 0]]), SamplePosition(0, 0))
    assert row["labels"].tolist() == [[5, 5]] and row["label_list"][1] != 5  # an image without a class


def test_held_out_classes_are_void_or_unlabelled() -> None:
    for other, expected in (("void", VOID), ("unlabelled", 5)):
        reader = reader_of(LabelLists(), ANIMALS, other_classes=other)
        assert reader.read(sample_of([[2]]))["labels"].tolist() == [[expected]]


@pytest.mark.parametrize("wrong", [{"per_image": 1}, {"per_image": -2}, {"per_image": 4, "two_words": True}])
def test_wrong_lengths_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="labels_per_image"):
        LabelLists(**wrong)


def test_a_mixture_reads_every_sample_with_its_own_classes(
    make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Read back through the loader: the list says which data set it was, the number which one it is."""
    folders = [make_snapshot((6, 4), folder=tmp_path / name, regions=("x", 4)).folder for name in ("one", "two")]
    data = read_data(f"{folders[0]}=1,{folders[1]}=1")
    settings = {"classes": ("red", "green", "blue", "yellow")}
    each = [
        SegmentationReader(classes=LabelClasses(mask_classes=names, **settings), resize=None)
        for names in (("red", "green"), ("blue", "yellow"))
    ]
    reader = ListedSegmentationReader(datasets=tuple(each), lists=LabelLists(kind="dataset"))
    order = make_order(data, seed=0, batch_size=4, lanes=2, shuffle_block=8)
    config = LoaderConfig(loader_workers=0)
    batches = list(training_batches(data, [reader], order, steps=range(5), config=config))
    for step, batch in enumerate(batches):
        parts = [int(number >= 10) for _, number in order.batch(step).tolist()]
        assert batch["label_list"].tolist() == [[2, 3] if part else [0, 1] for part in parts]


def test_boxes_have_lists_too() -> None:
    record = {"height": 2, "width": 2, "objects": [{"label": "cat", "bbox": [0, 0, 2, 2]}]}
    sample = Sample("k", {"png": png(np.zeros((2, 2, 3), np.uint8)), "boxes.json": json.dumps(record).encode()})
    reader = reader_of(LabelLists(kind="dataset", per_image=2), ANIMALS, field="boxes.json")
    listed = reader.read(sample)["label_list"].tolist()  # a box without a mask is void, so nothing is the image's own
    assert len(listed) == 2 and set(listed) <= {0, 1, 5}
