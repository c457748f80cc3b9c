"""Decoded frames as they are shown: one rule for refreshes and for readers.

1. Pixels become square: where the stream says that they are not, the width is stretched.
2. The display matrix is applied: rotations by quarter turns, and mirrors.
3. Colours become 8-bit RGB by swscale, with the matrix and the range that the stream states. Frames of high dynamic
   range (PQ or HLG) are mapped to the range and the primaries of BT.709.
4. Transparent pixels are composited on white.
"""

from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation

from pipeline.shards.pixels import WHITE, Pixels, composite, use_one_thread

HIGH_RANGE = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
"""Transfer functions of high dynamic range."""

_WIDEST_PIXEL = 4  # ratios beyond this are mistakes of a muxer
_MATRIX_SIDE_DATA = "DISPLAYMATRIX"


def shown_size(width: int, height: int, pixel_ratio: Fraction | None, turned: bool) -> tuple[int, int]:
    """Width and height of a frame with square pixels, upright.

    >>> shown_size(720, 576, Fraction(16, 15), turned=False), shown_size(640, 480, None, turned=True)
    ((768, 576), (480, 640))
    """
    if pixel_ratio and Fraction(1, _WIDEST_PIXEL) <= pixel_ratio <= _WIDEST_PIXEL:
        width = max(1, round(width * pixel_ratio))
    return (height, width) if turned else (width, height)


def scaled_size(width: int, height: int, shorter: int | None) -> tuple[int, int]:
    """The size with the shorter side at most ``shorter``, and the same ratio of the sides.

    >>> scaled_size(1920, 1080, 360), scaled_size(320, 240, 360)
    ((640, 360), (320, 240))
    """
    if shorter is None or min(width, height) <= shorter:
        return width, height
    scale = Fraction(shorter, min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """What the display matrix does to a frame: transpose it, then mirror left and right, then top and bottom."""
    data = frame.side_data.get(_MATRIX_SIDE_DATA)
    if data is None:
        return False, False, False
    matrix = np.frombuffer(bytes(data), np.int32)
    if len(matrix) < 9 or not matrix[[0, 1, 3, 4]].any():
        return False, False, False
    # A pixel moves from (x, y) to (a x + c y, b x + d y).
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def frame_size(frame: av.VideoFrame, pixel_ratio: Fraction | None) -> tuple[int, int]:
    """Width and height of a frame as it is shown."""
    return shown_size(frame.width, frame.height, pixel_ratio, orientation(frame)[0])


def shown_pixels(frame: av.VideoFrame, pixel_ratio: Fraction | None, size: tuple[int, int]) -> Pixels:
    """uint8 [H, W, 3], red-green-blue: the frame as it is shown, scaled to ``size`` (width, height)."""
    transpose, mirror, flip = orientation(frame)
    width, height = size[::-1] if transpose else size
    has_alpha = any(component.is_alpha for component in frame.format.components)
    made = frame.reformat(
        width,
        height,
        "bgra" if has_alpha else "rgb24",
        interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND,
        dst_color_range=ColorRange.JPEG,
        threads=1,
        **_range_options(frame),
    )
    pixels = np.asarray(made.to_ndarray(), np.uint8)
    if has_alpha:
        use_one_thread()
        pixels = np.asarray(cv2.cvtColor(composite(pixels, WHITE), cv2.COLOR_BGR2RGB))
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _range_options(frame: av.VideoFrame) -> dict[str, int]:
    if frame.color_trc not in HIGH_RANGE:
        return {}
    return {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
