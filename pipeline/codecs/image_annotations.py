"""Annotations in pixels of an image: boxes that must fit it, and the mask and the depth map, which are resized, cropped
and padded with it."""

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.codecs.codec import Encoded
from pipeline.codecs.image_encoding import Geometry, ImageOptions, crop_or_pad, plan
from pipeline.errors import DataError, SampleError
from pipeline.shards.depth_values import DEPTH_FIELD, MISSING, depth_values
from pipeline.shards.label_values import MASK_FIELD, VOID_VALUE, WIDE_VOID, Values, decode_values, encode_values
from pipeline.shards.objects import FIELD as BOXES
from pipeline.shards.pixels import read_header

Size = tuple[int, int]


def fitted_members(members: Mapping[str, bytes], image: Encoded, options: ImageOptions) -> Mapping[str, bytes]:
    """The members of a sample with ``image``, which has been encoded under ``options``.

    Raises:
        SampleError: ``stale_annotation``, boxes, a mask or a depth map of another size than the image; ``bad_mask``,
            ``bad_depth``.
    """
    original, final = _size(image, "original_"), _size(image, "")
    _refuse_stale_boxes(members.get(BOXES), original, final)
    if original is None:
        return members
    fitted = {
        name: fit(members[name], original, options)
        for name, fit in ((MASK_FIELD, fitted_mask), (DEPTH_FIELD, fitted_depth))
        if name in members
    }
    return {**members, **fitted}


def _size(image: Encoded, prefix: str) -> Size | None:
    """The size in the columns; ``None`` for a body that was stored unchecked and is no image."""
    width, height = image.columns[f"{prefix}width"], image.columns[f"{prefix}height"]
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _refuse_stale_boxes(boxes: bytes | None, original: Size | None, final: Size | None) -> None:
    """Reject resized images with boxes, which are in pixels of the original image."""
    if boxes is not None and final != original:
        message = f"{BOXES} would not fit the resized image; use --resize-mode no"
        raise SampleError("failed_to_resize", "stale_annotation", message)
    measured = _measured_in(boxes)
    if measured is not None and measured != final:
        width, height = final or (None, None)
        sizes = f"{measured[0]} x {measured[1]} pixels, the image has {width} x {height}"
        advice = "; if it is displayed turned, use --apply-exif-orientation" if measured == (height, width) else ""
        message = f"{BOXES} is measured in {sizes}{advice}"
        raise SampleError("failed_to_resize", "stale_annotation", message)


def _measured_in(boxes: bytes | None) -> Size | None:
    """Width and height of the image according to ``boxes.json``; None where it has none, as in other tools' formats."""
    try:
        record = json.loads(boxes or b"{}")
        return int(record["width"]), int(record["height"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def fitted_mask(mask: bytes, original: Size, options: ImageOptions) -> bytes:
    """The mask of an image of ``original`` size (width, height), to fit what ``options`` make of the image.

    It is the mask itself where the image keeps its size. A border is void. With ``apply_exif_orientation`` masks, as
    boxes, must have been drawn on the image as displayed.

    Raises:
        SampleError: ``stale_annotation``, a mask of another size than the image; ``bad_mask``, no PNG with one channel.
    """
    _check_size(MASK_FIELD, mask, *original)
    geometry = plan(*original, options)
    if not geometry.changes or options.disable_all_reencoding:
        return mask
    try:
        values = decode_values(mask, options.max_pixels)
    except DataError as error:
        raise _bad(MASK_FIELD, str(error)) from error
    return _fitted(values, geometry, WIDE_VOID if values.dtype == np.uint16 else VOID_VALUE)


def fitted_depth(depth: bytes, original: Size, options: ImageOptions) -> bytes:
    """As :func:`fitted_mask` for a depth map: the nearest pixel's distance, since a mean of two objects' is neither's.

    A border has no measurement. Focal lengths change with a resize; the distances stay those of the scene.

    Raises:
        SampleError: ``stale_annotation``, a map of another size than the image; ``bad_depth``, no grey PNG of 16 bits.
    """
    _check_size(DEPTH_FIELD, depth, *original)
    geometry = plan(*original, options)
    try:
        values = depth_values(depth, options.max_pixels)
    except DataError as error:
        raise _bad(DEPTH_FIELD, str(error)) from error
    return _fitted(values, geometry, MISSING) if geometry.changes and not options.disable_all_reencoding else depth


def _fitted(values: Values, geometry: Geometry, border: int) -> bytes:
    width, height = geometry.resized
    resized: Values = values[_nearest(values.shape[0], height)[:, None], _nearest(values.shape[1], width)]
    return encode_values(crop_or_pad(resized, geometry, (border, border, border)))


def _check_size(name: str, content: bytes, width: int, height: int) -> None:
    try:
        header = read_header(content)
    except SampleError as error:
        raise _bad(name, error.message) from error
    if (header.width, header.height) != (width, height):
        sizes = f"{header.width} x {header.height} pixels, the image has {width} x {height}"
        turned = (header.height, header.width) == (width, height)
        advice = "; if it is displayed turned, use --apply-exif-orientation" if turned else ""
        raise SampleError("failed_to_resize", "stale_annotation", f"{name} has {sizes}{advice}")


def _bad(name: str, reason: str) -> SampleError:
    return SampleError("failed_to_resize", f"bad_{name.partition('.')[0]}", f"{name}: {reason}")


def _nearest(stored: int, wanted: int) -> NDArray[np.int64]:
    """For each of ``wanted`` pixels along a side, the one of ``stored`` pixels that contains its centre."""
    return ((np.arange(wanted) + 0.5) * stored / wanted).astype(np.int64).clip(0, stored - 1)
