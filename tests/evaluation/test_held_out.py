"""Held-out classes, one at a time: counts by hand, sampled pairs, and a set with its options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluation.held_out import binary_counts, pair_metrics
from pipeline.evaluation.report import table
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.segments import Segmentation
from tests.evaluation.test_segmentation import COLOURS, ColourSegmenter, MakeSnapshot, png


def test_counts_of_a_pair_by_hand() -> None:
    """Six pixels: one void; of class 2 two are found, one is missed, and one of another class is found."""
    truth = torch.tensor([[2, 2, 2], [0, 1, -1]], dtype=torch.int16)
    inside = torch.tensor([[True, True, False], [True, False, True]])
    assert binary_counts(truth, 2, inside).tolist() == [[1, 3], [2, 4]]


def test_metrics_of_pairs_by_hand() -> None:
    """mIoU is the mean of 3/8 and 1/2; of the background 9/12, of the foreground 4/10."""
    pairs = [(4, np.array([[3, 4], [1, 4]])), (4, np.array([[3, 4], [2, 4]])), (7, np.array([[3, 4], [1, 2]]))]
    found = pair_metrics(pairs, tuple("abcdefgh"))
    assert found == pytest.approx({"miou": 7 / 16, "fb_iou": (0.75 + 0.4) / 2, "iou/e": 3 / 8, "iou/h": 0.5})


def test_sampled_pairs_estimate_all_of_them() -> None:
    """Equal every time; near the exact figures, and class by class the mean of its pairs in the limit."""
    numbers = np.random.default_rng(0)
    pairs: list[tuple[int, Any]] = []
    for place in range(60):
        cuts = np.sort(numbers.integers(1, 100, 2))
        pairs.append((place % 3, np.array([[cuts[0], 100], [100 - cuts[1], 100]])))
    exact, sampled = pair_metrics(pairs, tuple("abc")), pair_metrics(pairs, tuple("abc"), 20_000)
    assert sampled == pair_metrics(pairs, tuple("abc"), 20_000)
    assert sampled == pytest.approx(exact, abs=0.01) and sampled != exact


class AloneSegmenter(ColourSegmenter):
    """Notes the words of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[tuple[str, ...]] = []

    def segment(self, images: Any, words: Sequence[str], views: Any = None) -> list[Segmentation]:
        """See ``ColourSegmenter``; all else is black."""
        self.words += [tuple(words)] * len(images)
        return super().segment(images, words, views)


def stripes(*colours: str, labels: Sequence[int]) -> dict[str, bytes]:
    pixels = np.array([[COLOURS.get(colour, (0, 0, 0)) for colour in colours]], np.uint8)
    return {"png": png(pixels), "mask.png": png(np.array([labels], np.uint8))}


def test_a_set_of_held_out_classes(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    """An image is segmented once for each held-out class that it has; other classes are all else."""
    rows = [
        stripes("red", "blue", "black", "blue", labels=(1, 3, 0, 255)),
        stripes("green", "green", "black", "red", labels=(2, 1, 0, 2)),
        stripes("green", "green", "black", "red", labels=(2, 2, 0, 0)),
    ]
    folder = make_snapshot(rows).folder
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "fold.yaml").write_text(
        'name: fold\ntitle: F\nclasses: ["blue", "red", "pink"]\nnovel: ["red", "blue"]\n'
    )
    options = f"words={tmp_path}/words.txt,background_word=black"
    sets = (
        f"fold={folder},{options},held_out={tmp_path}/fold.yaml",
        f"few={folder},{options},held_out={tmp_path}/fold.yaml,episodes=50",
    )
    model = AloneSegmenter()
    found = evaluate(model, Evaluations(segmentation=sets).prepare())
    assert sorted(model.words[:3]) == [("blue", "black"), ("red", "black"), ("red", "black")]
    # red: found in images 1 (right) and 2 (wrong place); blue: right, the other one is void.
    assert found["seg/fold/iou/red"] == pytest.approx(1 / 3) and found["seg/fold/iou/blue"] == 1
    assert found["seg/fold/miou"] == pytest.approx(2 / 3)
    # The foreground has 2 of 4 right, the background 2 + 2 + 2 of 2 + 4 + 2.
    assert found["seg/fold/fb_iou"] == pytest.approx((2 / 4 + 6 / 8) / 2)
    assert found["seg/fold/pairs"] == 3 and found["seg/fold/samples"] == 3
    assert found["seg/few/pairs"] == 50 and 0.5 < found["seg/few/miou"] < 0.8
    assert "FB-IoU" in table(found)


def test_no_pixel_of_a_held_out_class(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    folder = make_snapshot([stripes("red", labels=(0,))]).folder
    (tmp_path / "words.txt").write_text("red\n")
    prepared = Evaluations(segmentation=(f"it={folder},words={tmp_path}/words.txt,held_out=all",)).prepare()
    with pytest.raises(DataError, match=r"no pixel of 1 images has one of the 1 words \(red\)"):
        evaluate(ColourSegmenter(), prepared)
