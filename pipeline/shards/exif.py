"""EXIF: the tags of a JPEG, PNG, WebP, TIFF or AVIF as text, and the orientation of the image.

Only the block with the tags is read; no pixel is decoded. Tags are untrusted and often damaged: unreadable tags are
left out, and never make the image fail.
"""

import json
import struct
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from PIL import ExifTags, Image

# Damaged files make Pillow's parsers raise all of these.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    RuntimeError,
    Warning,
)
_MAX_TEXT = 1000


def read_exif(body: bytes, kind: str) -> Image.Exif | None:
    """The tags of the first image; empty without tags, None for unreadable ones."""
    exif = Image.Exif()
    try:
        if kind == "avif":
            # Its orientation is a property of the image, not a tag; Pillow states it as one, and does not turn pixels.
            with Image.open(BytesIO(body), formats=("AVIF",)) as image:
                return image.getexif()
        block = _exif_block(body, kind)
        if block:
            exif.load(block)
    except PILLOW_ERRORS:
        return None
    return exif


def _exif_block(body: bytes, kind: str) -> bytes:
    if kind == "tiff":
        return body
    if kind in ("jpeg", "mpo"):
        return _jpeg_exif_block(body)
    if kind not in ("png", "webp"):
        return b""
    order, start, name = (">I4s", 8, b"eXIf") if kind == "png" else ("<4sI", 12, b"EXIF")
    while start + 8 <= len(body):
        first, second = struct.unpack_from(order, body, start)
        length, chunk = (first, second) if kind == "png" else (second, first)
        if chunk == name:
            return body[start + 8 : start + 8 + length]
        # PNG ends a chunk with four bytes of checksum, RIFF pads to an even length.
        start += 8 + length + (4 if kind == "png" else length % 2)
    return b""


def _jpeg_exif_block(body: bytes) -> bytes:
    for marker, start, end in jpeg_segments(body):
        if marker == 0xE1 and body.startswith(b"Exif\0\0", start):
            return body[start:end]
    return b""


def jpeg_segments(body: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker (second byte), start and end of the content of a JPEG's segments, up to the header of its first scan.

    Stops at markers without a length (fill bytes, restart markers): libjpeg may continue there, so the rest is unknown.
    """
    start, marker = 2, 0
    while start + 10 <= len(body) and body[start] == 0xFF and marker != 0xDA:
        marker = body[start + 1]
        if not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return
        end = start + 2 + max(2, (body[start + 2] << 8) + body[start + 3])
        yield marker, start + 4, end
        start = end


def orientation_of(exif: Image.Exif | None) -> int:
    """Orientation 1 to 8 of EXIF 2.32 (tag 0x0112); 1, upright, if it is missing, invalid or unreadable."""
    try:
        value = exif.get(ExifTags.Base.Orientation, 1) if exif else 1
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def exif_json(exif: Image.Exif | None) -> str | None:
    """The tags as a JSON object of strings; keys are img2dataset's: "Image Make", "EXIF FNumber", "GPS GPSDate"."""
    if exif is None:
        return None
    if not exif:
        return "{}"
    try:
        groups = (
            ("Image", exif, ExifTags.TAGS),
            ("EXIF", exif.get_ifd(ExifTags.IFD.Exif), ExifTags.TAGS),
            ("GPS", exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS),
        )
        tags = {
            f"{group} {names[tag]}": text
            for group, values, names in groups
            for tag, value in values.items()
            if tag in names and (text := _exif_text(value)) is not None
        }
    except PILLOW_ERRORS:
        return None
    return json.dumps(tags)


def _exif_text(value: Any) -> str | None:
    """One value as text; None for binary values (maker notes, thumbnails) and for very long ones."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").rstrip("\0")
    if isinstance(value, tuple):
        parts = [_exif_text(part) for part in value[:_MAX_TEXT]]
        value = "[" + ", ".join(part or "" for part in parts) + "]"
    elif hasattr(value, "numerator") and not isinstance(value, int | float):
        value = str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    text = str(value).strip("\0 \t\r\n")
    return text if len(text) <= _MAX_TEXT and text.isprintable() else None
