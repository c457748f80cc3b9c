"""Anchors and ATSS: the authors' numbers, hand-made cases, and a slow version of the paper's algorithm."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.models.glip.assignment import Anchors, assign, make_anchors, overlaps
from pipeline.models.glip.config import strides
from pipeline.models.glip.phrases import CODER

CPU = torch.device("cpu")


def sizes(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // stride), -(-width // stride)) for stride in strides()]


def anchors(height: int, width: int, scale: float = 8.0) -> Anchors:
    return make_anchors(sizes(height, width), strides(), scale, CPU)


def test_the_number_of_anchors_of_an_image_of_the_paper() -> None:
    found = anchors(800, 1344)
    assert found.counts == (16_800, 4_200, 1_050, 273, 77) and len(found.boxes) == 22_400


def test_the_first_anchor_is_the_authors() -> None:
    """Theirs is -28, -28, 35, 35, where the last pixel belongs to the box: 64 pixels wide, its centre at 3.5."""
    found = anchors(800, 1344)
    assert found.boxes[0].tolist() == [-28, -28, 36, 36]
    first = [0, *np.cumsum(found.counts)[:-1].tolist()]
    assert [found.boxes[n, 2] - found.boxes[n, 0] for n in first] == [64, 128, 256, 512, 1024]
    assert found.boxes[1].tolist() == [-20, -28, 44, 36] and found.boxes[168].tolist() == [-28, -20, 36, 44]


def test_offsets_are_the_authors() -> None:
    """Their box 0, 0, 31, 31 is 32 pixels wide; offsets are in tenths and fifths, and are taken back exactly."""
    anchor, box = anchors(64, 64).boxes[:1], torch.tensor([[0.0, 0.0, 32.0, 32.0]])
    assert CODER.encode_single(anchor, anchor).tolist() == [[0, 0, 0, 0]]
    found = CODER.encode_single(box, anchor)[0].tolist()
    assert found == pytest.approx([1.875, 1.875, -3.4657, -3.4657], abs=1e-4)
    assert found[:2] == pytest.approx([10 * (15.5 - 3.5) / 64] * 2) and found[2] == pytest.approx(5 * math.log(0.5))
    torch.manual_seed(0)
    some = torch.rand(20, 4) * 50
    some[:, 2:] += some[:, :2] + 1
    grid = anchors(64, 64).boxes[:20]
    torch.testing.assert_close(CODER.decode_single(CODER.encode_single(some, grid), grid), some, rtol=1e-5, atol=1e-4)
    huge = CODER.decode_single(torch.tensor([[0.0, 0, 1e9, 1e9]]), anchor)[0]
    assert huge.isfinite().all() and float(huge[2] - huge[0]) == pytest.approx(64 * 1000 / 16)


def test_overlaps_are_torchvisions() -> None:
    torch.manual_seed(0)
    first, second = (torch.rand(50, 4) * 40 for _ in range(2))
    first[:, 2:] += first[:, :2]
    second[:, 2:] += second[:, :2]
    torch.testing.assert_close(overlaps(first, second), box_iou(first, second).diagonal())
    assert float(overlaps(torch.zeros(1, 4), torch.zeros(1, 4))) == 0


def slowly(found: Anchors, boxes: NDArray[np.float64], candidates: int) -> tuple[list[bool], list[int]]:
    """Algorithm 1 of the ATSS paper, box by box and candidate by candidate, in the authors' inclusive coordinates."""
    grid = found.boxes.double().numpy()
    best: dict[int, tuple[float, int]] = {}
    for number, box in enumerate(boxes):
        middle = (box[:2] + box[2:]) / 2
        chosen, first = [], 0
        for count in found.counts:
            centres = (grid[first : first + count, :2] + grid[first : first + count, 2:]) / 2
            order = sorted(range(count), key=lambda n, c=centres, m=middle: math.dist(c[n], m))
            chosen += [first + n for n in order[:candidates]]
            first += count
        shares = []
        for n in chosen:
            last, other = grid[n] - [0, 0, 1, 1], box - [0, 0, 1, 1]
            across = max(0, min(last[2], other[2]) - max(last[0], other[0]) + 1)
            down = max(0, min(last[3], other[3]) - max(last[1], other[1]) + 1)
            area = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (last, other)]
            shares.append(across * down / (sum(area) - across * down))
        mean = sum(shares) / len(shares)
        spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / (len(shares) - 1))
        for n, share in zip(chosen, shares, strict=True):
            x, y = (grid[n, :2] + grid[n, 2:]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if share >= mean + spread and inside and share > best.get(n, (-1.0, 0))[0]:
                best[n] = (share, number)
    return [n in best for n in range(len(grid))], [best.get(n, (0, 0))[1] for n in range(len(grid))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [4.0, 8.0])
def test_atss_is_the_papers_algorithm(seed: int, scale: float) -> None:
    """Random boxes of all sizes, some of them nearly the same, so that anchors are claimed twice."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, 150, (6, 2))
    boxes = np.concatenate([low, low + random.uniform(8, 120, (6, 2))], axis=1)
    boxes[3] = boxes[2] + random.uniform(-3, 3, 4)
    grid = anchors(192, 256, scale)
    found = assign(grid, torch.tensor(boxes)[None].float(), torch.ones(1, 6, dtype=torch.bool))
    positive, matched = slowly(grid, boxes, 9)
    assert found.positive[0].tolist() == positive and sum(positive) > 6
    assert found.matched[0].tolist() == matched


def boxes_of(*some: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor([some]), torch.ones(1, len(some), dtype=torch.bool)


def test_a_box_that_is_an_anchor() -> None:
    """Nine candidates on the finest level and all others: the same box has an overlap of one and is positive."""
    grid = anchors(256, 256)
    number = 16 * 32 + 16
    found = assign(grid, *boxes_of(tuple(grid.boxes[number].tolist())))
    assert found.positive[0, number] and 1 <= int(found.positive.sum()) <= 9
    centres = (grid.boxes[found.positive[0], :2] + grid.boxes[found.positive[0], 2:]) / 2
    assert float((centres - torch.tensor([132.0, 132.0])).abs().max()) <= 8


def test_centres_outside_are_never_positive() -> None:
    """A box of 2 pixels between the centres of all cells."""
    grid = anchors(64, 64)
    assert not assign(grid, *boxes_of((7.0, 7.0, 9.0, 9.0))).positive.any()
    assert assign(grid, *boxes_of((3.0, 3.0, 5.0, 5.0))).positive[0, 0]
    assert not assign(grid, *boxes_of((4.0, 3.0, 6.0, 5.0))).positive.any(), "the centre is on the edge"


def test_images_do_not_depend_on_each_other_and_padding_is_no_box() -> None:
    grid = anchors(128, 128, 4.0)
    boxes = torch.tensor([[[10.0, 10, 60, 50], [40, 40, 100, 120]], [[5.0, 60, 30, 90], [0, 0, 0, 0]]])
    real = torch.tensor([[True, True], [True, False]])
    found = assign(grid, boxes, real)
    for image, count in ((0, 2), (1, 1)):
        alone = assign(grid, boxes[image : image + 1, :count], real[image : image + 1, :count])
        assert torch.equal(found.positive[image], alone.positive[0])
        assert torch.equal(found.matched[image], alone.matched[0])


def test_without_boxes_everything_is_background() -> None:
    found = assign(anchors(64, 64), torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.bool))
    assert not found.positive.any() and not found.matched.any()


def test_a_single_anchor_has_no_deviation() -> None:
    """torch's standard deviation of one number is NaN, which no overlap reaches."""
    alone = make_anchors([(1, 1)], [64], 1.0, CPU)
    assert assign(alone, *boxes_of((0.0, 0.0, 64.0, 60.0))).positive.tolist() == [[True]]


def test_boxes_that_are_not_numbers_are_never_positive() -> None:
    found = assign(anchors(64, 64), *boxes_of((math.nan, 0.0, 10.0, 10.0)))
    assert not found.positive.any()
