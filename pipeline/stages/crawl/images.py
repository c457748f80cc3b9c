"""Decode, check, resize and re-encode one untrusted image.

The options have img2dataset's names and meanings (its ``resizer.py``, version 1.47), and every resize mode gives the
same geometry. The order of the steps differs, because the input is hostile and CPU time is the cost:

1. The format is detected from the first bytes (never from a name or a Content-Type), the size is read from the header,
   and every limit is checked before pixels are allocated.
2. libjpeg-turbo decodes JPEG, in the default mode directly at a half, a quarter or an eighth of the size if that is
   still ``_MARGIN`` times the target size. OpenCV decodes PNG and WebP, Pillow all other formats.
3. OpenCV resizes (by default area for downscaling, Lanczos for upscaling), crops or pads, and encodes. In the default
   mode a faster method replaces area averaging (see ``_shrink``).

The output has 8 bits per channel: grey stays one channel (as in img2dataset), all others become RGB. Alpha is
composited on the background, 16-bit values are scaled down, palettes are expanded, CMYK is converted, and an animation
is reduced to its first image. EXIF orientation is ignored by default, as in img2dataset, so that shards match its own.
Re-encoded images have no EXIF, so an applied orientation cannot be applied twice.

All functions here are pure and thread-safe: the decoders have no shared state and release the GIL.
"""

import functools
import math
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NoReturn, get_args

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.stages.crawl.exif import PILLOW_ERRORS, exif_json, jpeg_segments, orientation_of, read_exif

ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
EncodeFormat = Literal["jpg", "png", "webp"]
Pixels = npt.NDArray[np.uint8]

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
_KIND_OF_FORMAT = {"jpg": "jpeg", "png": "png", "webp": "webp"}

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

_PILLOW_FORMATS = ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "JPEG", "MPO")
# Warnings of libjpeg for images with complete pixels.
_HARMLESS_JPEG_WARNINGS = (
    "extraneous bytes",
    "unknown jfif revision",
    "unknown adobe",
    "inconsistent progression",
    "invalid sos parameters",
    "too many scanlines",
)


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
    disable_all_reencoding: bool = False
    """Keep the original bytes of every image, unchecked, under the extension of encode_format."""
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
    background: tuple[int, int, int] = (255, 255, 255)
    """Background colour of transparent pixels and of the border: red, green, blue (0 to 255)."""
    apply_exif_orientation: bool = False
    """Apply the EXIF orientation. Off by default, as in img2dataset."""
    extract_exif: bool = True
    """Store the EXIF tags as JSON text."""

    def __post_init__(self) -> None:
        require(1 <= self.image_size <= 16384, "image_size", self.image_size, "1 to 16384 pixels")
        _require_one_of("resize_mode", self.resize_mode, ResizeMode)
        _require_one_of("upscale_interpolation", self.upscale_interpolation, Interpolation)
        _require_one_of("downscale_interpolation", self.downscale_interpolation, Interpolation)
        _require_one_of("encode_format", self.encode_format, EncodeFormat)
        _, low, high = _ENCODERS[self.encode_format]
        allowed = f"{low} to {high} when encode_format is {self.encode_format}"
        require(low <= self.encode_quality <= high, "encode_quality", self.encode_quality, allowed)
        require(self.min_image_size >= 0, "min_image_size", self.min_image_size, "0 or more pixels")
        require(self.max_image_area > 0, "max_image_area", self.max_image_area, "more than 0 pixels")
        require(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "1 or more")
        require(1 <= self.max_pixels <= 2**30, "max_pixels", self.max_pixels, "1 to 2^30 pixels")
        ok = len(self.background) == 3 and all(0 <= value <= 255 for value in self.background)
        require(ok, "background", self.background, "three values from 0 to 255 (red green blue)")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The result of :func:`transform` for one body.

    ``width`` and ``height`` are those of ``data``; the original ones those of the body (as displayed, if the EXIF
    orientation was applied). They are None only with ``disable_all_reencoding``, for a body that is not an image.
    ``kept`` means that ``data`` is the body itself. ``exif`` is a JSON object, "{}" without tags, None if not requested
    or unreadable.
    """

    data: bytes
    format: EncodeFormat
    width: int | None
    height: int | None
    original_width: int | None
    original_height: int | None
    exif: str | None
    kept: bool


@dataclass(frozen=True, slots=True)
class Header:
    """Header of an image: its format and its size in pixels, before EXIF orientation.

    ``colour`` is libjpeg's name of a JPEG's colour space ("" for other formats, or if only Pillow reads it);
    ``animated`` marks PNG and WebP with several frames.
    """

    kind: str
    width: int
    height: int
    colour: str = ""
    animated: bool = False


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
            too_many_pixels, too_small, too_large, aspect_ratio, encode. Messages are few and fixed, for counting.
    """
    _use_one_thread()
    if options.disable_all_reencoding:
        return _untouched(body, options)
    header = read_header(body)
    exif = read_exif(body, header.kind) if options.extract_exif or options.apply_exif_orientation else None
    orientation = orientation_of(exif) if options.apply_exif_orientation else 1
    size = _turned((header.width, header.height), orientation)
    _check_limits(size, body, options)
    geometry = plan(*size, options)
    _check_output(geometry, options)
    data = _kept_bytes(body, header, geometry, orientation, options)
    kept = data is not None
    if data is None:
        data = _convert(body, header, geometry, orientation, options)
    text = exif_json(exif) if options.extract_exif else None
    return EncodedImage(data, options.encode_format, *geometry.final, *geometry.original, text, kept)


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


def read_header(body: bytes) -> Header:
    """Format and size of an encoded image, without decoding it.

    Raises:
        SampleError: classes empty, not_a_picture, damaged.
    """
    if not body:
        _fail("empty", "Image decoding error: empty body")
    if body.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(body)
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_header(body)
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return _webp_header(body)
    if _is_for_pillow(body):
        return _pillow_header(body)
    if body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{"):
        _fail("not_a_picture", "Image decoding error: a text page in place of an image")
    _fail("not_a_picture", "Image decoding error: not an image of a known kind")


# Limits


def _check_limits(size: tuple[int, int], body: bytes, options: ImageOptions) -> None:
    short, long, area = min(size), max(size), size[0] * size[1]
    if area > options.max_pixels:
        _fail("too_many_pixels", "Image decoding error: too many pixels")
    if short < options.min_image_size:
        _fail("too_small", "image too small")
    if area > options.max_image_area:
        _fail("too_large", "image area too large")
    if long / short > options.max_aspect_ratio:
        _fail("aspect_ratio", "aspect ratio too large")
    scans = _jpeg_scans(body) if body.startswith(b"\xff\xd8") else 1
    if scans > _MAX_JPEG_SCANS and scans * area > options.max_pixels:
        _fail("too_many_pixels", "Image decoding error: too many passes")


def _jpeg_scans(body: bytes) -> int:
    """Upper bound of the number of scans that a decoder processes."""
    components = -1
    for marker, start, _ in jpeg_segments(body):
        if marker in (0xC0, 0xC1):
            components = body[start + 5]
        elif marker == 0xDA and components == body[start]:
            # A sequential image whose first scan has all components ends with it; no need to read the rest.
            return 1
    return body.count(b"\xff\xda")


def _check_output(geometry: Geometry, options: ImageOptions) -> None:
    # A line of 1 x 30,000 pixels resized to a shorter side of 256 would have two gigapixels.
    width, height = geometry.resized
    if width * height > options.max_pixels:
        _fail("too_many_pixels", "resized image area too large")


# Headers


def _jpeg_header(body: bytes) -> Header:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(body, strict=False)
    except (ValueError, KeyError):
        # Sampling factors that the TurboJPEG interface has no name for, or damage: Pillow's reader tells.
        return _pillow_header(body)
    return Header("jpeg", width, height, str(colour))


def _png_header(body: bytes) -> Header:
    if len(body) < 33 or body[12:16] != b"IHDR":
        _fail("damaged", "Image decoding error: damaged")
    width, height = struct.unpack_from(">II", body, 16)
    if not (0 < width < 2**31 and 0 < height < 2**31):
        _fail("damaged", "Image decoding error: damaged")
    # The animation chunk must stand before the first pixels.
    animated = body.find(b"acTL", 33, max(33, body.find(b"IDAT"))) > 0
    return Header("png", width, height, animated=animated)


def _webp_header(body: bytes) -> Header:
    chunk = body[12:16]
    if len(body) < 30:
        _fail("truncated", "Image decoding error: truncated")
    if chunk == b"VP8X":
        width, height = 1 + int.from_bytes(body[24:27], "little"), 1 + int.from_bytes(body[27:30], "little")
        return Header("webp", width, height, animated=bool(body[20] & 2))
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 26)
        width, height = width & 0x3FFF, height & 0x3FFF
    elif chunk == b"VP8L":
        bits = int.from_bytes(body[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width = height = 0
    if width == 0 or height == 0:
        _fail("damaged", "Image decoding error: damaged")
    return Header("webp", width, height)


def _is_for_pillow(body: bytes) -> bool:
    starts = (b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\x4f\xff\x51")
    if body.startswith(starts) or body.startswith(b"\0\0\0\x0cjP  "):
        return True
    if body[4:8] == b"ftyp":
        return body[8:12] in (b"avif", b"avis", b"mif1")
    return body[:1] == b"P" and body[1:2] in b"123456" and body[2:3].isspace()


def _pillow_header(body: bytes) -> Header:
    with _open_with_pillow(body) as image:
        return Header(str(image.format).lower(), *image.size)


def _open_with_pillow(body: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(body), formats=_PILLOW_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _fail("too_many_pixels", "Image decoding error: too many pixels")
    except PILLOW_ERRORS:
        _fail("damaged", "Image decoding error: damaged")


# Decoding: all return uint8 pixels, [H, W] for grey, [H, W, 3] blue-green-red, or [H, W, 4] with alpha


def _decode(body: bytes, header: Header, shrink: int = 1) -> Pixels:
    """Pixels at the header's size; for JPEG divided by ``shrink`` (rounded up)."""
    if header.kind == "jpeg" and header.colour:
        return _decode_jpeg(body, header, shrink)
    if header.kind in ("png", "webp"):
        pixels = _decode_with_opencv(body, header.kind)
    else:
        pixels = _decode_with_pillow(body)
    if pixels.shape[:2] != (header.height, header.width):
        _fail("damaged", "Image decoding error: damaged")
    return pixels


def _decode_jpeg(body: bytes, header: Header, shrink: int) -> Pixels:
    colour = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(header.colour, "BGR")
    size = -(-header.width // shrink), -(-header.height // shrink)
    try:
        pixels = simplejpeg.decode_jpeg(body, colour, min_height=size[1], min_width=size[0])
    except ValueError as error:
        return _decode_doubtful_jpeg(body, header, shrink, str(error).lower())
    if colour == "GRAY":
        return np.asarray(pixels[:, :, 0])
    return _cmyk_to_bgr(pixels) if colour == "CMYK" else np.asarray(pixels)


def _decode_doubtful_jpeg(body: bytes, header: Header, shrink: int, warning: str) -> Pixels:
    """Accept a complete image with a minor file defect; reject one that libjpeg would fill with grey."""
    if "premature end of jpeg file" in warning:
        # Only the end mark may be missing; in a progressive file, passes may be missing too, without a sign.
        if body.endswith(b"\xff\xd9") or b"\xff\xc2" in body[: body.find(b"\xff\xda")]:
            _fail("truncated", "Image decoding error: truncated")
        return _decode_jpeg(body + b"\xff\xd9", header, shrink)
    if "premature end" in warning:
        _fail("truncated", "Image decoding error: truncated")
    if not any(harmless in warning for harmless in _HARMLESS_JPEG_WARNINGS):
        _fail("damaged", "Image decoding error: damaged")
    # TurboJPEG raises errors for these; OpenCV continues, but cannot decode at a scale.
    pixels = _decode_with_opencv(body, "jpeg")
    size = -(-header.width // shrink), -(-header.height // shrink)
    return pixels if shrink == 1 else np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def _cmyk_to_bgr(pixels: Pixels) -> Pixels:
    # JPEG writers store inverted inks, so each value is a fraction of light: colour = value * black / 255.
    black = cv2.merge([pixels[:, :, 3]] * 3)
    return np.asarray(cv2.multiply(np.ascontiguousarray(pixels[:, :, 2::-1]), black, scale=1 / 255))


def _decode_with_opencv(body: bytes, kind: str) -> Pixels:
    data = _bare_png(body) if kind == "png" else body
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        _fail("damaged", "Image decoding error: damaged")
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    return np.asarray(pixels)


def _bare_png(body: bytes) -> bytes:
    """The chunks with pixels; libpng writes warnings about others to stderr (mostly colour profiles)."""
    chunks, start, kind = [body[:8]], 8, b""
    while start + 12 <= len(body) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", body, start)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            chunks.append(body[start : start + length + 12])
        start += length + 12
    if kind != b"IEND" or start > len(body):
        _fail("truncated", "Image decoding error: truncated")
    return b"".join(chunks)


def _decode_with_pillow(body: bytes) -> Pixels:
    with _open_with_pillow(body) as image:
        try:
            image.load()
            return _pillow_pixels(image)
        except PILLOW_ERRORS:
            _fail("damaged", "Image decoding error: damaged")


def _pillow_pixels(image: Image.Image) -> Pixels:
    mode = image.mode
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if mode.startswith("I"):
        values = np.asarray(image)
        scale = 1 / 257 if int(values.max()) > 255 else 1.0
        return np.rint(values.clip(0, 65535) * scale).astype(np.uint8)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return np.asarray(cv2.cvtColor(np.asarray(image.convert("RGBA")), cv2.COLOR_RGBA2BGRA))
    return np.asarray(cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR))


# Pixels


@dataclass(frozen=True, slots=True)
class _Axis:
    """One side of a scaled decode: pixels decoded, pixels repeated at the far edge, pixels to resize them all to."""

    decoded: int
    padding: int
    resized: int
    shift: float


def _convert(body: bytes, header: Header, geometry: Geometry, orientation: int, options: ImageOptions) -> bytes:
    pixels = _resized(body, header, _turned(geometry.resized, orientation), geometry.interpolation, options)
    pixels = _turn(pixels, orientation)
    if len(set(options.background)) > 1 and pixels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
    return _encode(_crop_or_pad(pixels, geometry, options.background), options)


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
                return _resize_scaled(_decode(body, header, factor), across, down, size)
    pixels = _decode(body, header)
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


def composite(pixels: Pixels, background: tuple[int, int, int]) -> Pixels:
    """``[H, W, 4]`` blue-green-red-alpha on a red-green-blue ``background`` -> ``[H, W, 3]``, rounded to nearest."""
    if int(pixels[:, :, 3].min()) == 255:
        return np.ascontiguousarray(pixels[:, :, :3])
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    behind = np.array(background[::-1], np.uint16)
    # Process in bands, to keep the 16-bit temporaries small for huge images.
    band = max(1, 2**18 // pixels.shape[1])
    for top in range(0, pixels.shape[0], band):
        part = pixels[top : top + band].astype(np.uint16)
        alpha = part[:, :, 3:]
        total = part[:, :, :3] * alpha + (255 - alpha) * behind + 128
        # (x + (x >> 8)) >> 8 is x / 255, rounded, for every sum that can occur; no 16-bit overflow.
        result[top : top + band] = (total + (total >> 8)) >> 8
    return result


def _crop_or_pad(pixels: Pixels, geometry: Geometry, background: tuple[int, int, int]) -> Pixels:
    """Crop the final size from the middle, or pad with the background."""
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
        _fail("encode", "Image encoding error")
    return data.tobytes()


def _kept_bytes(
    body: bytes, header: Header, geometry: Geometry, orientation: int, options: ImageOptions
) -> bytes | None:
    """The body, if it can be the output; it is decoded anyway, to detect damage."""
    wanted = options.skip_reencode and header.kind == _KIND_OF_FORMAT[options.encode_format]
    if not wanted or geometry.changes or header.animated or orientation != 1:
        return None
    if header.kind == "jpeg" and header.colour not in ("YCbCr", "RGB", "Gray"):
        return None
    pixels = _decode(body, header, shrink=8)
    deep = header.kind == "png" and body[24] == 16
    transparent = pixels.ndim == 3 and pixels.shape[2] == 4
    return None if deep or transparent else body


def _untouched(body: bytes, options: ImageOptions) -> EncodedImage:
    """``disable_all_reencoding``: accept every body; the size is set where the header has one."""
    try:
        header: Header | None = read_header(body)
    except SampleError:
        header = None
    width, height = (header.width, header.height) if header else (None, None)
    text = exif_json(read_exif(body, header.kind)) if options.extract_exif and header else None
    return EncodedImage(body, options.encode_format, width, height, width, height, text, True)


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation >= 5 else size


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (1 to 8; Exif 2.32, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        pixels = np.asarray(cv2.transpose(pixels))
    # After the transposition 5 is done, 6 still needs a left-right mirror, 8 a top-bottom one, 7 both.
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip))


def _fail(error_class: str, message: str) -> NoReturn:
    raise SampleError("failed_to_resize", error_class, message)


def _require_one_of(field: str, value: object, kind: object) -> None:
    names: tuple[str, ...] = get_args(kind)
    require(value in names, field, value, "one of " + ", ".join(names))


@functools.cache
def _use_one_thread() -> None:
    # Images are processed in parallel; OpenCV's own threads would compete for the same cores.
    cv2.setNumThreads(1)
