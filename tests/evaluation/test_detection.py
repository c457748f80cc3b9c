"""Detection sets: words, batches, recall of proposals, and whole evaluations with a detector that knows the truth."""

import contextlib
import io
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.detection import (
    BUDGETS,
    ProposalRecall,
    Vocabulary,
    evaluate_detection,
    finding_ranks,
    open_vocabulary,
    published_vocabulary,
)
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import model_figures
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.detections import Detections, check_words
from pipeline.shards.objects import Objects
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import publish_shards
from pipeline.shards.storage import Folder

COLOURS = {"red square": (220, 30, 30), "green square": (30, 200, 30), "blue square": (30, 30, 220)}
BASE, NOVEL = ("red square", "green square"), ("blue square",)


class ColourDetector:
    """Finds what has exactly the colour of a word; of words that are not base only the left half."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...], Collection[str] | None]] = []

    def predict(
        self, images: Sequence[Tensor], words: Sequence[str], base: Collection[str] | None = None
    ) -> list[Detections]:
        check_words(words, base)
        self.asked.append((len(images), tuple(words), base))
        return [self._found(image, words, base) for image in images]

    def propose(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = [self._found(image, tuple(COLOURS), tuple(COLOURS)) for image in images]
        return [(one.boxes, one.scores) for one in found]

    @staticmethod
    def _found(image: Tensor, words: Sequence[str], base: Collection[str] | None) -> Detections:
        boxes, labels = [], []
        for number, word in enumerate(words):
            mask = (image == torch.tensor(COLOURS.get(word, (1, 2, 3)))[:, None, None]).all(dim=0)
            if mask.any():
                ys, xs = mask.nonzero().unbind(dim=1)
                left, right = int(xs.min()), int(xs.max()) + 1
                boxes.append([left, int(ys.min()), right if base is None or word in base else (left + right) // 2])
                boxes[-1].append(int(ys.max()) + 1)
                labels.append(number)
        ones = torch.ones(len(labels), 14, 14)
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return Detections(corners, torch.full((len(labels),), 0.9), torch.tensor(labels, dtype=torch.int64), ones)


def row(*labelled: tuple[str, tuple[int, int, int, int]], **record: Any) -> dict[str, bytes]:
    """A PNG of 60 x 40 with coloured squares at x, y, width, height, and their boxes."""
    pixels = np.full((40, 60, 3), 128, np.uint8)
    objects = []
    for label, (x, y, width, height) in labelled:
        pixels[y : y + height, x : x + width] = COLOURS.get(label, (9, 9, 9))
        polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
        objects.append({"label": label, "bbox": [x, y, width, height], "segmentation": [polygon]})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    boxes = {"width": 60, "height": 40, "objects": objects, **record}
    return {"png": buffer.getvalue(), "json": b"{}", "boxes.json": json.dumps(boxes).encode()}


ROWS = [
    row(("red square", (2, 3, 20, 20)), ("blue square", (30, 10, 24, 16))),
    row(("green square", (5, 5, 30, 30))),
    row(("zebra", (5, 5, 30, 30)), ("blue square", (40, 2, 10, 30))),
    row(),
    row(("red square", (30, 3, 20, 20))),
]


def samples(rows: Sequence[dict[str, bytes]] = ROWS) -> list[Sample]:
    return [Sample(f"{number:04d}", fields) for number, fields in enumerate(rows)]


def test_base_novel_and_all_come_from_one_run() -> None:
    detector = ColourDetector()
    metrics = evaluate_detection(detector, samples(), open_vocabulary(BASE, NOVEL), batch=2, threads=2)
    assert [count for count, _, _ in detector.asked] == [2, 2, 1]
    assert {(words, base) for _, words, base in detector.asked} == {((*BASE, *NOVEL), BASE)}
    assert metrics["ap_base"] == metrics["ap50_base"] == metrics["mask_ap50_base"] == 1
    assert metrics["mask_ap_base"] == 1  # a full mask is pasted into the pixels of its box and no others
    assert metrics["ap_novel"] == pytest.approx(0.1) and metrics["ap50_novel"] == 1  # half a box: an overlap of 0.5
    assert metrics["ap"] == pytest.approx((1 + 1 + 0.1) / 3) and metrics["ap50"] == 1 and metrics["ap75"] < 0.7
    assert metrics["ar100"] == metrics["ar300"] == metrics["ar300_base"] == metrics["ar300_novel"] == 1
    assert metrics["samples"] == 5


def test_words_without_groups_are_all_alike() -> None:
    detector = ColourDetector()
    metrics = evaluate_detection(detector, samples(), Vocabulary(("Blue_Square", "red square")), threads=1)
    assert detector.asked[0][2] is None and "ap_base" not in metrics and "ar300_base" not in metrics
    assert metrics["ap"] == pytest.approx(0.5)  # the detector does not know "Blue_Square"


def test_images_without_boxes_or_of_another_size_are_said_so() -> None:
    bare = Sample("0007", {name: content for name, content in ROWS[0].items() if name != "boxes.json"})
    with pytest.raises(DataError, match="sample 0007 has no boxes.json"):
        evaluate_detection(ColourDetector(), [bare], open_vocabulary(BASE, NOVEL))
    resized = Sample("0008", row(("red square", (2, 3, 20, 20)), width=120))
    with pytest.raises(DataError, match="0008 has 60 x 40 pixels, its boxes are measured in 120 x 40"):
        evaluate_detection(ColourDetector(), [resized], open_vocabulary(BASE, NOVEL))


def test_unreadable_images_are_left_out() -> None:
    broken = {**ROWS[0], "png": b"\x89PNG no more"}
    metrics = evaluate_detection(ColourDetector(), samples([broken, *ROWS]), open_vocabulary(BASE, NOVEL))
    assert metrics["samples"] == 5


@pytest.mark.parametrize(
    ("base", "novel", "sentence"),
    [
        (("cat", "dog", "Cat"), ("cow",), "every word once"),
        (("cat", "dog"), ("hot dog", "Dog "), "a novel class must not be a base class"),
        ((), (), "one word or more"),
        (("cat", " "), (), "none of them empty"),
    ],
)
def test_words_are_named_once(base: tuple[str, ...], novel: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        open_vocabulary(base, novel)


def test_groups_are_of_the_words() -> None:
    with pytest.raises(SettingError, match="cow"):
        Vocabulary(("cat", "dog"), {"novel": ("cow",)})


def test_frequencies_of_lvis_make_the_groups() -> None:
    frequency = {"cat": "f", "dog": "c", "cow": "r", "bow_(weapon)": "r"}
    record = {
        "categories": [{"id": n, "name": name, "frequency": one} for n, (name, one) in enumerate(frequency.items())]
    }
    words = published_vocabulary(record, "lvis.json")
    record["categories"][0]["synonyms"] = ["cat", "kitty"]
    assert published_vocabulary(record, "lvis.json").words == ("cat; kitty", *tuple(frequency)[1:])
    with pytest.raises(SettingError, match="every word once"):
        published_vocabulary({"categories": [*record["categories"], {"name": "Cat", "frequency": "r"}]}, "lvis.json")
    assert words.words == tuple(frequency) and words.base == ("cat", "dog")
    assert words.groups == {
        "base": ("cat", "dog"),
        "novel": ("cow", "bow_(weapon)"),
        "r": ("cow", "bow_(weapon)"),
        "c": ("dog",),
        "f": ("cat",),
    }
    assert published_vocabulary({"categories": [{"name": "cat"}]}, "coco.json").groups == {}
    for broken in ({}, {"categories": 5}, {"categories": [{"id": 1}]}, {"categories": ["cat"]}):
        with pytest.raises(SettingError, match="annotation file"):
            published_vocabulary(broken, "x.json")


def crowded(seed: int) -> tuple[Objects, np.ndarray]:
    random = np.random.default_rng(seed)
    low = random.uniform(0, 70, (6, 2))
    boxes = np.concatenate([low, low + random.uniform(5, 30, (6, 2))], axis=1)
    near = boxes.repeat(40, axis=0) + random.normal(0, 4, (240, 4))
    proposals = np.concatenate([np.minimum(near[:, :2], near[:, 2:] - 1), near[:, 2:]], axis=1)
    labels = tuple(random.choice(["red square", "blue square", "zebra"], 6).tolist())
    crowd = tuple((random.random(6) < 0.2).tolist())
    objects = Objects(100, 100, boxes, labels, (None,) * 6, crowd, areas=np.ones(6))
    return objects, random.permutation(proposals)


def test_recall_is_pycocotools_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = (5, 20, 100)
    monkeypatch.setattr("pipeline.evaluation.detection.BUDGETS", budgets)
    scenes = [crowded(seed) for seed in range(12)]
    recall = ProposalRecall(open_vocabulary(BASE, NOVEL))
    truths: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (objects, proposals) in enumerate(scenes):
        recall.add(objects, proposals)
        for box, label, crowd in zip(objects.boxes, objects.labels, objects.crowd, strict=True):
            if label != "zebra":
                where = {"bbox": [*box[:2], *(box[2:] - box[:2])], "area": 500, "iscrowd": int(crowd)}
                truths.append({"id": len(truths) + 1, "image_id": image, "category_id": 1, **where})
        for rank, box in enumerate(proposals):
            where = {"bbox": [*box[:2], *(box[2:] - box[:2])], "score": 1 - rank / 1000}
            results.append({"image_id": image, "category_id": 1, **where})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": image, "height": 100, "width": 100} for image in range(len(scenes))]
        coco.dataset = {"images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": truths}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.maxDets = list(budgets)
        evaluator.evaluate()
        evaluator.accumulate()
    expected = evaluator.eval["recall"][:, 0, 0, :].mean(axis=0)
    metrics = recall.metrics()
    assert [metrics[f"ar{budget}"] for budget in budgets] == pytest.approx(expected.tolist(), abs=1e-12)
    assert 0 < expected[0] < expected[1] < expected[2] < 1


def test_a_proposal_takes_one_box() -> None:
    twice = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    ranks = finding_ranks(np.array([[50.0, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 9.5]]), twice)
    assert sorted(ranks[0].tolist()) == [1, 2] and sorted(ranks[-1].tolist()) == [1, 2]
    assert finding_ranks(np.empty((0, 4)), twice).min() > max(BUDGETS)
    assert finding_ranks(twice, np.empty((0, 4))).shape == (10, 0)


Make = Callable[..., Any]


def test_a_set_is_evaluated_by_name(make_snapshot: Make, tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    categories = [{"name": name, "frequency": "c"} for name in BASE] + [{"name": NOVEL[0], "frequency": "r"}]
    words.write_text(json.dumps({"categories": categories}))
    folder = make_snapshot(ROWS).folder
    prepared = Evaluations(detection=(f"squares={folder}",), detection_words=str(words)).prepare()
    metrics = evaluate(ColourDetector(), prepared)
    assert metrics["det/squares/ap_base"] == 1 and metrics["det/squares/ap_r"] == pytest.approx(0.1)
    assert metrics["det/squares/ar300_novel"] == 1 and metrics["det/squares/samples"] == 5
    assert all(0 <= value <= 1 for name, value in metrics.items() if not name.endswith("/samples"))
    text = table(metrics)
    assert "squares" in text and "AP novel" in text and "AR300" in text and "AP f" not in text
    figures = model_figures(ColourDetector(), prepared, "at step 3")
    assert list(figures) == ["detections/squares"]
    assert [axis.get_title() for axis in figures["detections/squares"].axes[:2]] == ["marked", "found, with the scores"]


def test_a_snapshot_says_what_its_classes_are(make_snapshot: Make) -> None:
    """As those do that the sources `coco` and `stamp-scenes` make."""
    plain = make_snapshot(ROWS)
    for classes, groups in (
        (
            {"red square": "f", "green square": "c", "blue square": "r"},
            {"base": BASE, "novel": NOVEL, "f": BASE[:1], "c": BASE[1:], "r": NOVEL},
        ),
        ({"red square": "base", "blue square": "novel"}, {"base": BASE[:1], "novel": NOVEL}),
        ({"blue square": ""}, {}),
    ):
        publish_shards(
            Folder(plain.folder),
            plain.shards,
            fields=plain.fields,
            card="mine",
            options={"classes": classes},
            rows=5,
            dropped={},
            always=True,
        )
        vocabulary = Evaluations(detection=(plain.folder,)).prepare().sets[0].ready.vocabulary
        assert vocabulary is not None
        assert vocabulary.words == tuple(classes) and vocabulary.groups == groups
        other = Evaluations(detection=(plain.folder,), detection_words="drawn_novel").prepare().sets[0].ready.vocabulary
        assert other is not None and len(other.words) == 6


def test_the_drawn_card_says_what_is_novel() -> None:
    prepared = Evaluations(detection=("drawn_val",), evaluation_samples=2).prepare()
    (one,) = prepared.sets
    assert len(one.ready.vocabulary.words) == 24
    assert len(one.ready.vocabulary.groups["novel"]) == 6 and one.ready.vocabulary.base is not None
    other = Evaluations(detection=("drawn_val",), detection_words="drawn_novel").prepare().sets[0].ready.vocabulary
    assert other is not None and len(other.words) == 6 and other.groups == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("missing.txt", "no such file or folder: 'missing.txt'"),
        ("auto", "whose card has no classes"),
        ("broken.json", "well-formed JSON"),
        ("twice.txt", "every word once"),
    ],
)
def test_wrong_words_are_found_before_a_model_is_loaded(
    words: str, sentence: str, make_snapshot: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_snapshot(ROWS).folder
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("twice.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(SettingError, match=sentence):
        Evaluations(detection=(str(folder),), detection_words=words).prepare()


def test_a_snapshot_without_boxes_is_found_before_a_model_is_loaded(make_snapshot: Make) -> None:
    bare = make_snapshot([{"png": ROWS[0]["png"], "json": b"{}"}])
    with pytest.raises(SettingError, match=r"data with boxes, boxes.json; this has json, png"):
        Evaluations(detection=(str(bare.folder),), detection_words="drawn_val").prepare()


def test_a_model_that_does_not_detect_is_said_so(make_snapshot: Make, clip: Any) -> None:
    prepared = Evaluations(detection=(str(make_snapshot(ROWS).folder),), detection_words="drawn_val").prepare()
    with pytest.raises(SettingError, match="predict"):
        evaluate(clip, prepared)
    colours = Evaluations(zero_shot=("drawn_shapes",), evaluation_samples=2).prepare()
    with pytest.raises(SettingError, match="encodes images and texts"):
        evaluate(ColourDetector(), colours)
