"""Masks as COCO and LVIS write them: polygons, run lengths, and run lengths as a string.

    [[x, y, x, y, ...], ...]                         polygons in pixels, filled and joined
    {"size": [height, width], "counts": [5, 3, ...]}   runs of 0, 1, 0, ... down the columns, the first of zeros
    {"size": [height, width], "counts": "51Q..."}      the same in COCO's printable code

The code has, for each run, the difference to the run before the last one (from the fourth on), in groups of five bits,
the lowest first: 48 is added to each, bit 5 says that more follow, bit 4 of the last is the sign.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

SHIFT = 4  # bits of a pixel's fraction with which polygons are filled


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """``segmentation`` as uint8 [height, width] of 0 and 1.

    Raises:
        DataError: it is none of the three, or of another size.
    """
    try:
        if isinstance(segmentation, Mapping):
            return _from_runs(segmentation, height, width)
        return _from_polygons(segmentation, height, width)
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise DataError(f"a segmentation is neither polygons nor runs ({error})") from error


def runs_of_text(text: str) -> list[int]:
    """The run lengths in COCO's string."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _from_runs(segmentation: Mapping[str, Any], height: int, width: int) -> NDArray[np.uint8]:
    size, counts = [int(length) for length in segmentation["size"]], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"a mask of {size} in an image of {[height, width]}")
    runs = np.asarray(runs_of_text(counts) if isinstance(counts, str) else counts, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs that cover {runs.sum()} of {height * width} pixels")
    flat = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> NDArray[np.uint8]:
    """A pixel belongs to a polygon that covers its middle, or nearly so."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon with a corner that is no number")
        points = points.clip(-1, [width + 1, height + 1]) - 0.5  # OpenCV's pixels have their middle at whole numbers
        cv2.fillPoly(mask, [np.round(points * 2**SHIFT).astype(np.int32)], 1, shift=SHIFT)
    return mask
