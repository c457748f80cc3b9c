"""Depth maps as PNG: the member ``depth.png``.

A grey PNG of 16 bits beside the image and of its size. The value of a pixel is its distance in millimetres, up to
65.535 m; 0 is a pixel without a measurement.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, SampleError
from pipeline.shards.label_values import Values, decode_values, encode_values
from pipeline.shards.pixels import MAX_PIXELS, read_header

DEPTH_FIELD = "depth.png"
MISSING = 0
PER_METRE = 1000
FARTHEST = 65_535 / PER_METRE  # metres


def depth_size(content: bytes) -> tuple[int, int]:
    """Height and width of a depth PNG by its header: nothing is decoded.

    Raises:
        DataError: not a PNG.
    """
    try:
        header = read_header(content)
    except SampleError as error:
        raise DataError("not a PNG") from error
    if header.kind != "png":
        raise DataError("not a PNG")
    return header.height, header.width


def decode_depth(content: bytes, most_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """The distances of a ``depth.png`` in metres, float32 [H, W]; 0 where there is none.

    Raises:
        DataError: not a PNG, damaged, not grey with 16 bits, or more than ``most_pixels``.
    """
    metres: NDArray[np.float32] = depth_values(content, most_pixels).astype(np.float32) / np.float32(PER_METRE)
    return metres


def depth_values(content: bytes, most_pixels: int = MAX_PIXELS) -> Values:
    """The values of a depth PNG as stored, uint16 [H, W]; raises as :func:`decode_depth`."""
    values = decode_values(content, most_pixels)
    if values.dtype != np.uint16:
        raise DataError("8 bits or fewer, where depth needs 16")
    return values


def encode_depth(metres: NDArray[Any], unit_known: bool = False) -> bytes:
    """Distances in metres, float [H, W], as ``depth.png``; NaN, infinity, zero and below are missing.

    With ``unit_known``, distances beyond ``FARTHEST`` are missing, too, unless most distances are.

    Raises:
        DataError: a distance beyond ``FARTHEST``, or most of them with ``unit_known``: another unit.
    """
    known = np.isfinite(metres) & (metres > 0)
    values = np.round(np.where(known, metres, 0).astype(np.float64) * PER_METRE)
    far = values > FARTHEST * PER_METRE
    if (2 * far.sum() > known.sum()) if unit_known else far.any():
        many = f"{far.sum()} of {known.sum()} distances are" if unit_known else "a distance is"
        raise DataError(f"{many} more than {FARTHEST} m, the largest {values.max() / PER_METRE:.6g} m: another unit?")
    return encode_values(np.where(far, MISSING, values).astype(np.uint16))
