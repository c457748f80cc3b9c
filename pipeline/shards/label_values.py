"""Label values of pixels as PNG: the member ``mask.png``, and the label files of published data sets.

Grey values and palette indices are values, colours are not. Value v of ``mask.png`` is class v, counted from 1; 0 is an
unlabelled pixel. Void, which losses and metrics leave out, is 255 in files of up to 8 bits, and 65535 in files of 16
bits; there 255 is void, too, unless the data have a class of that number.
"""

import warnings
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.errors import DataError
from pipeline.shards.pixels import MOST_PIXELS

MASK_FIELD = "mask.png"
UNLABELLED = 0
VOID_VALUE = 255
WIDE_VOID = 65_535
MOST_MASK_CLASSES = WIDE_VOID - 1
Values = NDArray[Any]  # uint8 or uint16
GREY, WIDE = ("1", "L", "P"), ("I", "I;16", "I;16B", "I;16L")  # Pillow's modes of up to 8 and of 16 bits
SCALES = {2: 85, 4: 17}  # Pillow multiplies grey values of so few bits
GREY_PNG, DEPTH, COLOUR_TYPE = 0, 24, 25  # bytes of a PNG's header


def decode_values(content: bytes, most_pixels: int = MOST_PIXELS) -> Values:
    """The values of a PNG, [H, W]: uint16 if the file has 16 bits, otherwise uint8.

    Raises:
        DataError: not a PNG, damaged, an image with colours, or one with more than ``most_pixels``.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in GREY + WIDE:
                raise DataError(f"{image.mode}, not grey or a palette")
            if image.width * image.height > most_pixels:
                raise DataError(f"{image.width} x {image.height} pixels, more than {most_pixels}")
            values: Values = np.asarray(image).astype(np.uint16 if image.mode in WIDE else np.uint8)
    except UnidentifiedImageError as error:
        raise DataError("not a PNG") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(str(error)) from error
    scale = SCALES.get(content[DEPTH], 1) if content[COLOUR_TYPE] == GREY_PNG else 1
    unscaled: Values = values // np.uint8(scale) if scale > 1 else values
    return unscaled


def encode_values(values: NDArray[Any]) -> bytes:
    """Values of uint8 or uint16 [H, W] as a grey PNG of 8 or 16 bits."""
    done, content = cv2.imencode(".png", values)
    assert done, "PNG has no limit that an image in memory could pass"
    return content.tobytes()


def void_of(values: Values, classes: int) -> NDArray[np.bool_]:
    """The void pixels of a ``mask.png`` for data with so many classes, bool [H, W]."""
    narrow: NDArray[np.bool_] = values == VOID_VALUE
    if values.dtype != np.uint16:
        return narrow
    wide: NDArray[np.bool_] = values == WIDE_VOID
    return wide if classes >= VOID_VALUE else wide | narrow
