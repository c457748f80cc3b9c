"""Many crops of one image at once, on the device that encodes them, for region features.

The resize is Pillow's antialiased bicubic, to within one level of 255. On a GPU it is two matrix products for all boxes
of an image, whose matrices hold the filter's weights; on a CPU torch's vectorised uint8 kernel, box by box.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.resample import bicubic

BOXES_AT_ONCE, SIDE = 128, 640
"""Boxes of one image per matrix product if its longer side has this many pixels; proportionally fewer for longer
sides. A box needs several matrices of size x side numbers."""


@dataclass(frozen=True, kw_only=True)
class CropRule:
    """Which part of an image the tower sees for a box; part of the identity of stored features."""

    scales: tuple[float, ...] = (1.0, 1.5)
    """Factors by which boxes are enlarged around their centre, one crop for each (ViLD, section 3.2)."""
    shape: Literal["warp", "centre", "pad"] = "warp"
    """How a crop becomes square: stretched, cut to its centre (as in CLIP's transform), or padded with black bars."""
    outside: Literal["cut", "black"] = "cut"
    """An enlarged box that leaves the image: clip it to the image, or fill the outside with black."""
    average: Literal["unit", "raw"] = "unit"
    """Add the features of the scales as unit vectors, or as they are; the sum is normalised."""

    def __post_init__(self) -> None:
        require(len(self.scales) >= 1 and min(self.scales) > 0, "scales", self.scales, "one or more, more than 0")


def crop_boxes(boxes: Tensor, scale: float, height: int, width: int, outside: str = "cut") -> Tensor:
    """Boxes float [N, 4] (x1, y1, x2, y2 in pixels) to whole pixels around them, enlarged: int64 [N, 4], never empty.

    Edges are rounded outwards, except for parts of less than a thousandth of a pixel.
    """
    boxes = boxes.double()
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    first = torch.floor(centre - half + 1e-3).long()
    last = torch.ceil(centre + half - 1e-3).long()
    limits = torch.tensor([width, height], device=boxes.device)
    if outside == "cut":
        first = torch.minimum(first.clamp(min=0), limits - 1)
        last = torch.minimum(last, limits)
    return torch.cat([first, torch.maximum(last, first + 1)], dim=1)


def cut_crops(image: Tensor, boxes: Tensor, size: int, shape: str = "warp") -> Tensor:
    """Crops of ``image``, uint8 [3, H, W], at ``boxes``, int64 [N, 4], as uint8 [N, 3, size, size].

    Parts of a box outside of the image are black.
    """
    if not len(boxes):
        return image.new_empty((0, 3, size, size))
    if image.device.type == "cpu":
        return torch.stack([_cut(image, box, size, shape) for box in boxes.tolist()])
    at_once = boxes_at_once(*image.shape[1:])
    return torch.cat([_multiply(image, some, size, shape) for some in boxes.split(at_once)])


def boxes_at_once(height: int, width: int) -> int:
    """How many boxes of an image of this size go through the matrix products together."""
    return max(1, BOXES_AT_ONCE * SIDE // max(height, width, SIDE))


def _cut(image: Tensor, box: list[int], size: int, shape: str) -> Tensor:
    """One crop on a CPU."""
    left, top, right, bottom = box
    height, width = image.shape[1:]
    crop = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    around = (max(-left, 0), max(right - width, 0), max(-top, 0), max(bottom - height, 0))
    if any(around):
        missing = (
            around[0],
            right - left - crop.shape[2] - around[0],
            around[2],
            bottom - top - crop.shape[1] - around[2],
        )
        crop = functional.pad(crop, missing)
    target = _target(bottom - top, right - left, size, shape)
    resized = functional.interpolate(crop[None], size=target, mode="bicubic", antialias=True)[0]
    if target == (size, size):
        return resized
    out = image.new_zeros((3, size, size))
    (rows, from_rows), (columns, from_columns) = (_overlap(length, size) for length in target)
    out[:, rows, columns] = resized[:, from_rows, from_columns]
    return out


def _target(height: int, width: int, size: int, shape: str) -> tuple[int, int]:
    """The size to which a crop is resized before its centre is cut or it is padded."""
    if shape == "warp":
        return size, size
    side = min(height, width) if shape == "centre" else max(height, width)
    return max(1, int(size * height / side)), max(1, int(size * width / side))


def _offset(length: int, size: int) -> int:
    """The start of the result of ``size`` in a resized side of ``length``; negative if a bar precedes it."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def _overlap(length: int, size: int) -> tuple[slice, slice]:
    """The corresponding ranges of the result and of the resized crop."""
    offset = _offset(length, size)
    if length >= size:
        return slice(0, size), slice(offset, offset + size)
    return slice(-offset, length - offset), slice(0, length)


def _multiply(image: Tensor, boxes: Tensor, size: int, shape: str) -> Tensor:
    """All crops by two matrix products, columns first, rounded in between, as in Pillow."""
    targets = torch.tensor([_target(y2 - y1, x2 - x1, size, shape) for x1, y1, x2, y2 in boxes.tolist()]).to(
        boxes.device
    )
    rows = _weights(boxes[:, 1], boxes[:, 3], targets[:, 0], size, image.shape[1])
    columns = _weights(boxes[:, 0], boxes[:, 2], targets[:, 1], size, image.shape[2])
    pixels = image.to(rows.dtype)
    narrow = torch.einsum("nsw,chw->nchs", columns, pixels).round().clamp(0, 255)
    crops = torch.einsum("nth,nchs->ncts", rows, narrow)
    return crops.round().clamp(0, 255).to(torch.uint8)


def _weights(first: Tensor, last: Tensor, target: Tensor, size: int, limit: int) -> Tensor:
    """The bicubic filter as matrices, float32 [N, size, limit]: rows for results, columns for the image's pixels.

    Pillow's: the filter (a = -1/2) is stretched by the reduction factor, and its weights are normalised over the
    pixels of the box. Pixels outside of the image are black, so their weights are dropped afterwards.
    """
    offsets = torch.tensor([_offset(length, size) for length in target.tolist()], device=first.device)
    places = torch.arange(size, device=first.device) + offsets[:, None]
    step = ((last - first).double() / target)[:, None]
    stretch = step.clamp(min=1.0)
    centres = (places + 0.5) * step
    # All pixels of the box, inside the image or not, count in the normalisation.
    longest = int((last - first).max())
    pixels = torch.arange(longest, device=first.device)
    distance = (pixels + 0.5 - centres[:, :, None]) / stretch[:, :, None]
    weights = bicubic(distance) * (pixels < (last - first)[:, None])[:, None]
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-12)
    weights = weights * ((places >= 0) & (places < target[:, None]))[:, :, None]
    found = (first[:, None] + pixels)[:, None].expand(weights.shape)
    inside = (found >= 0) & (found < limit)
    matrix = weights.new_zeros((*weights.shape[:2], limit))
    matrix.scatter_add_(2, found.clamp(0, limit - 1), weights * inside)
    return matrix.float()
