"""Thresholds of the background: a number, a file, the relative rule, and learned ones against all thresholds tried."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.background import GRID, Background, ThresholdCounts, read_thresholds
from pipeline.evaluation.pixel_counts import PixelCounts
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.segments import ImageViews, Segmentation
from tests.evaluation.test_segmentation import MakeSnapshot, png


def result(labels: Any, scores: Any, limits: Any = None) -> Segmentation:
    limit = None if limits is None else torch.tensor(limits, dtype=torch.float32)
    return Segmentation(torch.tensor(labels, dtype=torch.int16), torch.tensor(scores, dtype=torch.float32), limit)


def test_one_threshold_one_for_each_word_and_the_relative_rule() -> None:
    found = result([[0, 1, 0, -1]], [[0.2, 0.5, 0.6, 0.9]])
    assert Background((0.5,)).where(found).tolist() == [[True, False, False, True]]
    assert Background((0.1, 0.7)).where(found).tolist() == [[False, True, False, True]]
    assert Background((0.1, 0.7)).removed(found).labels.tolist() == [[0, -1, 0, -1]]
    sure = result([[0, 1, 0]], [[0.2, 0.5, 0.6]])
    assert Background((0.95,)).where(sure).all()
    assert Background((0.95,), relative=True).where(sure).tolist() == [[True, True, False]]
    assert Background((0.95, 0.4), relative=True).where(sure).tolist() == [[True, False, False]]
    assert Background((0.95,)).where(result([[0, 1]], [[0.2, 0.5]], [[0.2, 0.6]])).tolist() == [[False, True]]


def test_thresholds_of_a_file(tmp_path: Path) -> None:
    words = ("cat", "couch; sofa", "dog")
    (tmp_path / "some.json").write_text(json.dumps({"Couch": 0.5, "dog": 1}))
    assert read_thresholds(str(tmp_path / "some.json"), words, "threshold", rest=1) == (0.0, 0.5, 1.0, 0.0)
    assert read_thresholds(0.25, words, "threshold") == read_thresholds("0.25", words, "threshold") == (0.25,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"cow": 0.5}', "not cow"),
        ('{"cat": 2}', "0 to 1"),
        ('{"cat": "0.5"}', "maps words to numbers"),
        ('{"cat": true}', "maps words to numbers"),
        ('{"cat": NaN}', "0 to 1"),
        ("[0.5]", "maps words to numbers"),
        ("{", "well-formed JSON"),
    ],
)
def test_wrong_files_are_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(SettingError, match=f"^threshold: .*{sentence}"):
        read_thresholds(str(tmp_path / "some.json"), ("cat",), "threshold")


def overlap_at(images: Sequence[tuple[Any, Segmentation]], thresholds: tuple[float, ...], relative: bool) -> Any:
    """The intersection over union of each word, counted on the predictions."""
    counts = PixelCounts(4)
    for truth, found in images:
        ground = Background(thresholds, relative).where(found)
        counts.add(truth, torch.where(ground, 3, found.labels).numpy())
    return counts.overlap()[:3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("relative", [False, True])
def test_learned_thresholds_are_the_best_of_all(seed: int, relative: bool) -> None:
    """Every threshold of the grid is tried for each word; void pixels and a fourth word for the background occur."""
    numbers = np.random.default_rng(seed)
    images = []
    for _ in range(3):
        truth = numbers.integers(-1, 4, (12, 12)).astype(np.int16)
        labels = np.where(numbers.random((12, 12)) < 0.6, truth.clip(0), numbers.integers(-1, 4, (12, 12)))
        scores = np.where(labels == truth, numbers.beta(5, 3, (12, 12)), numbers.beta(3, 5, (12, 12)))
        images.append((truth, result(labels, np.round(scores, 2) if seed else scores)))
    counts = ThresholdCounts(3)
    for truth, found in images:
        counts.add(truth, found, relative)
    best = counts.best()
    tried = np.stack([overlap_at(images, (float(value),) * 4, relative) for value in GRID])
    found_best = overlap_at(images, (*best, 0.0), relative)
    assert found_best == pytest.approx(tried.max(axis=0))
    lowest = [float(GRID[place]) for place in tried.argmax(axis=0)]
    assert list(best) == pytest.approx(lowest)


def test_words_without_evidence_get_the_threshold_of_all_words() -> None:
    counts = ThresholdCounts(3)
    counts.add(np.array([[0, 0, 3, 2]]), result([[0, 0, 0, 0]], [[0.9, 0.8, 0.55, 0.3]]), relative=False)
    assert counts.best() == pytest.approx((0.551, 0.551, 0.551), abs=1e-6)


class ShadeSegmenter:
    """Finds red where there is some; the more of it, the surer."""

    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """The first word everywhere, with the red as its probability."""
        return [Segmentation(torch.zeros(one.shape[1:], dtype=torch.int16), one[0].float() / 255) for one in images]


def shades(values: Sequence[int], labels: Sequence[int]) -> dict[str, bytes]:
    pixels = np.zeros((1, len(values), 3), np.uint8)
    pixels[0, :, 0] = values
    return {"png": png(pixels), "mask.png": png(np.array([labels], np.uint8))}


def test_a_set_with_thresholds_learned_on_another(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    """On the first set red is right from 102 of 255 on; the evaluated one has other shades."""
    learn = make_snapshot(
        [shades((0, 60, 102, 200, 255), (0, 0, 1, 1, 1)), shades((90, 120), (0, 1))], name="learn"
    ).folder
    test = make_snapshot([shades((10, 85, 110, 240), (0, 0, 1, 1))]).folder
    (tmp_path / "words.txt").write_text("red\n")
    options = f"words={tmp_path}/words.txt,unlabelled=background"
    prepared = Evaluations(segmentation=(f"it={test},{options},threshold=learn:{learn}", f"no={test},{options}"))
    found = evaluate(ShadeSegmenter(), prepared.prepare())
    assert found["seg/it/miou"] == 1 and found["seg/no/miou"] == 0.25
    assert 90 / 255 < found["seg/it/threshold/red"] <= 102 / 255
