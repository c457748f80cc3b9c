"""Stored boxes: unusable boxes are left out and counted; a malformed file is an error."""

import json
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.shards.objects import names_of, overlaps, plain_word, read_objects, word_of
from pipeline.shards.sample import Sample


def sample(*boxes: Any, **more: Any) -> Sample:
    objects = [{"label": f"object {number}", "bbox": box} for number, box in enumerate(boxes)]
    record = {"width": 40, "height": 30, "objects": objects, **more}
    return Sample("0007", {"boxes.json": json.dumps(record).encode()})


def test_boxes_are_corners_inside_the_image() -> None:
    objects = read_objects(sample([5, 6, 10, 4], [-5, 20, 10, 20], [30.5, 0, 20, 30]))
    np.testing.assert_array_equal(objects.boxes, [[5, 6, 15, 10], [0, 20, 5, 30], [30.5, 0, 40, 30]])
    assert objects.labels == ("object 0", "object 1", "object 2") and objects.left_out == 0


def test_boxes_without_area_outside_or_without_numbers_are_counted() -> None:
    bad = ([5, 6, 0, 4], [5, 6, -3, 4], [50, 6, 5, 5], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5])
    objects = read_objects(sample(*bad, [1, 1, 2, 2]))
    assert objects.labels == ("object 5",) and objects.left_out == 5


def test_no_objects_are_legal() -> None:
    assert read_objects(sample()).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"width": 4, "height": 0, "objects": []}', b'{"width": 4, "height": 4, "objects": {}}']
    + [b'{"width": 4, "height": 4, "objects": [{"label": "a", "bbox": [1, 2, 3]}]}']
    + [b'{"width": 4, "height": 4, "objects": [{"bbox": [1, 2, 3, 4]}]}', b"[" * 100_000],
)
def test_what_is_no_record_is_one_sentence(content: bytes) -> None:
    with pytest.raises(DataError, match="sample 0007"):
        read_objects(Sample("0007", {"boxes.json": content}))


def test_data_without_boxes_are_said_so() -> None:
    with pytest.raises(DataError, match="sample 0007 has no boxes.json"):
        read_objects(Sample("0007", {}))


def test_overlaps_are_torchvisions() -> None:
    torch = pytest.importorskip("torch")
    from torchvision.ops import box_iou

    low = np.random.default_rng(0).uniform(0, 20, (2, 9, 2))
    boxes = np.concatenate([low, low + np.random.default_rng(1).uniform(0.1, 15, (2, 9, 2))], axis=2)
    expected = box_iou(torch.from_numpy(boxes[0]), torch.from_numpy(boxes[1])).numpy()
    np.testing.assert_allclose(overlaps(boxes[0], boxes[1]), expected, atol=1e-12)


def test_an_image_of_another_size_is_refused() -> None:
    objects = read_objects(sample([1, 1, 2, 2]))
    objects.check_size(30, 40, "0007")
    with pytest.raises(DataError, match="20 x 15 pixels, its boxes are measured in 40 x 30"):
        objects.check_size(15, 20, "0007")


def test_areas_are_the_stated_ones_or_the_boxes() -> None:
    objects = [{"label": "a", "bbox": [1, 2, 3, 4], "area": area} for area in (5.5, None, 0, -3, float("nan"))]
    record = {"width": 40, "height": 30, "objects": [*objects, {"label": "a", "bbox": [38, 0, 10, 10]}]}
    found = read_objects(Sample("0007", {"boxes.json": json.dumps(record).encode()}))
    np.testing.assert_array_equal(found.areas, [5.5, 12, 12, 12, 12, 20])


def test_an_empty_segmentation_is_none() -> None:
    runs = {"size": [30, 40], "counts": [1200]}
    objects = [{"label": "a", "bbox": [1, 2, 3, 4], "segmentation": one} for one in ([], None, {}, runs)]
    record = {"width": 40, "height": 30, "objects": objects}
    found = read_objects(Sample("0007", {"boxes.json": json.dumps(record).encode()}))
    assert found.segmentations == (None, None, None, runs)


def test_only_where_the_negative_labels_are_listed_are_others_unknown() -> None:
    assert not read_objects(sample([1, 1, 2, 2])).federated
    assert read_objects(sample([1, 1, 2, 2], negative=[])).federated
    assert read_objects(sample([1, 1, 2, 2], negative=["dog"], incomplete=["cat"])).incomplete == ("cat",)


@pytest.mark.parametrize("word", ["hot dog", "Hot_Dog ", " HOT  dog.", "hot_dog", "Hot_dog; frankfurter", "hot dog ;"])
def test_names_of_one_class_become_the_same(word: str) -> None:
    assert plain_word(word) == "hot dog" != plain_word("hotdog")


def test_synonyms_are_joined_once_each_and_come_apart_again() -> None:
    word = word_of(["couch", "Couch", "sofa", "settee_(seat)", "sofa"])
    assert word == "couch; sofa; settee_(seat)" and names_of(word) == ("couch", "sofa", "settee_(seat)")
    assert names_of("couch") == ("couch",) and word_of(["couch"]) == "couch"


def test_captions_with_phrases() -> None:
    """Ids of left-out objects are no numbers; unusable phrases are counted; scores and the teacher are optional."""
    objects = [
        {"label": "cat", "bbox": [0, 0, 5, 5], "id": 7, "score": 0.25},
        {"label": "bad", "bbox": [0, 0, 0, 0], "id": 8},
        {"label": "mat", "bbox": [1, 1, 5, 5], "id": 9},
    ]
    phrases = [
        {"start": 2, "end": 5, "objects": [7, 8]},
        {"start": 11, "end": 14, "objects": [9, "x"]},
        {"start": 11, "end": 15},
        {"start": 5, "end": 6, "objects": [7]},
        {"start": -1, "end": 3},
    ]
    record = {"width": 9, "height": 9, "objects": objects, "caption": "a c\u00e9t on a mat", "phrases": phrases}
    found = read_objects(Sample("0", {"boxes.json": json.dumps({**record, "open": True, "teacher": "T"}).encode()}))
    assert [(one.start, one.end, one.objects) for one in found.phrases] == [(2, 5, (0,)), (11, 14, (1,))]
    assert found.phrases_left_out == 3 and found.left_out == 1
    assert found.scores.tolist() == [0.25, 1.0] and found.teacher == "T" and found.open_labels
    plain = read_objects(Sample("0", {"boxes.json": b'{"width": 9, "height": 9, "objects": []}'}))
    assert (plain.caption, plain.phrases, plain.open_labels, len(plain.scores)) == ("", (), False, 0)


@pytest.mark.parametrize("wrong", [{"phrases": 5}, {"phrases": [{"start": 1}]}, {"phrases": ["ab"]}])
def test_malformed_phrases(wrong: dict[str, Any]) -> None:
    record = {"width": 9, "height": 9, "objects": [], "caption": "abc", **wrong}
    with pytest.raises(DataError, match="not as described"):
        read_objects(Sample("0", {"boxes.json": json.dumps(record).encode()}))
