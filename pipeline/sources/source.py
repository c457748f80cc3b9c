"""The protocol of a source: rows of raw input in a fixed order, cut into slices that become shards.

The driver plans a source once; workers on other nodes read it many times. A :class:`Slice` holds everything needed to
find its rows again, and a digest of their content. The digest changes with the input, so a shard of the old rows is
never taken for a shard of the new ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

from pipeline.errors import SampleError
from pipeline.shards.media import MEDIA
from pipeline.shards.sample import joined_fields
from pipeline.shards.storage import Folder

UNCHANGED: Mapping[str, Any] = {"resize_mode": "no", "keep_bytes": True}
"""Image options that store images byte for byte, checked by decoding: existing data, or data with boxes in pixels."""

SOUND_UNCHANGED: Mapping[str, Any] = {
    "audio_rate": 0,
    "audio_stereo": True,
    "audio_seconds": 3_600.0,
    "audio_min_loudness": -120.0,
    "audio_keep_bytes": True,
}
"""Audio options that store sounds byte for byte, checked by decoding."""

VIDEO_UNCHANGED: Mapping[str, Any] = {"video_size": 0, "video_seconds": 600.0, "video_keep_bytes": True}
"""Video options that store videos byte for byte, checked by decoding."""

Scalar = str | int | float | bool | None


class TimedCaption(TypedDict):
    """A caption of a part of a video or sound, from ``start`` to ``end`` in seconds of the clip."""

    start: float
    end: float
    text: str


Cell = Scalar | list[str] | list[TimedCaption]
"""A value of a row's column: several captions or labels are a list, and so are timed captions."""


def is_hidden(path: str) -> bool:
    """Whether a file is one that tools put beside the data: below a name with a dot (``.ipynb_checkpoints``), or in the
    ``__MACOSX`` of an unpacked archive."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a row: an image, a sound.

    ``body`` are its encoded bytes, if the source has them; where it is ``None`` the downloader fetches ``url``.
    ``expected`` is the required digest ("sha256:0123...") of the body at ``url``; None = any.
    """

    medium: str
    body: bytes | None = None
    url: str = ""
    expected: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of input.

    - ``url``: address or path that names the row; that of its first part, if it has one.
    - ``parts``: at most one for each medium of the source. Without parts the sample consists of
      ``members`` alone.
    - ``columns``: written to the parquet file and to the sample's json.
    - ``members``: further fields of the sample, written unchanged.
    - ``problem``: set where the source could not read the row.
    """

    url: str
    caption: str | None = None
    parts: tuple[Part, ...] = ()
    columns: Mapping[str, Cell] = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)
    problem: SampleError | None = None

    def body(self, medium: str) -> bytes | None:
        """The bytes of the part of a medium; ``None`` where the row has none, or they are to be downloaded."""
        return next((part.body for part in self.parts if part.medium == medium), None)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The rows that become one shard.

    ``digest`` is the SHA-256 (hex) of the content that :meth:`Source.rows` yields for it; ``where`` is plain JSON.
    """

    count: int
    digest: str
    where: Mapping[str, str | int]


@runtime_checkable
class Classed(Protocol):
    """A source that knows the classes of its boxes; the snapshot stores them in its options, as ``classes``."""

    @property
    def classes(self) -> Mapping[str, str]:
        """Class name to group (r, c or f of LVIS; base or novel; or empty), in the order of the classes."""
        ...


def fetches(source: "Source") -> bool:
    """Whether the parts are downloaded. A source that is a part of another one has it as ``base``."""
    return bool(getattr(getattr(source, "base", source), "downloads", False))


def media_of(source: "Source") -> tuple[str, ...]:
    """The media of the rows' parts, an image unless the source says otherwise; empty for rows without parts.

    The source chooses the first one; the others are in the order of :data:`~pipeline.shards.media.MEDIA`.
    """
    given = tuple(getattr(getattr(source, "base", source), "media", ("image",)))
    return given[:1] + tuple(medium for medium in MEDIA if medium in given[1:])


def contents_of(row: Row) -> tuple[bytes | None, ...]:
    """The contents that a row's digests cover: the body of each part, or all members if the row has no parts.

    ``None`` where a body is not downloaded yet.
    """
    return tuple(part.body for part in row.parts) or (joined_fields(row.members),)


class Source(Protocol):
    """Rows of one kind of input: a frozen, picklable dataclass whose fields are options of the command line.

    The module's name is the ``kind``, with ``_`` for ``-``; there is no registry. Further class variables are optional:

    - ``summary``: one line of help. A source with a summary is a preset of jobs/refresh_dataset.py.
    - ``media``: the media of the rows' parts, ``("image",)`` by default; the first one has the columns of the row
      itself. Empty where rows have no parts; the samples then consist of ``members``, without a download.
    - ``image_options``, ``audio_options``, ...: the preset's defaults of the options of that medium's codec, by name.
    - ``downloads``: True where parts without bytes are downloaded; the servers' validators are then stored.
    - ``label_field``: the member with the labels of pixels, ``mask.png`` or ``boxes.json``.
    """

    kind: ClassVar[str]

    @property
    def has_captions(self) -> bool:
        """Whether the rows have captions, and the samples a ``txt`` field."""
        ...

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """Cut the input into slices of at most ``rows_per_shard`` rows, always the same way.

        ``scratch`` is a folder that workers can read too; a source may write a random-access copy of its rows there.

        Raises:
            SettingError: the input is missing or empty, or lacks a requested column.
        """
        ...

    def rows(self, piece: Slice) -> Iterator[Row]:
        """The rows of a slice, in order: exactly ``piece.count``, each valid or with a ``problem``."""
        ...

    def schema(self) -> Mapping[str, type]:
        """Names and types of the rows' ``columns``; ``list`` is a list of texts, ``TimedCaption`` a list of these."""
        ...
