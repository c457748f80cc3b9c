"""What is kept of proposals, whose boxes they are, and what their classes are called."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pipeline.errors import SettingError
from pipeline.evaluation.regions import GivenBoxes, LoadRegionModel, ProposerOptions, TorchvisionDetector, _kept
from pipeline.shards.sample import Sample
from pipeline.stages.annotate.regions import RegionProposals

TINY = "clipmill-tiny:untrained"
CPU = torch.device("cpu")


def proposals(*boxes: tuple[float, float, float, float], scores: list[float] | None = None) -> RegionProposals:
    known = np.linspace(0.9, 0.1, len(boxes)) if scores is None else np.array(scores)
    return RegionProposals(np.array(boxes, np.float64).reshape(-1, 4), known)


@pytest.mark.parametrize(
    "box",
    [
        (float("nan"), 1, 9, 9),
        (1, float("nan"), float("nan"), 9),
        (float("inf"), 1, float("inf"), 9),
        (5, 5, 5, 9),
        (5, 5, 9, 5),
        (9, 9, 5, 5),
        (30, 1, 40, 9),
        (-20, 1, -5, 9),
        (1, 15, 9, 25),
        (23, 1, 40, 9),
        (1, 1, 2.9, 9),
    ],
)
@pytest.mark.filterwarnings("error")
def test_boxes_without_numbers_without_area_or_outside_are_left_out(box: tuple[float, float, float, float]) -> None:
    """Of an image of 24 x 12 pixels; too little of the last ones is in it."""
    kept = _kept(proposals((2, 2, 8, 8), box, (1, 1, 9, 9)), 12, 24, ProposerOptions())
    assert kept.boxes.tolist() == [[2, 2, 8, 8], [1, 1, 9, 9]] and kept.scores.tolist() == [0.9, 0.1]
    assert len(_kept(proposals(box), 12, 24, ProposerOptions()).boxes) == 0


def test_boxes_are_cut_to_the_image_and_the_best_are_kept() -> None:
    """In the order of their scores, equal ones in their own; what is left out takes no place."""
    some = proposals(
        (-5, -5, 30, 30), (0, 0, 1, 1), (1, 1, 9, 9), (2, 2, 9, 9), (3, 3, 9, 9), scores=[0.5, 0.9, 0.7, 0.8, 0.7]
    )
    kept = _kept(some, 12, 24, ProposerOptions(most=3))
    assert kept.boxes.tolist() == [[2, 2, 9, 9], [1, 1, 9, 9], [3, 3, 9, 9]] and kept.scores.tolist() == [0.8, 0.7, 0.7]
    assert _kept(some, 12, 24, ProposerOptions(most=10)).boxes[3].tolist() == [0, 0, 24, 12]
    assert _kept(proposals(), 12, 24, ProposerOptions()).boxes.shape == (0, 4)


def test_given_boxes_are_of_things_and_of_the_labels_named() -> None:
    objects = [
        {"label": "Hot_Dog", "bbox": [1, 1, 8, 8]},
        {"label": "hot dog", "bbox": [0, 0, 20, 10], "iscrowd": 1},
        {"label": "cat", "bbox": [2, 2, 9, 9]},
    ]
    sample = Sample("0", {"boxes.json": json.dumps({"width": 24, "height": 12, "objects": objects}).encode()})
    image = torch.zeros((3, 12, 24), dtype=torch.uint8)
    for labels, expected in (((), [[1, 1, 9, 9], [2, 2, 11, 11]]), (("hot dog",), [[1, 1, 9, 9]])):
        (found,) = GivenBoxes(labels)([image], [sample])
        assert found.boxes.tolist() == expected and found.scores.tolist() == [1.0] * len(expected)
    assert GivenBoxes(("Hot_Dog",)).maker == GivenBoxes(("hot dog",)).maker != GivenBoxes().maker


@pytest.mark.parametrize("classes", [("Hot_Dog", "cup/mug", "Egg."), ("Hot_Dog",)])
def test_classes_are_written_as_in_training(classes: tuple[str, ...]) -> None:
    """By ViLD's rules, over all prompts; one class is enough."""
    loaded = LoadRegionModel(teacher=TINY, device="cpu", templates=("a photo of a {}.", "{article} {}."))(1)
    written = [
        ["a photo of a hot dog.", "This is a hot dog."],
        ["a photo of a cup or mug.", "This is a cup or mug."],
        ["a photo of a egg.", "This is an egg."],
    ]
    clip: Any = loaded._clip
    for vector, texts in zip(loaded.class_vectors(classes), written[: len(classes)], strict=True):
        with torch.no_grad():
            mean = clip.encode_text(clip.tokenizer(texts)).mean(dim=0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("templates", [(), ("a photo",)])
def test_prompts_have_a_place_for_the_name(templates: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="templates"):
        LoadRegionModel(teacher=TINY, templates=templates)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detectors_may_find_as_many_as_are_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own limit is raised, never lowered: what is too small is left out behind it."""
    build = torchvision.models.get_model
    bare: dict[str, Any] = {"weights": None, "weights_backbone": None}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: build(name, **bare))
    for most, least in ((700, 700), (5, 100)):
        model = TorchvisionDetector(name, CPU, most)._model
        limit = getattr(model, "roi_heads", model).detections_per_img
        assert limit == 700 if most == 700 else limit >= least
