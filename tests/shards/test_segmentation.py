"""Masks in COCO's three forms."""

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.shards.segmentation import mask_of, mask_of_runs, run_lengths, run_lengths_at, runs_of_text

MASK = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]], np.uint8)


def text_of_runs(runs: list[int]) -> str:
    """COCO's string, implemented from its description: differences to the run two before, five bits per group."""
    letters = []
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = not (value == 0 and not bits & 16 or value == -1 and bits & 16)
            letters.append(chr(48 + bits + 32 * more))
            if not more:
                break
    return "".join(letters)


def test_runs_go_down_the_columns() -> None:
    runs = {"size": [3, 4], "counts": [2, 4, 0, 1, 5]}
    assert mask_of(runs, 3, 4).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0]]
    assert np.array_equal(mask_of({"size": [3, 4], "counts": run_lengths(MASK.astype(bool))}, 3, 4), MASK)


def test_a_known_string() -> None:
    """The runs 6, 1, 40, 4, 5, 4, 5, 4, 21 of COCO's own demonstration mask."""
    assert runs_of_text("61X13mN000`0") == [6, 1, 40, 4, 5, 4, 5, 4, 21]


@pytest.mark.parametrize("seed", range(5))
def test_strings_give_the_runs_back(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    mask = numbers.random((37, 53)) < [0.5, 0.01, 0.99, 0.2, 0.0][seed]
    runs = run_lengths(mask)
    text = text_of_runs(runs)
    assert runs_of_text(text) == runs
    assert np.array_equal(mask_of({"size": [37, 53], "counts": text}, 37, 53), mask)


def test_polygons_cover_the_middles_of_pixels() -> None:
    square = mask_of([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8)
    inside = square[1:4, 2:6]
    assert inside.all()
    assert square.sum() <= 5 * 4  # OpenCV also fills pixels that the border touches
    two = mask_of([[0, 0, 2, 0, 2, 2, 0, 2], [5, 3, 8, 3, 8, 6, 5, 6]], 6, 8)
    assert two[0, 0] and two[4, 6] and not two[0, 6]


def test_a_large_triangle_has_its_area() -> None:
    mask = mask_of([[10, 10, 190, 10, 10, 150]], 160, 200)
    assert mask.sum() == pytest.approx(180 * 140 / 2, rel=0.02)


@pytest.mark.parametrize(
    "hostile",
    [
        {"size": [4, 4], "counts": [16]},
        {"size": [3, 4], "counts": [5]},
        {"size": [3, 4], "counts": [-1, 13]},
        {"size": [3, 4], "counts": "~~~"},
        {"counts": [12]},
        [[1, 2, 3]],
        [[1, 2, float("nan"), 4, 5, 6]],
        [["a", "b"]],
        7,
        "polygon",
    ],
)
def test_what_is_no_mask_is_refused(hostile: object) -> None:
    with pytest.raises(DataError, match="neither polygons nor runs"):
        mask_of(hostile, 3, 4)


def test_polygons_far_outside_are_cut() -> None:
    assert mask_of([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]], 3, 4).all()


def test_runs_of_a_mask_at_a_position_are_those_of_the_whole_image() -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        part = generator.random((4, 3)) < 0.6
        whole = np.zeros((4, 5) if part.all() else (6, 5), bool)
        top, left = (whole.shape[0] - 4, 1)
        whole[top : top + 4, left : left + 3] = part
        counts = run_lengths_at(part, top, left, *whole.shape)
        assert np.array_equal(mask_of_runs(counts, *whole.shape), whole)
        assert counts == run_lengths(whole)
