"""Decode, check, resize and re-encode one untrusted image.

The options have img2dataset's names and meanings (its ``resizer.py``, version 1.47), and every resize mode gives the
same geometry. The order of the steps differs, because the input is hostile and CPU time is the cost:

1. The format is detected from the first bytes (never from a name or a Content-Type), the size is read from the header,
   and every limit is checked before pixels are allocated.
2. :mod:`pipeline.shards.pixels` decodes, by the rule that readers follow too. In the default mode libjpeg-turbo decodes
   a JPEG directly at a half, a quarter or an eighth of the size if that is still ``_MARGIN`` times the target size.
3. OpenCV resizes (by default area for downscaling, Lanczos for upscaling), crops or pads, and encodes. In the default
   mode a faster method replaces area averaging (see ``_shrink``).

Grey stays one channel, as in img2dataset. EXIF orientation is ignored by default, as in img2dataset, so that shards
match its own. Re-encoded images have no EXIF, so an applied orientation cannot be applied twice.

All functions here are pure and thread-safe: the decoders have no shared state and release the GIL.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SampleError, SettingError
from pipeline.shards.exif import exif_json, orientation_of, read_exif
from pipeline.shards.media import IMAGE
from pipeline.shards.pixels import (
    MOST_PIXELS,
    WHITE,
    Header,
    Pixels,
    bad_image,
    composite,
    decode_pixels,
    jpeg_scans,
    read_header,
    turn,
    turned,
    use_one_thread,
)

ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
EncodeFormat = Literal["jpg", "png", "webp"]

_INTERPOLATIONS: dict[str, int] = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "bilinear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
    "lanczos4": cv2.INTER_LANCZOS4,
}
# Quality flag of OpenCV and the range that img2dataset accepts; 101 asks WebP for lossless coding.
_ENCODERS: dict[str, tuple[int, int, int]] = {
    "jpg": (cv2.IMWRITE_JPEG_QUALITY, 0, 100),
    "png": (cv2.IMWRITE_PNG_COMPRESSION, 0, 9),
    "webp": (cv2.IMWRITE_WEBP_QUALITY, 1, 101),
}

# A JPEG is decoded to a fraction of its size only if the area filter still averages this many pixels per side
# (measured on photographs: 2 keeps 42 dB on average against a full decode, 1.5 some 38 dB, 1.25 only 33 dB) ...
_MARGIN = 2.0
# ... and if the far edge is this close, in output pixels, to its position in a full decode.
_MAX_SHIFT = 0.13
_MAX_PADDING = 32
# Between these the area filter is replaced by one that is three times as fast (see ``_shrink``); nearer to 1 more would
# be lost than is won.
_FAST_SHRINK = (1.4, 4.0)
# A progressive JPEG can encode a whole pass over its pixels in a few bytes; real ones have about ten passes.
_MAX_JPEG_SCANS = 100
# A decoder of JPEG 2000 takes 20 bytes for each pixel that a file claims, others 12 at most.
_JPEG2000_COST = 5 / 3


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Options of resizing and encoding; names and defaults are img2dataset's."""

    image_size: int = 256
    """Target side in pixels; resize_mode says which side."""
    resize_mode: ResizeMode = "border"
    """no: keep the size; keep_ratio: resize the shorter side; keep_ratio_largest: resize the longer side;
    center_crop: resize the shorter side and crop the central square; border: resize the longer side and pad to a
    square."""
    resize_only_if_bigger: bool = False
    """Keep the size of an image whose side is not longer than image_size."""
    upscale_interpolation: Interpolation = "lanczos"
    downscale_interpolation: Interpolation = "area"
    encode_format: EncodeFormat = "jpg"
    encode_quality: int = 95
    """Quality of jpg (0 to 100) or webp (1 to 100; 101 = lossless), or compression level of png (0 to 9)."""
    skip_reencode: bool = False
    """Keep the original bytes of an image that is already in encode_format and needs no change."""
    keep_bytes: bool = False
    """Keep the original bytes of every image that needs no change, with the ending of its own format; it is decoded
    once, to detect damage."""
    disable_all_reencoding: bool = False
    """Keep the original bytes of every image, unchecked, under the extension of encode_format; prefer keep_bytes."""
    min_image_size: int = 0
    """Smallest shorter side in pixels; smaller images fail."""
    max_image_area: float = math.inf
    """Largest area in pixels; larger images fail."""
    max_aspect_ratio: float = math.inf
    """Largest ratio of the longer to the shorter side; more elongated images fail."""
    max_pixels: int = 128_000_000
    """Largest number of pixels to decode or to resize to; checked before allocation, larger images fail."""
    exact: bool = False
    """Decode JPEG at full size before downscaling: exactly img2dataset's pixels, for up to twice the CPU time."""
    background: tuple[int, int, int] = WHITE
    """Background colour of transparent pixels and of the border: red, green, blue (0 to 255)."""
    apply_exif_orientation: bool = False
    """Apply the EXIF orientation. Off by default, as in img2dataset."""
    extract_exif: bool = True
    """Store the EXIF tags as JSON text."""

    def __post_init__(self) -> None:
        clear = not (self.keep_bytes and self.disable_all_reencoding)
        require(clear, "keep_bytes", self.keep_bytes, "off with disable_all_reencoding")
        require(1 <= self.image_size <= 16384, "image_size", self.image_size, "1 to 16384 pixels")
        _require_one_of("resize_mode", self.resize_mode, ResizeMode)
        _require_one_of("upscale_interpolation", self.upscale_interpolation, Interpolation)
        _require_one_of("downscale_interpolation", self.downscale_interpolation, Interpolation)
        _require_one_of("encode_format", self.encode_format, EncodeFormat)
        _, low, high = _ENCODERS[self.encode_format]
        allowed = f"{low} to {high} when encode_format is {self.encode_format}"
        if self.encode_format == "png" and self.encode_quality == type(self).encode_quality:
            problem = f"got 'png' with the default encode_quality {self.encode_quality}, which is for jpg and webp"
            raise SettingError("encode_format", "png", f"encode_quality (compression level) {low} to {high}", problem)
        require(low <= self.encode_quality <= high, "encode_quality", self.encode_quality, allowed)
        require(self.min_image_size >= 0, "min_image_size", self.min_image_size, "0 or more pixels")
        require(self.max_image_area > 0, "max_image_area", self.max_image_area, "more than 0 pixels")
        require(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "1 or more")
        require(1 <= self.max_pixels <= MOST_PIXELS, "max_pixels", self.max_pixels, "1 to 2^30 pixels")
        ok = len(self.background) == 3 and all(0 <= value <= 255 for value in self.background)
        require(ok, "background", self.background, "three values from 0 to 255 (red green blue)")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The result of :func:`transform` for one body.

    ``format`` is the ending of the image's field. ``width`` and ``height`` are those of ``data``; the original ones
    those of the body (as displayed, if the EXIF orientation was applied). They are None only with
    ``disable_all_reencoding``, for a body that is not an image. ``kept`` means that ``data`` is the body itself.
    ``exif`` is a JSON object, "{}" without tags, None if not requested or unreadable.
    """

    data: bytes
    format: str
    width: int | None
    height: int | None
    original_width: int | None
    original_height: int | None
    exif: str | None
    kept: bool


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes as (width, height): of the image, after resizing, and after the crop or the border."""

    original: tuple[int, int]
    resized: tuple[int, int]
    final: tuple[int, int]
    interpolation: Interpolation

    @property
    def changes(self) -> bool:
        """Whether the image is resized, cropped or padded."""
        return not self.original == self.resized == self.final


def transform(body: bytes, options: ImageOptions) -> EncodedImage:
    """Decode, check, resize and encode one image.

    Raises:
        SampleError: status "failed_to_resize"; ``error_class`` is one of empty, not_a_picture, truncated, damaged,
            depth, too_many_pixels, too_small, too_large, aspect_ratio, encode. Messages are few and fixed, for
            counting.
    """
    use_one_thread()
    if options.disable_all_reencoding:
        return _untouched(body, options)
    header = read_header(body)
    exif = read_exif(body, header.kind) if options.extract_exif or options.apply_exif_orientation else None
    orientation = orientation_of(exif) if options.apply_exif_orientation else 1
    size = turned((header.width, header.height), orientation)
    _check_limits(size, header.kind, body, options)
    geometry = plan(*size, options)
    _check_output(geometry, options)
    kept = not geometry.changes and orientation == 1 and _may_keep(body, header, options)
    data = body if kept else _convert(body, header, geometry, orientation, options)
    ending = IMAGE.kinds[header.kind][0] if kept else options.encode_format
    text = exif_json(exif) if options.extract_exif else None
    return EncodedImage(data, ending, *geometry.final, *geometry.original, text, kept)


def plan(width: int, height: int, options: ImageOptions) -> Geometry:
    """The sizes for an image of ``width`` x ``height`` pixels under ``options``; rounding is img2dataset's."""
    original, target = (width, height), options.image_size
    mode = options.resize_mode
    side = min(original) if mode in ("keep_ratio", "center_crop") else max(original)
    shrinks = side > target
    if mode == "no" or (options.resize_only_if_bigger and not shrinks):
        return Geometry(original, original, original, options.downscale_interpolation)
    scale = target / side
    resized = max(1, round(width * scale)), max(1, round(height * scale))
    final = (target, target) if mode in ("center_crop", "border") else resized
    interpolation = options.downscale_interpolation if shrinks else options.upscale_interpolation
    return Geometry(original, resized, final, interpolation)


# Limits


def _check_limits(size: tuple[int, int], kind: str, body: bytes, options: ImageOptions) -> None:
    short, long, area = min(size), max(size), size[0] * size[1]
    if area * (_JPEG2000_COST if kind == "jpeg2000" else 1) > options.max_pixels:
        bad_image("too_many_pixels", f"Image decoding error: more pixels than --max-pixels {options.max_pixels}")
    if short < options.min_image_size:
        bad_image("too_small", "image too small")
    if area > options.max_image_area:
        bad_image("too_large", "image area too large")
    if long / short > options.max_aspect_ratio:
        bad_image("aspect_ratio", "aspect ratio too large")
    scans = jpeg_scans(body) if body.startswith(b"\xff\xd8") else 1
    if scans > _MAX_JPEG_SCANS and scans * area > options.max_pixels:
        bad_image("too_many_pixels", f"Image decoding error: passes over more than --max-pixels {options.max_pixels}")


def _check_output(geometry: Geometry, options: ImageOptions) -> None:
    # A line of 1 x 30,000 pixels resized to a shorter side of 256 would have two gigapixels.
    width, height = geometry.resized
    if width * height > options.max_pixels:
        bad_image("too_many_pixels", f"resized image has more pixels than --max-pixels {options.max_pixels}")


# Pixels


@dataclass(frozen=True, slots=True)
class _Axis:
    """One side of a scaled decode: pixels decoded, pixels repeated at the far edge, pixels to resize them all to."""

    decoded: int
    padding: int
    resized: int
    shift: float


def _convert(body: bytes, header: Header, geometry: Geometry, orientation: int, options: ImageOptions) -> bytes:
    pixels = _resized(body, header, turned(geometry.resized, orientation), geometry.interpolation, options)
    pixels = turn(pixels, orientation)
    if len(set(options.background)) > 1 and pixels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
    return _encode(crop_or_pad(pixels, geometry, options.background), options)


def _resized(
    body: bytes, header: Header, size: tuple[int, int], interpolation: Interpolation, options: ImageOptions
) -> Pixels:
    """Decode, composite and resize to ``size`` (width, height)."""
    if header.colour and interpolation == "area" and not options.exact:
        for factor in (8, 4, 2):
            if min(header.width / size[0], header.height / size[1]) < factor * _MARGIN:
                continue
            across, down = _axis(header.width, factor, size[0]), _axis(header.height, factor, size[1])
            if max(across.shift, down.shift) <= _MAX_SHIFT:
                return _resize_scaled(decode_pixels(body, header, factor), across, down, size)
    pixels = decode_pixels(body, header)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = composite(pixels, options.background)
    if pixels.shape[:2] == size[::-1]:
        return pixels
    if interpolation == "area" and header.colour and not options.exact:
        return _shrink(pixels, size)
    return np.asarray(cv2.resize(pixels, size, interpolation=_INTERPOLATIONS[interpolation]))


def _axis(length: int, factor: int, wanted: int) -> _Axis:
    """How to bring ``length`` pixels, decoded ``factor`` times smaller, to ``wanted`` without moving them.

    The last decoded pixel may represent fewer than ``factor`` original ones, so resizing all of them to ``wanted``
    would shrink the image slightly too much. A few more pixels at the far edge, cut off afterwards, make the number of
    output pixels (nearly) integral at the right scale.
    """
    decoded, step = -(-length // factor), factor * wanted / length
    best = _Axis(decoded, 0, wanted, math.inf)
    for padding in range(_MAX_PADDING + 1):
        outputs = (decoded + padding) * step
        shift = abs(outputs - round(outputs))
        if shift < best.shift:
            best = _Axis(decoded, padding, round(outputs), shift)
        if shift < 0.02:
            break
    return best


def _resize_scaled(pixels: Pixels, across: _Axis, down: _Axis, size: tuple[int, int]) -> Pixels:
    if across.padding or down.padding:
        pixels = np.asarray(cv2.copyMakeBorder(pixels, 0, down.padding, 0, across.padding, cv2.BORDER_REPLICATE))
    return _shrink(pixels, (across.resized, down.resized))[: size[1], : size[0]]


def _shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The area filter at a third of its cost: a bilinear resize to twice ``size``, then the mean of 2 x 2.

    OpenCV has SIMD code for these two, but not for averaging other areas.
    """
    shrinks = pixels.shape[1] / size[0], pixels.shape[0] / size[1]
    if _FAST_SHRINK[0] <= min(shrinks) and max(shrinks) <= _FAST_SHRINK[1]:
        pixels = np.asarray(cv2.resize(pixels, (2 * size[0], 2 * size[1]), interpolation=cv2.INTER_LINEAR))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def crop_or_pad(pixels: NDArray[Any], geometry: Geometry, background: tuple[int, int, int]) -> NDArray[Any]:
    """Crop the final size from the middle, or pad with the background (red, green, blue)."""
    more_x = geometry.final[0] - geometry.resized[0]
    more_y = geometry.final[1] - geometry.resized[1]
    if more_x < 0 or more_y < 0:
        left, top = -more_x // 2, -more_y // 2
        return pixels[top : top + geometry.final[1], left : left + geometry.final[0]]
    if more_x > 0 or more_y > 0:
        sides = more_y // 2, more_y - more_y // 2, more_x // 2, more_x - more_x // 2
        pixels = np.asarray(cv2.copyMakeBorder(pixels, *sides, cv2.BORDER_CONSTANT, value=background[::-1]))
    return pixels


def _encode(pixels: Pixels, options: ImageOptions) -> bytes:
    flag = _ENCODERS[options.encode_format][0]
    try:
        done, data = cv2.imencode(f".{options.encode_format}", pixels, (flag, options.encode_quality))
    except cv2.error:
        done, data = False, np.empty(0, np.uint8)
    if not done:
        # JPEG ends at 65,500 pixels a side, WebP at 16,383.
        bad_image("encode", "Image encoding error")
    return data.tobytes()


def _may_keep(body: bytes, header: Header, options: ImageOptions) -> bool:
    """Whether the body can be the output unchanged; if so, it is decoded to detect damage."""
    if options.keep_bytes:
        decode_pixels(body, header, shrink=8)
        return True
    if not options.skip_reencode or IMAGE.kinds[header.kind][0] != options.encode_format or header.animated:
        return False
    if header.kind == "jpeg" and header.colour not in ("YCbCr", "RGB", "Gray"):
        return False
    pixels = decode_pixels(body, header, shrink=8)
    deep = header.kind == "png" and body[24] == 16
    transparent = pixels.ndim == 3 and pixels.shape[2] == 4
    return not deep and not transparent


def _untouched(body: bytes, options: ImageOptions) -> EncodedImage:
    """``disable_all_reencoding``: accept every body; the size is set where the header has one."""
    try:
        header: Header | None = read_header(body)
    except SampleError:
        header = None
    width, height = (header.width, header.height) if header else (None, None)
    text = exif_json(read_exif(body, header.kind)) if options.extract_exif and header else None
    return EncodedImage(body, options.encode_format, width, height, width, height, text, True)


def _require_one_of(field: str, value: object, kind: object) -> None:
    names: tuple[str, ...] = get_args(kind)
    require(value in names, field, value, "one of " + ", ".join(names))
