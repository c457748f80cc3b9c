"""Encoded images of strangers as pixels: one rule for refreshes and for every reader.

1. The kind is detected from the first bytes, never from a name. The size is read from the header before anything is
   allocated.
2. libjpeg-turbo decodes JPEG, OpenCV PNG and WebP, Pillow all other kinds (``IMAGE`` in ``media.py``).
3. The result has 8 bits per channel. Grey stays one channel, everything else becomes colour; palettes are expanded,
   CMYK and LAB are converted; an animation is reduced to its first image.
4. Transparent pixels, by an alpha channel or a transparent value, are composited on a background: white for readers.
5. 16-bit values are divided by 257. Floats and 32-bit integers have no agreed white: 0 to 1 (floats), 0 to 255 and
   0 to 65535 are scaled to 0 to 255, other values fail.
6. EXIF orientation is ignored, as in img2dataset and open_clip, since boxes and masks are in the pixels as stored.
   :func:`turn` applies it where a caller asks.

All functions are pure and thread-safe: the decoders have no shared state and release the GIL.
"""

import functools
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NoReturn

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, TiffImagePlugin

from pipeline.errors import SampleError
from pipeline.shards.exif import PILLOW_ERRORS, jpeg_segments, orientation_of, read_exif

MOST_PIXELS = 2**30
"""The largest --max-pixels. Callers compare the header with their own limit before they decode."""
MAX_PIXELS = 64_000_000
"""The limit of readers: images in shards are small; a larger one is an attack or a mistake."""
Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow's own is 90 million, and cannot be set for one image

Pixels = npt.NDArray[np.uint8]
WHITE = (255, 255, 255)

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


def read_header(body: bytes) -> Header:
    """Format and size of an encoded image, without decoding it.

    Raises:
        SampleError: classes empty, not_a_picture, damaged.
    """
    if not body:
        bad_image("empty", "Image decoding error: empty body")
    if body.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(body)
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_header(body)
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return _webp_header(body)
    if _is_for_pillow(body):
        return _pillow_header(body)
    if body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{"):
        bad_image("not_a_picture", "Image decoding error: a text page in place of an image")
    bad_image("not_a_picture", "Image decoding error: not an image of a known kind")


def rgb(body: bytes, most_pixels: int, upright: bool = False) -> Pixels:
    """The first image in ``body`` as uint8 [H, W, 3], on white, for readers; ``upright`` applies its EXIF orientation.

    Raises:
        SampleError: as :func:`read_header` and :func:`decode_pixels`; class too_many_pixels.
    """
    use_one_thread()
    header = read_header(body)
    if header.width * header.height > most_pixels:
        bad_image("too_many_pixels", f"{header.width} x {header.height} pixels")
    pixels = _rgb_as_stored(body, header)
    return np.ascontiguousarray(turn(pixels, orientation_of(read_exif(body, header.kind)))) if upright else pixels


def _rgb_as_stored(body: bytes, header: Header) -> Pixels:
    if header.colour in ("YCbCr", "RGB", "Gray"):
        try:
            return np.asarray(simplejpeg.decode_jpeg(body))
        except ValueError:
            pass  # damage, or a harmless defect: decode_pixels tells
    pixels = decode_pixels(body, header)
    if pixels.ndim == 2:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if pixels.shape[2] == 4:
        pixels = composite(pixels, WHITE)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def _jpeg_header(body: bytes) -> Header:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(body, strict=False)
    except (ValueError, KeyError):
        # Sampling factors that the TurboJPEG interface has no name for, or damage: Pillow's reader tells.
        return _pillow_header(body)
    return Header("jpeg", width, height, str(colour))


def _png_header(body: bytes) -> Header:
    if len(body) < 33 or body[12:16] != b"IHDR":
        bad_image("damaged", "Image decoding error: damaged")
    width, height = struct.unpack_from(">II", body, 16)
    if not (0 < width < 2**31 and 0 < height < 2**31):
        bad_image("damaged", "Image decoding error: damaged")
    # The animation chunk must stand before the first pixels.
    animated = body.find(b"acTL", 33, max(33, body.find(b"IDAT"))) > 0
    return Header("png", width, height, animated=animated)


def _webp_header(body: bytes) -> Header:
    chunk = body[12:16]
    if len(body) < 30:
        bad_image("truncated", "Image decoding error: truncated")
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
        bad_image("damaged", "Image decoding error: damaged")
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
        # Pillow states the size of a TIFF as if it were upright.
        width, height = turned(image.size, _tiff_orientation(image))
        return Header(str(image.format).lower(), width, height)


def _open_with_pillow(body: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(body), formats=_PILLOW_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        bad_image("too_many_pixels", "Image decoding error: more pixels than --max-pixels can allow, 2^30")
    except PILLOW_ERRORS:
        if _is_unknown_tiff(body):
            bad_image("depth", "Image decoding error: a TIFF of 64 bits or with floats as colours")
        bad_image("damaged", "Image decoding error: damaged")


def _is_unknown_tiff(body: bytes) -> bool:
    """Whether this is a whole TIFF whose kind of pixels Pillow does not know."""
    try:
        TiffImagePlugin.TiffImageFile(BytesIO(body))
    except PILLOW_ERRORS as error:
        return "unknown pixel mode" in str(error)
    return False


def decode_pixels(body: bytes, header: Header, shrink: int = 1) -> Pixels:
    """uint8 [H, W] for grey, [H, W, 3] blue-green-red, or [H, W, 4] with alpha; divided by ``shrink`` (rounded up) for
    JPEG.

    Raises:
        SampleError: classes truncated, damaged, depth.
    """
    if header.kind == "jpeg" and header.colour:
        return _decode_jpeg(body, header, shrink)
    if header.kind in ("png", "webp"):
        pixels = _decode_with_opencv(body, header.kind)
    else:
        pixels = _decode_with_pillow(body)
    if pixels.shape[:2] != (header.height, header.width):
        bad_image("damaged", "Image decoding error: damaged")
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
            bad_image("truncated", "Image decoding error: truncated")
        return _decode_jpeg(body + b"\xff\xd9", header, shrink)
    if "premature end" in warning:
        bad_image("truncated", "Image decoding error: truncated")
    if not any(harmless in warning for harmless in _HARMLESS_JPEG_WARNINGS):
        bad_image("damaged", "Image decoding error: damaged")
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
        bad_image("damaged", "Image decoding error: damaged")
    opaque = _opaque_grey(data, pixels) if kind == "png" and pixels.ndim == 2 else None
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    return np.asarray(pixels if opaque is None else cv2.merge([pixels, pixels, pixels, opaque]))


def _opaque_grey(png: bytes, grey: npt.NDArray[Any]) -> Pixels | None:
    """The alpha of a grey PNG with one transparent value (chunk tRNS), which OpenCV ignores; ``None`` without one."""
    at = png.find(b"\0\0\0\2tRNS", 33, max(33, png.find(b"IDAT")))
    if at < 0 or png[25] != 0:
        return None
    depth = png[24]
    value = int.from_bytes(png[at + 8 : at + 10], "big") & (2**depth - 1)
    # OpenCV spreads 1, 2 and 4 bits over 0 to 255.
    shown = value * 255 // (2**depth - 1) if depth < 8 else value
    return np.where(grey == shown, 0, 255).astype(np.uint8)


def _bare_png(body: bytes) -> bytes:
    """The chunks with pixels; libpng writes warnings about others to stderr (mostly colour profiles)."""
    chunks, start, kind = [body[:8]], 8, b""
    while start + 12 <= len(body) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", body, start)
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            chunks.append(body[start : start + length + 12])
        start += length + 12
    if kind != b"IEND" or start > len(body):
        bad_image("truncated", "Image decoding error: truncated")
    return b"".join(chunks)


def _decode_with_pillow(body: bytes) -> Pixels:
    with _open_with_pillow(body) as image:
        try:
            orientation = _tiff_orientation(image)
            image.load()
            # Pillow has turned a TIFF upright; undo it. 6 and 8 are each other's inverse, the others their own.
            return turn(_pillow_pixels(image), {6: 8, 8: 6}.get(orientation, orientation))
        except PILLOW_ERRORS:
            bad_image("damaged", "Image decoding error: damaged")


def _tiff_orientation(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    value = tags.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _pillow_pixels(image: Image.Image) -> Pixels:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        return _scaled(np.asarray(image), 65535)
    if mode in ("I", "F"):
        return _scaled_by_range(np.asarray(image))
    if mode == "LAB":
        # Pillow gives a* and b* as signed bytes, OpenCV takes them with 128 added.
        values: Pixels = np.asarray(image, np.uint8) ^ np.array([0, 128, 128], np.uint8)
        return np.asarray(cv2.cvtColor(values, cv2.COLOR_LAB2BGR), np.uint8)
    if mode == "La":
        image = image.convert("LA")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return np.asarray(cv2.cvtColor(np.asarray(image.convert("RGBA")), cv2.COLOR_RGBA2BGRA))
    if mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR))


def _scaled_by_range(values: npt.NDArray[np.float32 | np.int32]) -> Pixels:
    low, high = float(values.min()), float(values.max())
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    white = next((white for white in whites if low >= 0 and high <= white), None)  # NaN fits none
    if white is None:
        bad_image("depth", "Image decoding error: values outside 0 to 65535, which have no agreed white")
    return _scaled(values, white)


def _scaled(values: npt.NDArray[np.number], white: float) -> Pixels:
    scaled: Pixels = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    return scaled


def jpeg_scans(body: bytes) -> int:
    """Upper bound of the number of scans that a decoder processes."""
    components = -1
    for marker, start, _ in jpeg_segments(body):
        if marker in (0xC0, 0xC1):
            components = body[start + 5]
        elif marker == 0xDA and components == body[start]:
            # A sequential image whose first scan has all components ends with it; no need to read the rest.
            return 1
    return body.count(b"\xff\xda")


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


def turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The size of an image after :func:`turn`."""
    return size[::-1] if orientation >= 5 else size


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (1 to 8; Exif 2.32, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        pixels = np.asarray(cv2.transpose(pixels))
    # After the transposition 5 is done, 6 still needs a left-right mirror, 8 a top-bottom one, 7 both.
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip))


def bad_image(error_class: str, message: str) -> NoReturn:
    """Raise the error of an image that cannot be used."""
    raise SampleError("failed_to_resize", error_class, message)


@functools.cache
def use_one_thread() -> None:
    """Keep OpenCV to one thread: images are processed in parallel, and its own threads would compete for the cores."""
    cv2.setNumThreads(1)
