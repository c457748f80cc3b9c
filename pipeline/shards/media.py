"""Media of the parts of a sample: endings of their fields, MIME types, and the first bytes of their formats.

A sample has at most one part of each medium, stored as a member of the tar whose ending names the format: ``jpg``,
``flac``. ``pipeline/codecs/<name>.py`` encodes and decodes a medium. The first bytes alone decide what a body may be,
never its name or its Content-Type.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import require

ENOUGH = 16
"""Number of first bytes that identify every known format."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A medium. ``kinds`` are its formats, each with its endings; shards use the first ending.

    ``other_files`` are endings of files that hold the medium where a source is told so, but not of fields.
    ``mime`` is the MIME type of each kind. ``starts`` says whether a body with these first bytes (at least ``ENOUGH``)
    may be of the medium. ``noun`` names one part in messages, ``mismatch`` is the error class of a body of another
    medium.
    """

    name: str
    noun: str
    mismatch: str
    kinds: Mapping[str, tuple[str, ...]]
    mime: Mapping[str, str]
    starts: Callable[[bytes], bool]
    other_files: tuple[str, ...] = ()

    @property
    def endings(self) -> tuple[str, ...]:
        """All endings; a sample's part is the first of these fields that it has."""
        return _ENDINGS[self.name]

    def field_of(self, fields: Mapping[str, object]) -> str | None:
        """The field of ``fields`` with the part of this medium; None where there is none."""
        return next((ending for ending in self.endings if ending in fields), None)

    def mime_of(self, ending: str) -> str:
        """The MIME type of a field of this medium."""
        return next(self.mime[kind] for kind, endings in self.kinds.items() if ending in endings)


_IMAGE_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cjP  ",
)
_AUDIO_STARTS = (b"fLaC", b"OggS", b"ID3")
# Major brands of MP4 files with sound; AVIF and HEIF, which are images, have others.
_MP4_BRANDS = (b"M4A ", b"M4B ", b"mp41", b"mp42", b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"dash", b"qt  ")


def _starts_like_an_image(start: bytes) -> bool:
    if start.startswith(_IMAGE_STARTS):
        return True
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"mif1")
    return start[:1] == b"P" and start[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and start[2:3].isspace()


def _starts_like_audio(start: bytes) -> bool:
    if start.startswith(_AUDIO_STARTS):
        return True
    if start.startswith((b"RIFF", b"RF64")):
        return start[8:12] == b"WAVE"
    if start.startswith(b"FORM"):
        return start[8:12] in (b"AIFF", b"AIFC")
    if start[4:8] == b"ftyp":
        return start[8:12] in _MP4_BRANDS
    return _is_mpeg_frame(start)


# Major brands of ISO files with images or with sound alone.
_VIDEO_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska and WebM
    b"\0\0\1\xba",  # program streams of MPEG
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # Windows Media
    b"FLV\1",
)
_NO_VIDEO_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"M4A ", b"M4B ")


def _starts_like_a_video(start: bytes) -> bool:
    if start[4:8] == b"ftyp":
        return start[8:12] not in _NO_VIDEO_BRANDS
    if start.startswith(_VIDEO_STARTS):
        return True
    # AVI; QuickTime files from before brands begin with one of its atoms.
    return (start.startswith(b"RIFF") and start[8:12] == b"AVI ") or start[4:8] in (b"moov", b"mdat", b"wide")


def _starts_like_points(start: bytes) -> bool:
    if start.startswith((b"\x93NUMPY", b"ply\n", b"ply\r")):
        return True
    return start.lstrip(b"STCN").startswith(b"OFF")


def _is_mpeg_frame(start: bytes) -> bool:
    """Whether a frame header of MP3 (MPEG 1, 2 or 2.5, layers I to III) or of AAC (ADTS) stands at the start."""
    if len(start) < 4 or start[0] != 0xFF:
        return False
    if start[1] & 0xF6 == 0xF0:  # ADTS: the layer is 0
        return start[2] >> 2 & 0x0F < 13
    version, layer = start[1] >> 3 & 3, start[1] >> 1 & 3
    synchronised = start[1] & 0xE0 == 0xE0 and version != 1 and layer != 0
    return synchronised and start[2] >> 4 != 15 and start[2] >> 2 & 3 != 3


IMAGE = Medium(
    name="image",
    noun="an image",
    mismatch="not_a_picture",
    kinds={
        "jpeg": ("jpg", "jpeg", "jpe", "jfif"),
        "png": ("png", "apng"),
        "webp": ("webp",),
        "gif": ("gif",),
        "bmp": ("bmp", "dib"),
        "tiff": ("tif", "tiff"),
        "avif": ("avif", "avifs"),
        "jpeg2000": ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
        "ppm": ("ppm", "pgm", "pbm", "pnm"),
        "mpo": ("jpg", "mpo"),
    },
    mime={
        "jpeg": "image/jpeg",
        "png": "image/png",
        "webp": "image/webp",
        "gif": "image/gif",
        "bmp": "image/bmp",
        "tiff": "image/tiff",
        "avif": "image/avif",
        "jpeg2000": "image/jp2",
        "ppm": "image/x-portable-anymap",
        "mpo": "image/jpeg",
    },
    starts=_starts_like_an_image,
)
AUDIO = Medium(
    name="audio",
    noun="a sound",
    mismatch="not_a_sound",
    kinds={
        "flac": ("flac",),
        "wav": ("wav", "wave"),
        "ogg": ("ogg", "oga", "opus"),
        "mp3": ("mp3",),
        "mp4": ("m4a", "m4b"),
        "aac": ("aac",),
        "aiff": ("aiff", "aif", "aifc"),
    },
    mime={
        "flac": "audio/flac",
        "wav": "audio/wav",
        "ogg": "audio/ogg",
        "mp3": "audio/mpeg",
        "mp4": "audio/mp4",
        "aac": "audio/aac",
        "aiff": "audio/aiff",
    },
    starts=_starts_like_audio,
)
VIDEO = Medium(
    name="video",
    noun="a video",
    mismatch="not_a_video",
    kinds={
        "mp4": ("mp4", "m4v", "mov"),
        "webm": ("webm",),
        "matroska": ("mkv",),
        "avi": ("avi",),
        "mpeg": ("mpg", "mpeg"),
        "asf": ("wmv", "asf"),
        "flv": ("flv",),
    },
    mime={
        "mp4": "video/mp4",
        "webm": "video/webm",
        "matroska": "video/x-matroska",
        "avi": "video/x-msvideo",
        "mpeg": "video/mpeg",
        "asf": "video/x-ms-asf",
        "flv": "video/x-flv",
    },
    starts=_starts_like_a_video,
)
POINTS = Medium(
    name="points",
    noun="a point cloud",
    mismatch="not_a_cloud",
    # Not .npy alone: members of that name are features and other arrays.
    kinds={"npy": ("points.npy",), "ply": ("ply",), "off": ("off",)},
    mime={"npy": "application/x-npy", "ply": "model/ply", "off": "model/off"},
    starts=_starts_like_points,
    other_files=("npy",),
)
MEDIA: Mapping[str, Medium] = {medium.name: medium for medium in (IMAGE, AUDIO, VIDEO, POINTS)}
"""All media by name; the order is that of the parts of a sample."""
_ENDINGS = {
    medium.name: tuple(dict.fromkeys(ending for endings in medium.kinds.values() for ending in endings))
    for medium in MEDIA.values()
}


def check_media(given: tuple[str, ...]) -> None:
    """Raise ``SettingError`` unless ``given`` is the field ``media`` of a source: one medium or more, each once."""
    known = bool(given) and all(medium in MEDIA for medium in given) and len(set(given)) == len(given)
    require(known, "media", given, "some of " + ", ".join(MEDIA) + ", each once")


def part_column(medium: str, name: str) -> str:
    """The column ``name`` (url, sha256, error_class, ...) of a part other than the row's first: ``audio_url``."""
    return f"{medium}_{name}"


def media_of_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The media of rows with several parts, by the columns of their parquet file; empty for rows with one part."""
    known = set(names)
    return tuple(medium for medium in MEDIA if part_column(medium, "error_class") in known)


def reason_of(row: Mapping[str, Any], media: Iterable[str]) -> str:
    """The reason of a failed row for counting: its error class, with the medium of the first part that failed."""
    failed = ((medium, row.get(part_column(medium, "error_class"))) for medium in media)
    return next((f"{medium}:{error_class}" for medium, error_class in failed if error_class), row["error_class"])


def medium_of(field: str) -> Medium | None:
    """The medium of a field by its ending; None for text, json and annotations."""
    return next((medium for medium in MEDIA.values() if field in medium.endings), None)
