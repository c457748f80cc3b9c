"""Recall of phrases and accuracy of referring expressions: against a count by brute force, and on cases by hand."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.grounding import (
    LocatedPhrases,
    PhraseRecall,
    ReferringAccuracy,
    annotated_phrases,
    as_grounder,
    locate,
    referring_captions,
    referring_phrases,
)
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import model_figures
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.detections import GroundedBoxes
from pipeline.models.glip import Glip
from pipeline.models.method import build_method
from pipeline.shards.objects import Objects, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import run_lengths
from pipeline.sources.mdetr import Mdetr
from tests.grounded import grounded, obj, publish

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
KINDS = ("people", "animals", "clothing")


class ColourGrounder:
    """Finds a phrase where the image has exactly the colour that it names; a second, shifted box is worse."""

    def __init__(self, masks: bool = False, shift: float = 0.0) -> None:
        self.masks, self.shift = masks, shift
        self.asked: list[tuple[str, list[tuple[int, int]]]] = []

    def ground(
        self, images: Sequence[Tensor], captions: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[GroundedBoxes]:
        self.asked += [(caption, list(some)) for caption, some in zip(captions, spans, strict=True)]
        return [self._found(*one) for one in zip(images, captions, spans, strict=True)]

    def _found(self, image: Tensor, caption: str, spans: Sequence[tuple[int, int]]) -> GroundedBoxes:
        boxes, scores, owners = [], [], []
        for number, (start, end) in enumerate(spans):
            names = [name for name in COLOURS if name in caption[start:end]]
            for name in names[:1]:
                ys, xs = (image == torch.tensor(COLOURS[name])[:, None, None]).all(dim=0).nonzero().unbind(dim=1)
                edges = [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)]
                boxes += [[edge + self.shift for edge in edges], [0.0, 0, 60, 40]]
                scores += [0.9, 0.3]
                owners += [number, number]
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        grids = torch.ones(len(order), 28, 28) if self.masks else None
        return GroundedBoxes(
            torch.tensor(boxes).reshape(-1, 4)[order],
            torch.tensor(scores)[order],
            torch.tensor(owners, dtype=torch.int64)[order],
            grids,
        )


def image_fields(
    caption: str, squares: Sequence[tuple[str, tuple[int, int, int, int]]], **more: Any
) -> dict[str, bytes]:
    """A PNG of 60 x 40 with coloured squares x, y, width, height, a phrase of the caption for each."""
    pixels = np.full((40, 60, 3), 128, np.uint8)
    objects, phrases = [], []
    for number, (colour, (x, y, width, height)) in enumerate(squares):
        pixels[y : y + height, x : x + width] = COLOURS[colour]
        runs = {"size": [40, 60], "counts": run_lengths((pixels == COLOURS[colour]).all(axis=2))}
        objects.append({"id": number, "label": colour, "bbox": [x, y, width, height], "segmentation": runs})
        start = caption.index(colour)
        phrases.append({"start": start, "end": start + len(colour), "objects": [number], "kind": colour})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    record = {"width": 60, "height": 40, "objects": objects, "caption": caption, "phrases": phrases, **more}
    return {"png": buffer.getvalue(), "txt": caption.encode(), "boxes.json": json.dumps(record).encode()}


def samples(rows: Sequence[dict[str, bytes]]) -> list[Sample]:
    return [Sample(f"{number:04d}", fields) for number, fields in enumerate(rows)]


ROWS = [
    image_fields("a red and a green one", [("red", (2, 3, 20, 20)), ("green", (30, 10, 24, 16))]),
    image_fields("only blue here", [("blue", (5, 5, 30, 30))]),
    image_fields("nothing is named", []),
]


def random_case(seed: int) -> LocatedPhrases:
    """Phrases of one or several objects, and boxes near them or anywhere, in random order of scores."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 6))
    low = random.uniform(0, 60, (count, 2))
    truth = np.concatenate([low, low + random.uniform(5, 40, (count, 2))], axis=1)
    phrases, boxes, owners = [], [], []
    for number in range(int(random.integers(1, 5))):
        named = tuple(random.permutation(count)[: random.integers(1, count + 1)].tolist())
        kinds = tuple(random.permutation(list(KINDS))[: random.integers(0, 3)].tolist())
        phrases.append((named, kinds))
        for _ in range(int(random.integers(0, 14))):
            near = truth[random.integers(count)] + random.normal(0, 4, 4)
            boxes.append(np.concatenate([near[:2], np.maximum(near[2:], near[:2] + 1)]))
            owners.append(number)
    order = random.permutation(len(owners))
    found = GroundedBoxes(
        torch.tensor(np.array(boxes).reshape(-1, 4)[order], dtype=torch.float32),
        torch.linspace(1, 0.1, len(owners)),
        torch.tensor(np.array(owners, np.int64)[order]),
    )
    record = {
        "width": 120,
        "height": 120,
        "caption": "abcdefgh",
        "objects": [
            {"id": n, "label": "x", "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for n, (x1, y1, x2, y2) in enumerate(truth.tolist())
        ],
        "phrases": [
            {"start": n, "end": n + 1, "objects": list(named), "kind": list(kinds)}
            for n, (named, kinds) in enumerate(phrases)
        ],
    }
    objects = read_objects(Sample("0", {"boxes.json": json.dumps(record).encode()}))
    return LocatedPhrases(torch.zeros(3, 120, 120, dtype=torch.uint8), objects, annotated_phrases(objects), found)


def brute_force(cases: Sequence[LocatedPhrases], k: int | None, merged: bool, kind: str | None) -> float:
    """One phrase, one box and one annotated box at a time, with torchvision's overlap."""
    hits = total = 0
    for case in cases:
        for number, phrase in enumerate(case.asked):
            if kind is not None and kind not in phrase.kinds:
                continue
            truth = torch.tensor(case.objects.boxes[list(phrase.objects)])
            if merged:
                truth = torch.tensor([[*truth[:, :2].amin(0).tolist(), *truth[:, 2:].amax(0).tolist()]])
            rows = [n for n in range(len(case.found)) if int(case.found.spans[n]) == number]
            best = sorted(rows, key=lambda n: -float(case.found.scores[n]))[:k]
            total += 1
            hits += any(float(box_iou(case.found.boxes[[n]].double(), truth).max()) >= 0.5 for n in best)
    return hits / total


@pytest.mark.parametrize("merged", [False, True])
def test_recall_is_that_of_brute_force(merged: bool) -> None:
    cases = [random_case(seed) for seed in range(60)]
    recall = PhraseRecall(merged=merged)
    for case in cases:
        recall.add(case)
    found = recall.metrics()
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(brute_force(cases, k, merged, None))
        for kind in KINDS:
            assert found[f"r{k}/{kind}"] == pytest.approx(brute_force(cases, k, merged, kind))
    assert found["r_all"] == pytest.approx(brute_force(cases, None, merged, None))
    assert 0.1 < found["r1"] < found["r5"] < found["r10"] <= found["r_all"] < 1
    assert found["phrases"] == sum(len(case.asked) for case in cases) and found["samples"] == 60
    assert found["no_box"] > 0


def test_any_of_two_objects_counts_and_merged_needs_both() -> None:
    """Two boxes side by side: one of them is half of the box around both, less is not."""
    record = {
        "objects": [obj("cat", (0, 0, 20, 20), id=4), obj("cat", (30, 0, 20, 20), id=9)],
        "caption": "two cats",
        "phrases": [{"start": 0, "end": 8, "objects": [9, 4]}],
    }
    objects = read_objects(grounded(record.pop("objects"), **record))
    boxes = torch.tensor([[30.0, 0, 50, 20]])
    case = LocatedPhrases(
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        objects,
        annotated_phrases(objects),
        GroundedBoxes(boxes, torch.ones(1), torch.zeros(1, dtype=torch.int64)),
    )
    results = []
    for merged in (False, True):
        recall = PhraseRecall(merged=merged)
        recall.add(case)
        results.append(recall.metrics()["r1"])
    assert results == [1.0, 0.0]


def record_of(objects: list[dict[str, Any]], phrases: list[dict[str, Any]]) -> Objects:
    return read_objects(grounded(objects, caption="red and blue", phrases=phrases))


def test_what_is_asked_for() -> None:
    """Phrases without objects and crowds are not; expressions name exactly one object."""
    two = [obj("a", id=1), obj("b", (20, 20, 9, 9), id=2), obj("c", (30, 30, 9, 9), id=3, iscrowd=1)]
    several = record_of(
        two,
        [
            {"start": 0, "end": 3, "objects": [1]},
            {"start": 0, "end": 12, "objects": [1, 2]},
            {"start": 4, "end": 7, "objects": []},
            {"start": 8, "end": 12, "objects": [3]},
            {"start": 8, "end": 12, "objects": [2, 3]},
        ],
    )
    assert [(one.span, one.objects) for one in annotated_phrases(several)] == [
        ((0, 3), (0,)),
        ((0, 12), (0, 1)),
        ((8, 12), (1,)),
    ]
    assert [one.span for one in referring_phrases(several)] == [(0, 3)]
    assert referring_captions(several) == ()
    one = record_of(two, [{"start": 0, "end": 3, "objects": [2]}, {"start": 8, "end": 12, "objects": [2]}])
    assert [(asked.span, asked.objects) for asked in referring_captions(one)] == [((0, 12), (1,))]


def test_samples_without_phrases_are_not_grounded() -> None:
    method = ColourGrounder()
    located = list(locate(method, samples(ROWS), annotated_phrases, batch=2, threads=2))
    assert [len(one.asked) for one in located] == [2, 1]
    assert method.asked == [("a red and a green one", [(2, 5), (12, 17)]), ("only blue here", [(5, 9)])]
    with pytest.raises(DataError, match="none of 1 samples has a phrase"):
        list(locate(method, samples(ROWS[2:]), annotated_phrases))


def referring(method: ColourGrounder, rows: Sequence[dict[str, bytes]] = ROWS) -> dict[str, float]:
    accuracy = ReferringAccuracy()
    for located in locate(method, samples(rows), referring_phrases, threads=1):
        accuracy.add(located)
    return accuracy.metrics()


def test_masks_of_expressions_by_hand() -> None:
    """Boxes shifted by 4 pixels: 20 x 20, 24 x 16 and 30 x 30 rectangles; a miss shares nothing."""
    perfect = referring(ColourGrounder(masks=True))
    assert perfect["accuracy"] == perfect["mask_miou"] == perfect["mask_ciou"] == 1 and perfect["expressions"] == 3
    sides = [(20, 20), (24, 16), (30, 30)]
    shared = [(width - 4) * (height - 4) for width, height in sides]
    together = [2 * width * height - both for (width, height), both in zip(sides, shared, strict=True)]
    shifted = referring(ColourGrounder(masks=True, shift=4.0))
    assert shifted["mask_miou"] == pytest.approx(np.mean([a / b for a, b in zip(shared, together, strict=True)]))
    assert shifted["mask_ciou"] == pytest.approx(sum(shared) / sum(together))
    hits = [a / b >= 0.5 for a, b in zip(shared, together, strict=True)]
    assert shifted["accuracy"] == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1

    unnamed = image_fields("a red thing", [("red", (0, 0, 10, 10))])
    record = json.loads(unnamed["boxes.json"])
    record["phrases"][0] |= {"start": 6, "end": 11}  # "thing", which the method cannot find
    unnamed["boxes.json"] = json.dumps(record).encode()
    missed = referring(ColourGrounder(masks=True), [*ROWS, unnamed])
    assert missed["accuracy"] == missed["mask_miou"] == 0.75
    assert missed["mask_ciou"] == pytest.approx((400 + 384 + 900) / (400 + 384 + 900 + 100))


def test_without_masks_only_boxes_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    assert "mask_miou" not in referring(ColourGrounder())
    bare = dict(ROWS[1])
    record = json.loads(bare["boxes.json"])
    del record["objects"][0]["segmentation"]
    bare["boxes.json"] = json.dumps(record).encode()
    found = referring(ColourGrounder(masks=True), [ROWS[0], bare])
    assert "mask_ciou" not in found and found["accuracy"] == 1
    assert caplog.text.count("has no segmentation") == 1


def test_a_glip_on_drawn_sets_by_their_names() -> None:
    """Both kinds of evaluation, and detection of 24 names in prompts of 7, as a job runs them; the model is untrained.

    100 detections an image are within every limit, so fixed AP is the plain one.
    """
    torch.manual_seed(0)
    model = build_method(replace(Glip.smallest(), chunk_words=7, least_score=0.0, detections=100)).eval()
    sets = Evaluations(
        detection=("drawn_val,samples=20", "fixed=drawn_val,samples=20,fixed=true"),
        phrase_grounding=("drawn_val,samples=10", "merged=drawn_val,samples=10,boxes=merged"),
        referring_expressions=("drawn_val,samples=10",),
    ).prepare()
    found = evaluate(model, sets)
    assert {name.split("/")[2] for name in found if name.startswith("grounding/drawn_val/")} >= {"r1", "r5", "no_box"}
    assert found["grounding/drawn_val/r10/object"] == found["grounding/drawn_val/r10"]  # other kinds have no boxes
    assert found["referring/drawn_val/expressions"] < found["grounding/drawn_val/phrases"]
    assert all(0 <= value <= 1 for name, value in found.items() if "samples" not in name and value != int(value))
    assert 0 < found["det/drawn_val/ap50"] == found["det/fixed/ap50"]
    printed = table(found)
    assert "R@10" in printed and "accuracy" in printed and "merged" in printed
    figures = model_figures(model, sets)
    assert {"phrases/drawn_val", "phrases/merged", "expressions/drawn_val"} < set(figures)


def test_refcoco_as_mdetr_publishes_it(tmp_path: Path) -> None:
    """One record for each expression, with the spans of its root; the whole expression is asked for."""
    images, annotations = [], []
    for number, (caption, colour) in enumerate([("red one on the left", "red"), ("the blue block", "blue")]):
        row = image_fields(caption, [(colour, (4 + number, 6, 20, 20))])
        (tmp_path / f"{number}.png").write_bytes(row["png"])
        about = {"caption": caption, "dataset_name": "refcoco", "tokens_negative": [[0, len(caption)]]}
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60, **about})
        spans = [[caption.index(colour), caption.index(colour) + len(colour)], [0, 3]]
        box = {"bbox": [4 + number, 6, 20, 20], "area": 400, "iscrowd": 0, "category_id": 1}
        annotations.append({"id": number, "image_id": number, "tokens_positive": spans, **box})
    file = tmp_path / "finetune_refcoco_val.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    source = Mdetr(annotations=str(file), images=str(tmp_path))
    records = [record for _, record in source.records()]
    rows = [
        {"png": (tmp_path / f"{number}.png").read_bytes(), "boxes.json": json.dumps(one.content).encode()}
        for number, one in enumerate(records)
        if not isinstance(one, Exception)
    ]
    method = ColourGrounder()
    snapshot = publish(tmp_path / "data", samples(rows))
    sets = Evaluations(referring_expressions=(f"refcoco={snapshot.folder},expressions=captions",)).prepare()
    found = evaluate(method, sets)
    assert found["referring/refcoco/accuracy"] == 1 and found["referring/refcoco/expressions"] == 2
    assert method.asked == [("red one on the left", [(0, 19)]), ("the blue block", [(0, 14)])]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"phrase_grounding": ("drawn_val,boxes=all",)}, "phrase_grounding_boxes: got 'all', expected any or merged"),
        ({"referring_expressions": ("drawn_val,expressions=x",)}, "expected phrases or captions"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Evaluations(**options).prepare()


def test_data_without_boxes_and_models_without_ground_are_refused(tmp_path: Path) -> None:
    plain = publish(tmp_path, [Sample("0", {"png": ROWS[0]["png"], "txt": b"a red one"})])
    for kind in ("phrase_grounding", "referring_expressions"):
        with pytest.raises(SettingError, match=r"data with boxes, boxes\.json"):
            Evaluations(**{kind: (plain.folder,)}).prepare()
    with pytest.raises(SettingError, match="a method that grounds phrases"):
        as_grounder(object(), "some/run")
    with pytest.raises(SettingError, match="a method that grounds phrases"):
        evaluate(object(), Evaluations(phrase_grounding=("drawn_val",)).prepare())
