"""Keep ``mask.png`` aligned with its image: the same resize, crop and border, by the nearest pixel."""

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, SampleError
from pipeline.shards.label_values import MASK_FIELD, VOID_VALUE, WIDE_VOID, Values, decode_values, encode_values
from pipeline.shards.pixels import read_header
from pipeline.stages.crawl.images import EncodedImage, ImageOptions, crop_or_pad, plan


def fitted_mask(mask: bytes, image: EncodedImage, options: ImageOptions) -> bytes:
    """The mask of ``image``, which :func:`~pipeline.stages.crawl.images.transform` has made under ``options``.

    It is the mask itself where the image keeps its size. A border is void. With ``apply_exif_orientation`` masks, as
    boxes, must have been drawn on the image as displayed.

    Raises:
        SampleError: ``stale_annotation``, a mask of another size than the image; ``bad_mask``, no PNG with one channel.
    """
    if image.original_width is None or image.original_height is None:
        return mask
    _check_size(mask, image.original_width, image.original_height)
    geometry = plan(image.original_width, image.original_height, options)
    if not geometry.changes or options.disable_all_reencoding:
        return mask
    try:
        values = decode_values(mask, options.max_pixels)
    except DataError as error:
        raise _bad_mask(str(error)) from error
    void = WIDE_VOID if values.dtype == np.uint16 else VOID_VALUE
    width, height = geometry.resized
    resized: Values = values[_nearest(values.shape[0], height)[:, None], _nearest(values.shape[1], width)]
    return encode_values(crop_or_pad(resized, geometry, (void, void, void)))


def _check_size(mask: bytes, width: int, height: int) -> None:
    try:
        header = read_header(mask)
    except SampleError as error:
        raise _bad_mask(error.message) from error
    if (header.width, header.height) != (width, height):
        sizes = f"{header.width} x {header.height} pixels, the image has {width} x {height}"
        turned = (header.height, header.width) == (width, height)
        advice = "; if it is displayed turned, use --apply-exif-orientation" if turned else ""
        raise SampleError("failed_to_resize", "stale_annotation", f"{MASK_FIELD} has {sizes}{advice}")


def _bad_mask(reason: str) -> SampleError:
    return SampleError("failed_to_resize", "bad_mask", f"{MASK_FIELD}: {reason}")


def _nearest(stored: int, wanted: int) -> NDArray[np.int64]:
    """For each of ``wanted`` pixels along a side, the one of ``stored`` pixels that contains its centre."""
    return ((np.arange(wanted) + 0.5) * stored / wanted).astype(np.int64).clip(0, stored - 1)
