"""Detections on images: what is drawn where, and names that anybody may have written."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.drawing import (
    COLOURS,
    ShownObject,
    draw,
    draw_detections,
    draw_grounded,
    draw_marked,
    with_legend,
)
from pipeline.models.detections import Detections, GroundedBoxes
from pipeline.shards.objects import Objects

WORDS = ("red star", "circle")


def grey(height: int = 500, width: int = 640) -> Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def found(**changes: Any) -> Detections:
    plain: dict[str, Any] = {
        "boxes": torch.tensor([[100.0, 120, 200, 240], [300, 300, 500, 480]]),
        "scores": torch.tensor([0.9, 0.2]),
        "labels": torch.tensor([1, 0]),
    }
    return Detections(**{**plain, **changes})


def has(image: Tensor, colour: tuple[int, int, int], top: int, left: int, bottom: int, right: int) -> bool:
    part = image[:, top:bottom, left:right]
    return bool((part == torch.tensor(colour)[:, None, None]).all(dim=0).any())


def test_boxes_and_names_are_drawn_in_the_colour_of_their_word() -> None:
    drawn = draw_detections(grey(), found(), WORDS)
    assert drawn.shape == (3, 500, 640) and drawn.dtype == torch.uint8
    assert has(drawn, COLOURS[1], 150, 98, 200, 104) and has(drawn, COLOURS[1], 150, 195, 200, 202)
    assert has(drawn, COLOURS[0], 350, 299, 400, 304)
    assert has(drawn, (255, 255, 255), 98, 100, 118, 180)  # letters on the tag above the box
    untouched = drawn[:, 130:230, 110:190]
    assert (untouched == 128).all()


def test_low_scores_and_too_many_are_not_drawn() -> None:
    only = draw_detections(grey(), found(), WORDS, least=0.5)
    assert torch.equal(only, draw_detections(grey(), found(), WORDS, most=1))
    assert (only[:, 290:490, 290:510] == 128).all() and not (only == 128).all()
    nothing = draw_detections(grey(), found(), WORDS, least=0.95)
    assert torch.equal(nothing, grey())


def test_masks_tint_what_they_cover() -> None:
    masks = torch.zeros(2, 20, 20)
    masks[0, :, :10] = 1  # the left half of the first box
    drawn = draw_detections(grey(), found(masks=masks), WORDS)
    inside = drawn[:, 140:220, 115:140]
    assert (inside == inside[:, :1, :1]).all() and not (inside == 128).all()
    assert (drawn[:, 140:220, 160:185] == 128).all()


def test_small_images_are_magnified() -> None:
    small = Detections(torch.tensor([[10.0, 12, 20, 24]]), torch.tensor([0.5]), torch.tensor([0]), torch.ones(1, 9, 9))
    drawn = draw_detections(grey(48, 64), small, WORDS)
    assert drawn.shape == (3, 360, 480)
    assert has(drawn, COLOURS[0], 100, 72, 150, 80)


@pytest.mark.parametrize("name", ["", "\u732b\U0001f600", "x" * 500, "$\\frac{", "a\nb\tc", "\x00"])
@pytest.mark.parametrize(
    "box", [(-5.0, -5.0, 700.0, 600.0), (0, 0, 0, 0), (639.5, 499.5, 640, 500), (10, 490, 12, 499)]
)
def test_any_name_and_any_box_can_be_drawn(name: str, box: tuple[float, float, float, float]) -> None:
    one = Detections(torch.tensor([box]), torch.tensor([0.5]), torch.tensor([0]))
    assert draw_detections(grey(), one, (name,)).shape == (3, 500, 640)


def test_names_do_not_cover_each_other() -> None:
    three = [ShownObject((50, 200, 150, 300), "one and the same", colour) for colour in range(3)]
    drawn = draw(grey(), three)
    heights = []
    for colour in range(3):
        wide = (drawn[:, :, 70:90] == torch.tensor(COLOURS[colour])[:, None, None]).all(dim=0).sum(dim=1)
        heights.append(int((wide > 5).sum()))
    assert min(heights) > 10


def test_what_is_marked_is_drawn_with_its_mask() -> None:
    box = np.array([[100.0, 120, 200, 240]])
    polygon = [[100, 120, 200, 120, 200, 240, 100, 240]]
    plain = {"height": 500, "width": 640, "boxes": box, "areas": np.ones(1)}
    masked = draw_marked(grey(), Objects(labels=("circle",), segmentations=(polygon,), **plain), WORDS)
    assert has(masked, COLOURS[1], 150, 98, 200, 104) and not (masked[:, 150:200, 130:160] == 128).all()
    bare = draw_marked(grey(), Objects(labels=("zebra",), segmentations=(None,), **plain), WORDS)
    assert (bare[:, 150:200, 130:160] == 128).all() and not torch.equal(bare, grey())


@pytest.mark.parametrize(("field", "value"), [("least", 1.5), ("least", -0.1), ("most", 0)])
def test_wrong_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(SettingError):
        draw_detections(grey(), found(), WORDS, **{field: value})  # type: ignore[arg-type]


def test_a_legend_has_every_phrase_in_its_colour_and_wraps() -> None:
    phrases = [f"a phrase of number {number}" for number in range(9)]
    drawn = with_legend(grey(), phrases)
    assert drawn.shape[2] == 640 and torch.equal(drawn[:, :500], grey())
    below = drawn[:, 500:]
    rows = [(below == torch.tensor(COLOURS[number])[:, None, None]).all(dim=0).nonzero()[0] for number in range(9)]
    assert len({int(row[0]) for row in rows}) > 2  # lines of swatches
    assert torch.equal(with_legend(grey(), []), grey())
    assert with_legend(grey(40, 30), ["one that is much wider than the image"]).shape[2] == 30


def test_boxes_of_phrases_have_one_colour_for_each_phrase() -> None:
    boxes = torch.tensor([[100.0, 120, 200, 240], [300, 300, 500, 480], [20, 20, 60, 60]])
    grounded = GroundedBoxes(boxes, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([1, 1, 0]))
    drawn = draw_grounded(grey(), grounded, ["red star", "disc"], least=0.2)
    assert has(drawn, COLOURS[1], 150, 98, 200, 104) and has(drawn, COLOURS[1], 350, 299, 400, 304)
    assert not has(drawn, COLOURS[0], 0, 0, 500, 640)
