"""Decoded frames as they are shown: one rule for refreshes and for readers.

1. Pixels become square: where the stream says that they are not, the width is stretched.
2. The display matrix is applied: rotations by quarter turns, and mirrors.
3. Colours become 8-bit RGB by swscale, with the matrix and the range that the stream states. Frames of high dynamic
   range (PQ or HLG) are mapped to the range and the primaries of BT.709.
4. Transparent pixels are composited on white.
"""

import functools
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, ColorTrc, Interpolation, VideoReformatter

from pipeline.shards.pixels import WHITE, Pixels, composite, use_one_thread

HIGH_RANGE = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
"""Transfer functions of high dynamic range."""
SCALING = Interpolation.BICUBIC
"""FFmpeg's own default; the filter grows with the factor, so small sizes do not alias."""

_PEAK = 1_000 / 203  # of a mastering display, by reference white
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)

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
    matrix = np.frombuffer(data, np.int32)  # type: ignore[call-overload]
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


def shown_pixels(frame: av.VideoFrame, size: tuple[int, int], scaler: VideoReformatter | None = None) -> Pixels:
    """uint8 [H, W, 3], red-green-blue: the frame as it is shown, scaled to ``size`` (width, height).

    A ``scaler`` that is given for all frames of a video prepares its filters once.
    """
    transpose, mirror, flip = orientation(frame)
    pixels = _colours(frame, size[::-1] if transpose else size, scaler or VideoReformatter())
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _colours(frame: av.VideoFrame, size: tuple[int, int], scaler: VideoReformatter) -> Pixels:
    """uint8 [H, W, 3] of ``size``, not turned."""
    if frame.color_trc in HIGH_RANGE:
        return usual_range(_converted(frame, size, "rgb48le", scaler), hybrid=frame.color_trc == ColorTrc.ARIB_STD_B67)
    if any(component.is_alpha for component in frame.format.components):
        use_one_thread()
        opaque = composite(np.asarray(_converted(frame, size, "bgra", scaler), np.uint8), WHITE)
        return np.asarray(cv2.cvtColor(opaque, cv2.COLOR_BGR2RGB), np.uint8)
    return np.asarray(_converted(frame, size, "rgb24", scaler), np.uint8)


def _converted(
    frame: av.VideoFrame, size: tuple[int, int], pixel_format: str, scaler: VideoReformatter
) -> npt.NDArray[Any]:
    made = scaler.reformat(
        frame,
        *size,
        pixel_format,
        interpolation=SCALING | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    return made.to_ndarray()


def usual_range(pixels: npt.NDArray[np.uint16], hybrid: bool) -> Pixels:
    """uint16 [H, W, 3] with BT.2020 primaries and PQ, or with ``hybrid`` HLG, as uint8 with those of BT.709.

    ITU-R BT.2100 gives the light of a display. Reference white, 203 cd/m2 (BT.2408), is 1. Reinhard's curve for the
    largest of the three colours leaves the dark ones nearly as they are and takes ``_PEAK`` to 1.
    """
    light: npt.NDArray[Any] = _light_of_code(hybrid)[pixels]
    if hybrid:
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = light * (np.maximum(luminance, 1e-6) ** 0.2)[..., None] * np.float32(_PEAK)
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    most = light.max(axis=2, keepdims=True)
    light = np.minimum(light * ((1 + most / _PEAK**2) / (1 + most)), 1)
    return np.asarray(np.rint(255 * light ** np.float32(1 / 2.4)), np.uint8)


@functools.cache
def _light_of_code(hybrid: bool) -> npt.NDArray[np.float32]:
    """Light of each 16-bit value, float32 [65536]: of PQ by reference white, of HLG the scene's from 0 to 1."""
    code = np.arange(65_536) / 65_535
    if hybrid:
        bright = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.where(code <= 0.5, code**2 / 3, bright).astype(np.float32)
    power = code ** (1 / 78.84375)
    nits = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return (nits / 203).astype(np.float32)
