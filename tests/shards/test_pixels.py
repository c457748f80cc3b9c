"""One rule for pixels: every kind and mode, by hand-made files, the same in refreshes and in readers."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions, transform
from pipeline.errors import SampleError
from pipeline.loaders.images import decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.pixels import rgb
from pipeline.stages.filters.perceptual import grey_thumbnail

SIDE = 16
WHITE = (255, 255, 255)
UNRESIZED = ImageOptions(resize_mode="no", encode_format="png", encode_quality=1)


def png(depth: int, colour: int, left: bytes, right: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by the specification: bytes of the left and of the right half of each line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0))
    lines = zlib.compress((b"\0" + left + right) * SIDE)
    body = head + b"".join(chunk(*one) for one in extra) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def stored(pixels: Any, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(left: Any, right: Any, dtype: Any) -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE, *np.shape(left)), dtype)
    pixels[:, :8], pixels[:, 8:] = left, right
    return pixels


def tiff(values: np.ndarray) -> bytes:
    return stored(values, "TIFF")


PALETTE = (b"PLTE", bytes([0, 0, 0, 100, 50, 50]))
# The left half is transparent, or as dark as the kind can be; the right half has a known colour.
BODIES: dict[str, tuple[bytes, tuple[int, ...], tuple[int, ...]]] = {
    "grey 8, one transparent value": (png(8, 0, bytes(8), bytes([100]) * 8, (b"tRNS", b"\0\0")), WHITE, (100,) * 3),
    "grey 4, one transparent value": (png(4, 0, bytes(4), b"\x66" * 4, (b"tRNS", b"\0\0")), WHITE, (102,) * 3),
    "grey 2, one transparent value": (png(2, 0, b"\xaa\xaa", b"\x55\x55", (b"tRNS", b"\0\2")), WHITE, (85,) * 3),
    "grey 1, one transparent value": (png(1, 0, b"\xff", b"\0", (b"tRNS", b"\0\1")), WHITE, (0,) * 3),
    "grey 16, one transparent value": (png(16, 0, bytes(16), b"dd" * 8, (b"tRNS", b"\0\0")), WHITE, (100,) * 3),
    "grey 16, a value beside the transparent one": (
        png(16, 0, b"\0\1" * 8, b"dd" * 8, (b"tRNS", b"\0\0")),
        (0,) * 3,
        (100,) * 3,
    ),
    "colour, one transparent value": (png(8, 2, bytes(24), b"d22" * 8, (b"tRNS", bytes(6))), WHITE, (100, 50, 50)),
    "palette with alpha": (png(8, 3, bytes(8), b"\1" * 8, PALETTE, (b"tRNS", b"\0")), WHITE, (100, 50, 50)),
    "grey and alpha": (png(8, 4, bytes(16), b"d\xff" * 8), WHITE, (100,) * 3),
    "16 bits and alpha": (png(16, 6, bytes(64), b"dd2222\xff\xff" * 8), WHITE, (100, 50, 50)),
    "grey 16": (png(16, 0, bytes(16), b"dd" * 8), (0,) * 3, (100,) * 3),
    "half transparent": (png(8, 4, b"\0\x80" * 8, b"d\xff" * 8), (127,) * 3, (100,) * 3),
    "webp with alpha": (
        stored(halves((0, 0, 0, 0), (100, 50, 50, 255), np.uint8), "WEBP", lossless=True, exact=True),
        WHITE,
        (100, 50, 50),
    ),
    "gif with a transparent colour": (
        stored(Image.fromarray(halves(0, 1, np.uint8)).convert("L"), "GIF", transparency=0),
        WHITE,
        (1,) * 3,
    ),
    "tiff with alpha": (stored(halves((0, 0, 0, 0), (100, 50, 50, 255), np.uint8), "TIFF"), WHITE, (100, 50, 50)),
    "16-bit tiff, dark": (tiff(halves(0, 200, np.uint16)), (0,) * 3, (1,) * 3),
    "16-bit tiff": (tiff(halves(0, 25700, np.uint16)), (0,) * 3, (100,) * 3),
    "32-bit tiff of bytes": (tiff(halves(0, 100, np.int32)), (0,) * 3, (100,) * 3),
    "32-bit tiff of 16 bits": (tiff(halves(0, 25700, np.int32)), (0,) * 3, (100,) * 3),
    "float tiff, 0 to 1": (tiff(halves(0, 100 / 255, np.float32)), (0,) * 3, (100,) * 3),
    "float tiff, 0 to 255": (tiff(halves(0, 100, np.float32)), (0,) * 3, (100,) * 3),
    "16-bit pgm, dark": (b"P5 16 16 65535\n" + halves(0, 257, ">u2").tobytes(), (0,) * 3, (1,) * 3),
    "black and white": (stored(Image.fromarray(halves(0, 255, np.uint8)).convert("1"), "PNG"), (0,) * 3, WHITE),
}


@pytest.mark.parametrize("name", BODIES)
def test_refresh_and_readers_see_the_same_pixels(name: str) -> None:
    body, left, right = BODIES[name]
    pixels = decode(body)
    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[8, 2]) == left and tuple(pixels[8, 13]) == right
    refreshed = Image.open(io.BytesIO(transform(body, UNRESIZED).data)).convert("RGB")
    assert np.array_equal(np.asarray(refreshed), pixels)
    assert grey_thumbnail(body) is not None


def test_lab_is_converted_and_not_refused() -> None:
    """CIE 1976: L* = 0 is black, L* = 100 white, and L* = 53.24, a* = 80.09, b* = 67.20 pure red (sRGB)."""
    colours = [(0, 0, 0), (100, 0, 0), (53.24, 80.09, 67.2)]
    image = Image.new("LAB", (3, 1))
    for place, (light, a, b) in enumerate(colours):
        image.putpixel((place, 0), (round(light * 2.55), round(a) + 128, round(b) + 128))
    pixels = decode(stored(image, "TIFF"))
    assert np.abs(pixels[0].astype(int) - [(0, 0, 0), WHITE, (255, 0, 0)]).max() <= 6


@pytest.mark.parametrize("values", [(0, -1), (0, 70000), (0, np.nan), (0, np.inf)])
def test_values_without_an_agreed_white_are_a_reason(values: tuple[float, float]) -> None:
    body = tiff(halves(*values, np.float32))
    with pytest.raises(SampleError, match="no agreed white") as error:
        transform(body, UNRESIZED)
    assert error.value.error_class == "depth"
    with pytest.raises(UnreadableSample, match="no agreed white"):
        decode(body)


@pytest.mark.parametrize("values", [halves(0, 0.5, np.float64), halves((0, 0, 0), (0.5, 0.1, 0.1), np.float32)])
def test_a_tiff_of_unknown_pixels_is_not_called_damaged(values: Any) -> None:
    body = cv2.imencode(".tif", values)[1].tobytes()
    for content, reason in ((body, "depth"), (body[:10], "damaged")):
        with pytest.raises(SampleError) as error:
            transform(content, UNRESIZED)
        assert error.value.error_class == reason


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "AVIF"])
def test_orientation_counts_only_where_a_refresh_is_asked_for_it(kind: str, orientation: int) -> None:
    """The pixels are stored on their side; the tag says how to show them."""
    pixels = cv2.resize(np.random.default_rng(1).integers(0, 255, (3, 4, 3), np.uint8), (64, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = stored(pixels, kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "AVIF") else {}))
    assert np.abs(decode(body).astype(int) - pixels).mean() < 4
    upright = transform(body, ImageOptions(resize_mode="no", encode_format="png", encode_quality=1,
                                           apply_exif_orientation=True))  # fmt: skip
    turn = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2),
            6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip
    expected = turn[orientation](pixels)
    assert (upright.original_height, upright.original_width) == expected.shape[:2]
    found = np.asarray(Image.open(io.BytesIO(upright.data)).convert("RGB"))
    assert np.abs(decode(body, upright=True).astype(int) - expected).mean() < 4
    assert np.abs(found.astype(int) - expected).mean() < 4


def test_a_reader_has_a_limit_of_its_own() -> None:
    body = stored(np.zeros((10, 20, 3), np.uint8), "BMP")
    assert rgb(body, 200).shape == (10, 20, 3)
    with pytest.raises(SampleError, match="20 x 10 pixels"):
        rgb(body, 199)
