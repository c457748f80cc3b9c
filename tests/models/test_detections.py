"""Masks of detections, put into their images."""

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.detections import Detections


def detections(boxes: list[list[float]], masks: torch.Tensor | None) -> Detections:
    return Detections(torch.tensor(boxes), torch.ones(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64), masks)


def test_a_full_mask_is_its_box_to_the_pixel() -> None:
    boxes = [[10.0, 20.0, 30.0, 50.0], [0.0, 0.0, 64.0, 48.0], [3.0, 4.0, 4.0, 5.0], [60.0, 40.0, 64.0, 48.0]]
    whole = detections(boxes, torch.ones(4, 28, 28)).whole_masks(48, 64)
    for mask, (x1, y1, x2, y2) in zip(whole, boxes, strict=True):
        expected = torch.zeros(48, 64, dtype=torch.bool)
        expected[int(y1) : int(y2), int(x1) : int(x2)] = True
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("side", [28, 56, 12, 8])
def test_a_checkerboard_keeps_its_squares(side: int) -> None:
    """In a box of as many pixels as cells, of twice and of less than half as many."""
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    mask = board.repeat_interleave(7, 0).repeat_interleave(7, 1).float()
    whole = detections([[5.0, 9.0, 5.0 + side, 9.0 + side]], mask[None]).whole_masks(80, 80)[
        0, 9 : 9 + side, 5 : 5 + side
    ]
    assert torch.equal(whole, board.repeat_interleave(side // 4, 0).repeat_interleave(side // 4, 1).bool())


def test_a_disc_between_pixels_has_its_area_and_its_centre() -> None:
    cells = (torch.arange(28) + 0.5) / 14 - 1
    disc = ((cells[:, None] ** 2 + cells**2) < 0.8).float()
    whole = detections([[12.3, 7.8, 112.3, 87.8]], disc[None]).whole_masks(100, 130)[0]
    rows, columns = (values.float() + 0.5 for values in whole.nonzero(as_tuple=True))
    assert len(rows) == pytest.approx(3.14159 * 0.8 * 50 * 40, rel=0.02)
    assert float(rows.mean()) == pytest.approx(47.8, abs=0.1)
    assert float(columns.mean()) == pytest.approx(62.3, abs=0.1)


def test_boxes_over_the_edge_empty_ones_and_none() -> None:
    found = detections([[-5.0, -5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 9.0], [100.0, 1.0, 120.0, 3.0]], torch.ones(3, 28, 28))
    whole = found.whole_masks(20, 30)
    assert whole.sum(dim=(1, 2)).tolist() == [25, 0, 0]
    assert found.whole_masks(20, 30, 1, 2).shape == (1, 20, 30)
    assert detections([], torch.zeros(0, 28, 28)).whole_masks(4, 4).shape == (0, 4, 4)
    with pytest.raises(SettingError):
        detections([[0.0, 0.0, 1.0, 1.0]], None).whole_masks(4, 4)
