"""Kinds of sounds, by their first bytes, and what their headers say."""

from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.errors import SampleError

Samples = npt.NDArray[np.float32]

FFMPEG_KINDS = ("mp3", "mp4", "aac", "matroska", "avi", "mpeg", "asf", "flv")
"""Kinds that FFmpeg decodes; its formats have the same names."""
RATES = (1_000, 384_000)
MOST_CHANNELS = 64

_IMAGE_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix")
_SIGNATURES = {
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\0\0\1\xba": "mpeg",  # MPEG-1 and MPEG-2 program streams
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",  # Windows Media
    b"FLV\1": "flv",
}
_FORMS = {
    (b"RIFF", b"WAVE"): "wav",
    (b"RF64", b"WAVE"): "wav",
    (b"RIFF", b"AVI "): "avi",
    (b"FORM", b"AIFF"): "aiff",
    (b"FORM", b"AIFC"): "aiff",
}


@dataclass(frozen=True, slots=True)
class SoundHeader:
    """Header of a sound. ``seconds`` is what the header claims; None where it says nothing.

    ``exact`` is False where the length is estimated from the mean bit rate, or is that of a whole video.
    """

    kind: str
    sample_rate: int
    channels: int
    seconds: float | None
    exact: bool = True


def kind_of(start: bytes) -> str:
    """The kind by the first bytes (16 or more): flac, wav, ogg, aiff, one of ``FFMPEG_KINDS``; "" for others.

    An ID3 tag counts as mp3.

    >>> kind_of(b"fLaC" + bytes(12)), kind_of(b"<html>")
    ('flac', '')
    """
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if start[4:8] == b"ftyp":
        return "" if start[8:12] in _IMAGE_BRANDS else "mp4"
    if start[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime from before brands
        return "mp4"
    return _FORMS.get((start[:4], start[8:12]), "") or _mpeg_kind(start)


def file_kind(file: BinaryIO) -> str:
    """The kind of a file, also behind an ID3 tag; the file is then at its start again.

    Raises:
        SampleError: error classes empty, not_a_sound.
    """
    file.seek(0)
    start = file.read(16)
    if not start:
        bad_sound("empty", "empty body")
    kind = kind_of(start)
    if start.startswith(b"ID3") and len(start) >= 10:
        file.seek(10 + sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(start[6:10])))
        kind = kind_of(file.read(16)) or "mp3"
    file.seek(0)
    return kind or bad_sound("not_a_sound", "not a sound of a known kind")


def _mpeg_kind(start: bytes) -> str:
    """MP3 or AAC (ADTS) by the header of the first frame."""
    if len(start) < 4 or start[0] != 0xFF or start[1] & 0xE0 != 0xE0:
        return ""
    layer, bit_rate, sample_rate = start[1] & 0x06, start[2] & 0xF0, start[2] & 0x0C
    if layer == 0:
        return "aac" if start[1] & 0xF0 == 0xF0 else ""
    return "mp3" if bit_rate != 0xF0 and sample_rate != 0x0C else ""


def bad_sound(error_class: str, message: str) -> NoReturn:
    """Raise the error of a bad sound; messages are few and fixed, for counting."""
    raise SampleError("failed_to_resize", error_class, f"Sound decoding error: {message}")
