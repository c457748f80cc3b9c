"""Oracle analysis of a toy method whose groups are known, against the best of all namings by brute force."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.grouping import StageCounts, shared_pixels
from pipeline.evaluation.pixel_counts import PixelCounts
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import model_figures, segments_png
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.models.segments import ImageViews, Segmentation
from tests.evaluation.test_segmentation import COLOURS, ColourSegmenter, MakeSnapshot, png


class StripeGrouper:
    """Groups the columns of an image, first by pairs, then by fours, and names the groups wrongly or rightly."""

    def __init__(self, names: Sequence[int]) -> None:
        self.names = torch.tensor(names)

    def segment(
        self, images: Sequence[Tensor], words: Sequence[str], views: ImageViews | None = None
    ) -> list[Segmentation]:
        """The name of each pixel's last group, with a probability of 1."""
        labels = [self.names[stages[-1].long()].to(torch.int16) for stages in self.groups(images)]
        return [Segmentation(one, torch.ones(one.shape)) for one in labels]

    def groups(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Columns by twos and by fours."""
        found = []
        for image in images:
            columns = torch.arange(image.shape[2]).expand(image.shape[1:])
            found.append(((columns // 2).to(torch.int16), (columns // 4).to(torch.int16)))
        return found


def test_shared_pixels_by_hand() -> None:
    truth, groups = np.array([[0, 0, 2], [-1, 1, 2]]), np.array([[0, 0, 0], [0, 1, 1]])
    assert shared_pixels(truth, groups, 3).tolist() == [[2, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_is_the_best_naming_by_brute_force(seed: int) -> None:
    """Of all namings of four groups by three classes it has the most right pixels; void counts nowhere."""
    numbers = np.random.default_rng(seed)
    truth, groups = numbers.integers(-1, 3, (6, 7)), numbers.integers(0, 4, (6, 7))
    stage = StageCounts(PixelCounts(3))
    stage.add(truth, groups)
    known = truth >= 0
    best = max(int((np.array(names)[groups] == truth)[known].sum()) for names in itertools.product(range(3), repeat=4))
    assert stage.counts.right.sum() == best and stage.counts.pixels == known.sum()
    overlaps = []
    for label in range(3):
        pairs = [((groups == one) & known, truth == label) for one in range(4)]
        overlaps.append(max((one & other).sum() / (one | other).sum() for one, other in pairs))
    assert stage.best == pytest.approx(overlaps) and stage.groups == [len(np.unique(groups))]
    with pytest.raises(ValueError, match="groups of"):
        stage.add(truth, groups[:2])


@pytest.fixture
def folder(make_snapshot: MakeSnapshot, tmp_path: Path) -> str:
    """Eight columns: red 2, green 2, blue 3, and one without a label."""
    names = ["red"] * 2 + ["green"] * 2 + ["blue"] * 3 + ["none"]
    pixels = np.array([[COLOURS.get(name, (0, 0, 0)) for name in names]] * 3, np.uint8)
    values = np.array([[1, 1, 2, 2, 3, 3, 3, 0]] * 3, np.uint8)
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n")
    made = make_snapshot([{"png": png(pixels), "mask.png": png(values)}] * 2)
    return f"it={made.folder},words={tmp_path}/words.txt"


def test_naming_and_grouping_errors_by_hand(folder: str) -> None:
    """Stage 1 tells red from green, stage 2 does not: of two equal classes the first one is the oracle's."""
    prepared = Evaluations(grouping=(f"{folder},unlabelled=background",)).prepare()
    found = evaluate(StripeGrouper((1, 0)), prepared)
    # Predicted: green, then red. Red 0 of 6 + 12, green 6 of 12, blue and background are missed.
    assert found["group/it/miou"] == pytest.approx((0 + 0.5 + 0 + 0) / 4)
    # Stage 2: red for columns 0 to 3 (1/2), blue for 4 to 7 (3/4). Stage 1: red, green 1, blue 3/4, background 0.
    assert found["group/it/oracle_miou"] == found["group/it/oracle_miou_stage2"] == pytest.approx((0.5 + 0.75) / 4)
    assert found["group/it/oracle_miou_stage1"] == pytest.approx((1 + 1 + 0.75) / 4)
    assert found["group/it/naming_error"] == pytest.approx(1.25 / 4 - 0.5 / 4)
    assert found["group/it/grouping_error"] == pytest.approx(1 - 1.25 / 4)
    assert found["group/it/naming_error_stage1"] == pytest.approx(2.75 / 4 - 0.5 / 4)
    assert found["group/it/mask_miou"] == pytest.approx((0.5 + 0.5 + 0.75 + 0.25) / 4)
    assert found["group/it/mask_miou_stage1"] == pytest.approx((1 + 1 + 2 / 3 + 0.5) / 4)
    assert found["group/it/groups_stage1"] == 4 and found["group/it/groups"] == 2 and found["group/it/samples"] == 2
    assert table(found).splitlines()[0].split()[:4] == ["grouping", "mIoU", "oracle", "naming"]


def test_right_names_leave_no_naming_error(folder: str) -> None:
    found = evaluate(StripeGrouper((0, 2)), Evaluations(grouping=(folder,)).prepare())
    assert found["group/it/naming_error"] == 0 and found["group/it/grouping_error"] > 0


def test_methods_without_groups_are_refused(folder: str) -> None:
    prepared = Evaluations(grouping=(folder,)).prepare()
    with pytest.raises(SettingError, match="a method that groups pixels; ColourSegmenter has no groups"):
        evaluate(ColourSegmenter(), prepared)


def test_figures_show_the_groups_of_each_stage(folder: str) -> None:
    """One image in a row: input, labels, result, and two stages; a method without groups has no such columns."""
    prepared = Evaluations(segmentation=(folder,)).prepare()
    figure = model_figures(StripeGrouper((0, 2)), prepared)["segmentation/it"]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "labels", "found", "stage 1: 4 groups", "stage 2: 2 groups"] * 2
    tile = np.asarray(figure.axes[4].images[0].get_array())
    assert len(np.unique(tile.reshape(-1, tile.shape[-1]), axis=0)) >= 2
    plain = model_figures(ColourSegmenter(), prepared)["segmentation/it"]
    assert [axis.get_title() for axis in plain.axes] == ["image", "labels", "found"] * 2
    figure.savefig(io.BytesIO(), format="png")
    image = torch.zeros(3, 4, 8, dtype=torch.uint8)
    groups = StripeGrouper((0, 2)).groups([image])[0]
    found = Segmentation(torch.zeros(4, 8, dtype=torch.int16), torch.ones(4, 8))
    with_groups, without = (segments_png(image, found, ["red"], some) for some in (groups, ()))
    assert png_width(with_groups) == 2 * png_width(without)


def png_width(content: bytes) -> int:
    return int.from_bytes(content[16:20], "big")
