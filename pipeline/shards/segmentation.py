"""Masks in the formats of COCO and LVIS: polygons, run lengths, and run lengths as a string.

    [[x, y, x, y, ...], ...]                         polygons in pixels, filled and joined
    {"size": [height, width], "counts": [5, 3, ...]}   runs of 0, 1, 0, ... down the columns, the first of zeros
    {"size": [height, width], "counts": "51Q..."}      the same in COCO's printable encoding

The encoding stores, for each run, the difference to the run two before it (from the fourth run on), in groups of five
bits, lowest first. 48 is added to each group; bit 5 means that more groups follow; bit 4 of the last group is the sign.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

MaskReason = Literal["no_mask_format", "not_finite", "odd_coordinates", "two_points", "other_size", "wrong_runs"]
FEWEST = 6  # numbers of a polygon: three corners
LONGEST_RUN = 64  # bits
SHIFT = 4  # fractional bits of polygon coordinates when filling


def checked(segmentation: Any, height: int, width: int) -> tuple[Any, MaskReason | None]:
    """A segmentation of an annotation tool for an image of this size, as :func:`mask_of` reads it.

    A single polygon without its list is put into one. Of several polygons those of less than three corners are left
    out. No segmentation (None, ``[]``, ``[[]]``) is None. An unusable one is None, too, with the reason:

    - ``two_points``: no polygon has three corners; tools write two corners, or x, y, width, height
    - ``odd_coordinates``, ``not_finite``: a polygon with an x without y, or with NaN
    - ``other_size``, ``wrong_runs``: run lengths for an image of another size, or that do not add up to its pixels
    - ``no_mask_format``: none of the three formats
    """
    if not segmentation:
        return None, None
    try:
        if isinstance(segmentation, Mapping):
            return _checked_runs(segmentation, height, width)
        if isinstance(segmentation[0], int | float):
            segmentation = [segmentation]
        polygons = [_numbers(polygon) for polygon in segmentation if polygon]
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError):
        return None, "no_mask_format"
    if any(len(polygon) % 2 for polygon in polygons):
        return None, "odd_coordinates"
    if not all(map(math.isfinite, (value for polygon in polygons for value in polygon))):
        return None, "not_finite"
    kept = [polygon for polygon in segmentation if polygon and len(polygon) >= FEWEST]
    return (kept, None) if kept else (None, "two_points" if polygons else None)


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """``segmentation`` as uint8 [height, width] of 0 and 1.

    Raises:
        DataError: none of the three formats, or another size.
    """
    try:
        if isinstance(segmentation, Mapping):
            return _from_runs(segmentation, height, width)
        return _from_polygons(segmentation, height, width)
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise DataError(f"a segmentation is neither polygons nor runs ({error})") from error


def run_lengths(mask: NDArray[Any]) -> list[int]:
    """COCO's uncompressed counts of a mask [height, width] of zeros and ones, or of booleans."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size])))
    runs: list[int] = counts.tolist()
    return [0, *runs] if flat[0] else runs


def run_lengths_at(mask: NDArray[np.bool_], top: int, left: int, height: int, width: int) -> list[int]:
    """The counts of an image [height, width] with ``mask`` [h, w] at (``top``, ``left``) and zeros elsewhere.

    The full image is never allocated: most detections cover little of it, and an evaluation has a million.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0).T  # column by column, as COCO counts
    column, row = np.nonzero(edges)
    positions = (left + column) * height + top + row  # of alternating beginnings and ends
    going_on = np.flatnonzero(positions[1:-1:2] == positions[2::2])  # from the bottom of a column to the next one
    positions = np.delete(positions, np.concatenate([2 * going_on + 1, 2 * going_on + 2]))
    counts: list[int] = np.diff(np.concatenate([[0], positions, [height * width]])).tolist()
    if counts[-1] == 0 and positions.size:
        del counts[-1]
    return counts


def mask_of_runs(counts: Sequence[int] | NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """The mask uint8 [height, width] of uncompressed counts; ``ValueError`` where they do not cover it."""
    runs = np.asarray(counts, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs that cover {runs.sum()} of {height * width} pixels")
    flat = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def runs_of_text(text: str) -> list[int]:
    """The run lengths in COCO's string; ``ValueError`` where one has more than 64 bits."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        if shift > LONGEST_RUN:
            raise ValueError(f"a run of more than {LONGEST_RUN} bits")  # a hostile string would be one endless number
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
    return mask_of_runs(runs_of_text(counts) if isinstance(counts, str) else counts, height, width)


def _checked_runs(segmentation: Mapping[str, Any], height: int, width: int) -> tuple[Any, MaskReason | None]:
    size, counts = [int(length) for length in segmentation["size"]], segmentation["counts"]
    if size != [height, width]:
        return None, "other_size"
    runs = runs_of_text(counts) if isinstance(counts, str) else _numbers(counts)
    fits = sum(runs) == height * width and all(run >= 0 and run == int(run) for run in runs)
    return (segmentation, None) if fits else (None, "wrong_runs")


def _numbers(numbers: Any) -> list[float]:
    """A list of numbers, also as texts; a text or an object would be iterated by its letters or keys."""
    if not isinstance(numbers, list | tuple):
        raise TypeError(f"{type(numbers).__name__}, not a list of numbers")
    return [float(number) for number in numbers]


def _from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> NDArray[np.uint8]:
    """A pixel belongs to a polygon that covers its centre, or nearly so."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        if len(polygon) < FEWEST:
            raise ValueError(f"a polygon of {len(polygon)} numbers, where three corners have six")
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon corner is not a number")
        points = points.clip(-1, [width + 1, height + 1]) - 0.5  # OpenCV's pixel centres are at integers
        cv2.fillPoly(mask, [np.round(points * 2**SHIFT).astype(np.int32)], 1, shift=SHIFT)
    return mask
