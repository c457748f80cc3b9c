"""Images of digits: OpenCV's stroke fonts, and the scans that scikit-learn ships.

No caption of this world names a digit, so a model pre-trained on it has no word for them. The digits are as clean and
centred as in handwriting datasets: a linear model on their pixels does well.
"""

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.outlines import Pixels
from pipeline.sources.drawn.render import finish

FONTS = {
    "simplex": cv2.FONT_HERSHEY_SIMPLEX,
    "plain": cv2.FONT_HERSHEY_PLAIN,
    "duplex": cv2.FONT_HERSHEY_DUPLEX,
    "complex": cv2.FONT_HERSHEY_COMPLEX,
    "triplex": cv2.FONT_HERSHEY_TRIPLEX,
    "small": cv2.FONT_HERSHEY_COMPLEX_SMALL,
    "script": cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
}
TRAIN_SCANS = 1000
"""The first 1000 scans are the few-shot pool; the other 797 (by other writers) are the test set."""

_CANVAS = 160


def render_digit(digit: str, size: int, draws: Draws) -> tuple[Pixels, str]:
    """A light digit on a dark background, uint8 [size, size, 3], and the name of its font."""
    name = draws.pick(tuple(FONTS))
    glyph = _glyph(digit, name, draws.integer(3))
    scale = size / _CANVAS * draws.uniform(0.85, 1.1)
    matrix = cv2.getRotationMatrix2D((_CANVAS / 2, _CANVAS / 2), draws.normal() * 7, scale)
    matrix[0, 1] += draws.uniform(-0.15, 0.15) * scale
    for axis in range(2):
        matrix[axis, 2] += (size - _CANVAS) / 2 + draws.uniform(-0.04, 0.04) * size
    ink = cv2.warpAffine(glyph, matrix, (size, size), flags=cv2.INTER_AREA)
    dark, light = draws.uniform(5, 70), draws.uniform(190, 255)
    grey = cv2.convertScaleAbs(ink, alpha=(light - dark) / 255, beta=dark)
    return finish(cv2.merge([grey, grey, grey]), "sketch", draws), name  # type: ignore[arg-type]


def real_digit(number: int, size: int) -> tuple[Pixels, str]:
    """Scan ``number`` (0..1796) of scikit-learn's set, enlarged to uint8 [size, size, 3], and its digit."""
    images, targets = _scans()
    grey = np.clip(
        cv2.resize(images[number] * np.float32(255 / 16), (size, size), interpolation=cv2.INTER_CUBIC), 0, 255
    )
    rounded = np.rint(grey).astype(np.uint8)
    return np.repeat(rounded[:, :, None], 3, axis=2), str(int(targets[number]))


def scans(train: bool) -> range:
    """Indices of the scans of the train or test part."""
    return range(TRAIN_SCANS) if train else range(TRAIN_SCANS, 1797)


@cache
def _scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    # scikit-learn costs a second to import; only this set needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.float32), bunch.target.astype(np.int64)


@cache
def _glyph(digit: str, font: str, weight: int) -> Pixels:
    """The digit in the middle of a square canvas; its height is three fifths of the canvas."""
    face = FONTS[font]
    thickness = 6 + 4 * weight
    (_, height), _ = cv2.getTextSize(digit, face, 1.0, 1)
    scale = 0.6 * _CANVAS / height
    (width, height), _ = cv2.getTextSize(digit, face, scale, thickness)
    canvas = np.zeros((_CANVAS, _CANVAS), np.uint8)
    corner = ((_CANVAS - width) // 2, (_CANVAS + height) // 2)
    cv2.putText(canvas, digit, corner, face, scale, 255, thickness, cv2.LINE_AA)
    return canvas
