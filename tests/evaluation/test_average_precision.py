"""Average precision against pycocotools, against a count by hand of LVIS's rules, and on cases with a known answer."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.errors import DataError
from pipeline.evaluation.average_precision import MOST_FEDERATED, AveragePrecision, coco_runs, runs_of
from pipeline.models.detections import Detections
from pipeline.shards.objects import Objects, overlaps

WORDS = ("cat", "dog", "hot dog", "cow", "bird")
SIDE = 240


def marked(boxes: Sequence[Sequence[float]], labels: Sequence[str], **more: Any) -> Objects:
    """Objects that fill their boxes, unless ``segmentations`` are given."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in corners.tolist()]
    areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    plain = {"segmentations": tuple(polygons), "crowd": (False,) * len(labels), "areas": areas}
    return Objects(height=SIDE, width=SIDE, boxes=corners, labels=tuple(labels), **{**plain, **more})


def found(boxes: Sequence[Sequence[float]], labels: Sequence[int], scores: Sequence[float], **more: Any) -> Detections:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Detections(corners, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), **more)


def scene(seed: int, crowds: bool = True, classes: int = 5) -> tuple[Objects, Detections]:
    """Some objects, detections near them and elsewhere, of the right class and another, some with equal scores."""
    random = np.random.default_rng(seed)
    count = int(random.integers(0, 7))
    low = random.uniform(0, SIDE - 30, (count, 2))
    boxes = np.concatenate([low, (low + random.uniform(8, 200, (count, 2))).clip(0, SIDE)], axis=1).round(2)
    labels = random.integers(0, classes, count)
    near = (np.repeat(boxes, 4, axis=0) + random.normal(0, 5, (4 * count, 4))).clip(0, SIDE)
    low = random.uniform(0, SIDE - 40, (9, 2))
    anywhere = np.concatenate([low, low + random.uniform(5, 40, (9, 2))], axis=1)
    guesses = np.concatenate([near, anywhere])
    guesses = np.concatenate(
        [np.minimum(guesses[:, :2], guesses[:, 2:]), np.maximum(guesses[:, :2], guesses[:, 2:])], 1
    )
    guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 2)
    called = np.concatenate(
        [np.where(random.random(4 * count) < 0.7, labels.repeat(4), 0), random.integers(0, classes, 9)]
    )
    scores = random.choice(np.linspace(0.05, 0.95, 19), len(called))
    order = np.argsort(-scores, kind="stable")
    masks = torch.from_numpy(random.uniform(0.3, 1, (len(order), 14, 14)).astype(np.float32))
    truth = marked(
        boxes.tolist(),
        [WORDS[label] for label in labels],
        crowd=tuple((random.random(count) < (0.3 if crowds else 0)).tolist()),
        areas=random.uniform(0.4, 1, count) * (boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
    )
    return truth, found(guesses[order].tolist(), called[order].tolist(), scores[order].tolist(), masks=masks)


def average_precision(scenes: Sequence[tuple[Objects, Detections]], **options: Any) -> AveragePrecision:
    counted = AveragePrecision(WORDS, **options)
    for truth, detections in scenes:
        counted.add(truth, detections)
    return counted


def pycocotools_stats(scenes: Sequence[tuple[Objects, Detections]], kind: str) -> tuple[list[float], Any]:
    """COCO's own summary and table; every record is written here anew."""
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (truth, detections) in enumerate(scenes):
        for place, label in enumerate(truth.labels):
            x1, y1, x2, y2 = truth.boxes[place].tolist()
            about = {"iscrowd": int(truth.crowd[place]), "area": float(truth.areas[place])}
            runs = coco_mask.merge(coco_mask.frPyObjects(truth.segmentations[place], SIDE, SIDE))
            where = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": runs, "image_id": image}
            objects.append({"id": len(objects) + 1, "category_id": WORDS.index(label), **where, **about})
        whole = detections.whole_masks(SIDE, SIDE).numpy().astype(np.uint8)
        for place in range(len(detections)):
            x1, y1, x2, y2 = detections.boxes[place].tolist()
            runs = coco_mask.encode(np.asfortranarray(whole[place]))
            what = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {"segmentation": runs}
            about = {"category_id": int(detections.labels[place]), "score": float(detections.scores[place])}
            results.append({"image_id": image, **about, **what})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(len(scenes))],
            "categories": [{"id": number, "name": word} for number, word in enumerate(WORDS)],
            "annotations": objects,
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist(), evaluator.eval["precision"][..., 2]


@pytest.mark.parametrize(("kind", "prefix"), [("bbox", ""), ("segm", "mask_")])
def test_it_is_pycocotools_average_precision(kind: str, prefix: str) -> None:
    scenes = [scene(seed) for seed in range(30)]
    counted = average_precision(scenes, groups={"base": WORDS[:3], "novel": WORDS[3:]})
    stats, table = pycocotools_stats(scenes, kind)
    metrics = counted.metrics()
    names = ("ap", "ap50", "ap75", "aps", "apm", "apl")
    assert [metrics[prefix + name] for name in names] == pytest.approx(stats[:6], abs=1e-12)
    assert 0.05 < metrics[prefix + "ap"] < 0.95 and len({*stats[:6]}) == 6
    np.testing.assert_allclose(counted.precision(kind), table, atol=1e-12)  # type: ignore[arg-type]
    assert metrics[prefix + "ap_novel"] == pytest.approx(table[:, :, 3:, 0].mean(), abs=1e-12)
    assert metrics[prefix + "ap50_base"] == pytest.approx(table[0, :, :3, 0].mean(), abs=1e-12)


def test_runs_of_a_part_are_those_of_the_whole_image() -> None:
    """As pycocotools packs it, also where a mask goes on from the foot of a column in the next one's head."""
    random = np.random.default_rng(0)
    for number in range(400):
        height, width = random.integers(1, 20, 2)
        top, left = random.integers(0, height), random.integers(0, width)
        rows, columns = random.integers(0, height - top + 1), random.integers(0, width - left + 1)
        if number % 3 == 0:
            top, rows = 0, height
        mask = random.random((rows, columns)) < random.choice([0, 0.1, 0.5, 0.9, 1])
        whole = np.zeros((height, width), np.uint8)
        whole[top : top + rows, left : left + columns] = mask
        found, expected = runs_of(mask, top, left, height, width), coco_mask.encode(np.asfortranarray(whole))
        assert (found["counts"], [*found["size"]]) == (expected["counts"], [*expected["size"]]), number


def test_classes_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [scene(seed) for seed in range(8)]
    together = average_precision(scenes).metrics()
    monkeypatch.setattr("pipeline.evaluation.average_precision.CLASSES_AT_ONCE", 2)
    assert average_precision(scenes).metrics() == together


def federated_ap(scenes: Sequence[tuple[Objects, Detections]], word: str, threshold: float) -> float | None:
    """AP of one class by LVIS's rules, in plain loops: what is searched for, what is ignored, who takes what."""
    judged: list[tuple[float, bool]] = []
    objects = 0
    for truth, detections in scenes:
        boxes = truth.boxes[[label == word for label in truth.labels]]
        objects += len(boxes)
        if not len(boxes) and word not in truth.negative:
            continue
        free = set(range(len(boxes)))
        for place in range(min(len(detections), MOST_FEDERATED)):
            if WORDS[int(detections.labels[place])] != word:
                continue
            overlap = overlaps(detections.boxes[place : place + 1].double().numpy(), boxes)[0]
            best = max(free, key=lambda one: (overlap[one], one), default=None)
            right = best is not None and overlap[best] >= threshold
            if right:
                free.discard(best)
            if right or word not in truth.incomplete:
                judged.append((float(detections.scores[place]), right))
    if not objects:
        return None
    judged.sort(key=lambda one: -one[0])
    precisions, recalls, hits = [], [], 0
    for rank, (_, right) in enumerate(judged, 1):
        hits += right
        precisions.append(hits / rank)
        recalls.append(hits / objects)
    at = np.linspace(0, 1, 101)
    best_after = [max((p for p, r in zip(precisions, recalls, strict=True) if r >= one), default=0) for one in at]
    return float(np.mean(best_after))


def federated(seed: int) -> tuple[Objects, Detections]:
    truth, detections = scene(seed, crowds=False)
    random = np.random.default_rng([seed, 1])
    absent = [word for word in WORDS if word not in truth.labels and random.random() < 0.5]
    partly = [word for word in sorted(set(truth.labels)) if random.random() < 0.4]
    more = {"negative": tuple(absent), "incomplete": tuple(partly), "federated": True}
    extra = {"segmentations": truth.segmentations, "crowd": truth.crowd, "areas": truth.areas}
    return marked(truth.boxes.tolist(), truth.labels, **extra, **more), detections


def test_federated_data_are_judged_by_lvis_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.average_precision.MOST_FEDERATED", 15)
    monkeypatch.setitem(globals(), "MOST_FEDERATED", 15)
    scenes = [federated(seed) for seed in range(40)]
    groups = {"r": WORDS[:1], "c": WORDS[1:3], "f": WORDS[3:]}
    metrics = average_precision(scenes, groups=groups).metrics()
    thresholds = np.linspace(0.5, 0.95, 10)
    each = {word: [federated_ap(scenes, word, threshold) for threshold in thresholds] for word in WORDS}
    assert metrics["ap"] == pytest.approx(np.mean(list(each.values())), abs=1e-9)
    assert metrics["ap50"] == pytest.approx(np.mean([aps[0] for aps in each.values()]), abs=1e-9)
    for group, words in groups.items():
        assert metrics[f"ap_{group}"] == pytest.approx(np.mean([each[word] for word in words]), abs=1e-9)
    exhaustive = [(marked(t.boxes.tolist(), t.labels, areas=t.areas), d) for t, d in scenes]
    assert average_precision(exhaustive).metrics()["ap"] < metrics["ap"] - 0.01  # the rules matter here


BOX = [10.0, 10, 60, 60]


def test_what_is_found_first_counts() -> None:
    truth = marked([BOX, [80, 80, 150, 150]], ["cat", "cat"])
    right, wrong = BOX, [100.0, 0, 140, 40]
    assert average_precision([(truth, found([right, wrong], [0, 0], [0.9, 0.8]))]).metrics()["ap"] == pytest.approx(
        51 / 101
    )  # half of the objects: the recalls 0, 0.01, ... 0.5
    assert average_precision([(truth, found([wrong, right], [0, 0], [0.9, 0.8]))]).metrics()["ap"] == pytest.approx(
        51 / 101 / 2
    )


def test_a_crowd_takes_any_number_and_is_no_object() -> None:
    crowd = marked([BOX, [80, 0, 160, 160]], ["cat", "cat"], crowd=(False, True))
    several = found([BOX, [90, 0, 120, 40], [100, 50, 150, 99]], [0, 0, 0], [0.5, 0.9, 0.8])
    assert average_precision([(crowd, several)]).metrics()["ap"] == 1
    apart = marked([BOX, [80, 0, 160, 160]], ["cat", "cat"])
    assert average_precision([(apart, several)]).metrics()["ap"] < 0.5


def test_what_nobody_looked_for_does_not_count() -> None:
    cat = found([BOX, [90, 90, 140, 140]], [0, 1], [0.5, 0.9])
    dog = (marked([BOX], ["dog"], federated=True), found([BOX], [1], [0.4]))

    def ap_of_dogs(**more: Any) -> float:
        scenes = [(marked([BOX], ["cat"], **more), cat), dog]
        return average_precision(scenes, groups={"dogs": ["dog"]}).metrics()["ap_dogs"]

    assert ap_of_dogs(federated=True) == 1  # the wrong dog is in an image that was not searched for dogs
    assert ap_of_dogs(federated=True, negative=("dog",)) == 0.5
    assert ap_of_dogs() == 0.5
    assert ap_of_dogs(federated=True, negative=("Dog_",)) == 0.5


def test_only_the_best_300_of_a_federated_image_count() -> None:
    truth = marked([BOX], ["cat"], federated=True)
    many = [[100.0, 100, 110, 110]] * 300
    late = found([*many, BOX], [1] * 300 + [0], np.linspace(0.9, 0.1, 301).tolist())
    assert average_precision([(truth, late)]).metrics()["ap"] == 0
    earlier = found([*many[1:], BOX], [1] * 299 + [0], np.linspace(0.9, 0.1, 300).tolist())
    assert average_precision([(truth, earlier)]).metrics()["ap"] == 1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_fixed_ap_counts_the_best_of_each_class_over_all_images(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pycocotools on the detections that are left when each class keeps its 20 highest scores of all images."""
    monkeypatch.setattr("pipeline.evaluation.average_precision.MOST_FIXED", 20)
    scenes = [scene(seed, crowds=False) for seed in range(30)]
    every = [(one.scores[n].item(), k, n) for k, (_, one) in enumerate(scenes) for n in range(len(one))]
    kept: list[tuple[Objects, Detections]] = []
    best: set[tuple[int, int]] = set()
    for number in range(len(WORDS)):
        of_class = [one for one in every if int(scenes[one[1]][1].labels[one[2]]) == number]
        assert len(of_class) > 40
        best |= {(k, n) for _, k, n in sorted(of_class, key=lambda one: -one[0])[:20]}
    for k, (truth, one) in enumerate(scenes):
        rows = [n for n in range(len(one)) if (k, n) in best]
        masks = None if one.masks is None else one.masks[rows]
        kept.append((truth, Detections(one.boxes[rows], one.scores[rows], one.labels[rows], masks)))
    prefix = {"bbox": "", "segm": "mask_"}[kind]
    expected, _ = pycocotools_stats(kept, kind)
    fixed, plain = average_precision(scenes, fixed=True).metrics(), average_precision(scenes).metrics()
    found = [fixed[f"{prefix}{name}"] for name in ("ap", "ap50", "ap75", "aps", "apm", "apl")]
    assert found == pytest.approx(expected[:6], abs=1e-6)
    assert fixed[f"{prefix}ap"] != pytest.approx(plain[f"{prefix}ap"], abs=1e-3)


def test_fixed_ap_has_no_limit_per_image() -> None:
    truth = marked([BOX], ["cat"], federated=True)
    boxes, labels = [[0.0, 0, 9, 9]] * MOST_FEDERATED + [BOX], [1] * MOST_FEDERATED + [0]
    scores = np.linspace(1, 0.1, MOST_FEDERATED + 1).tolist()
    scenes = [(truth, found(boxes, labels, scores))]
    assert average_precision(scenes).metrics()["ap"] == 0
    assert average_precision(scenes, fixed=True).metrics()["ap"] == 1


def test_fixed_ap_ranks_detections_of_unverified_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A better dog in an image that was not verified for dogs takes one of the places, but is not a false positive."""
    monkeypatch.setattr("pipeline.evaluation.average_precision.MOST_FIXED", 1)
    right = (marked([BOX], ["dog"], federated=True), found([BOX], [1], [0.4]))
    other = (marked([BOX], ["cat"], federated=True), found([BOX, BOX], [0, 1], [0.9, 0.8]))
    assert average_precision([right, other], fixed=True).metrics()["ap"] == 0.5  # the cat; the dog is not ranked
    assert average_precision([right], fixed=True).metrics()["ap"] == 1


def test_other_classes_and_sizes_are_left_out() -> None:
    truth = marked([BOX, [80, 80, 150, 150]], ["Hot_Dog", "zebra"])
    metrics = average_precision([(truth, found([BOX], [2], [0.9]))], groups={"novel": ["cow"]}).metrics()
    assert metrics == {"ap": 1, "apm": 1, "ap50": 1, "ap75": 1}


def test_no_detections_are_zero() -> None:
    metrics = average_precision([(marked([BOX], ["cat"]), found([], [], []))]).metrics()
    assert metrics["ap"] == metrics["apm"] == 0 and "aps" not in metrics


def test_labels_that_are_no_words_are_said_so() -> None:
    with pytest.raises(DataError, match=r"none of the labels in 1 images \('zebra'\) is one of the words \('cat'"):
        average_precision([(marked([BOX], ["zebra"]), found([BOX], [0], [0.9]))]).metrics()


@pytest.mark.parametrize(
    "segmentation",
    [None, 5, [], [[1, 2, 3, 4]], [[1, 2, 3]], [[1, 2, 3, 4, 5, float("nan")]], ["abcdef"], {"size": [4, 4]}]
    + [{"size": [4, 4], "counts": [16]}, {"size": [SIDE, SIDE], "counts": "\x01zz"}],
)
def test_what_is_no_segmentation_is_one_sentence(segmentation: Any) -> None:
    with pytest.raises(DataError, match="segmentation"):
        coco_runs(segmentation, SIDE, SIDE)


def test_a_polygon_far_outside_is_cut() -> None:
    whole = coco_runs([[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]], 30, 40)
    assert coco_mask.area(whole) == 30 * 40


def test_a_polygon_without_three_corners_is_left_out_beside_others() -> None:
    """COCO's own code, of the whole polygon alone."""
    whole = [10.5, 10, 60, 12, 40, 55]
    expected = coco_mask.frPyObjects([whole], SIDE, SIDE)[0]
    assert coco_runs([[1, 2, 3, 4], whole, [5, 6]], SIDE, SIDE)["counts"] == expected["counts"]
    with pytest.raises(DataError, match="no polygon of three corners"):
        coco_runs([[1, 2, 3, 4], [5, 6]], SIDE, SIDE)


def test_that_masks_are_no_longer_measured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the image; what is no word may lack its segmentation."""
    masks = torch.ones(1, 14, 14)
    polygon = [[10.0, 10, 60, 10, 60, 60, 10, 60]]
    detections = found([BOX], [0], [0.9], masks=masks)
    zebra = marked([BOX, BOX], ["cat", "zebra"], segmentations=(polygon, None), key="0001")
    bare = [marked([BOX], ["cat"], segmentations=(None,), key=key) for key in ("0002", "0003")]
    assert average_precision([(zebra, detections)]).metrics()["mask_ap"] == 1 and not caplog.records
    counted = average_precision([(one, detections) for one in (zebra, *bare)]).metrics()
    assert "mask_ap" not in counted and counted["ap"] == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "(cat) of sample 0002 has no segmentation" in record.getMessage()


def test_a_class_that_is_partly_marked_is_named_as_labels_are() -> None:
    """A second cat where only some cats are marked is no error, however the list writes the name."""
    twice = found([BOX, [100.0, 100, 140, 140]], [0, 0], [0.5, 0.9])
    for name in ("cat", "Cat_"):
        partly = marked([BOX], ["cat"], federated=True, incomplete=(name,))
        assert average_precision([(partly, twice)]).metrics()["ap"] == 1
