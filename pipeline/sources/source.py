"""What a source is: rows of raw input in a fixed order, cut into slices that become shards.

A source is planned once, by the driver, and read many times, by workers on other nodes. So a :class:`Slice` says all
that is needed to find its rows again, and carries a digest of what they will be: when the input changes, the digest
does, and a shard made from the old rows is not mistaken for one made from the new.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from pipeline.errors import SampleError
from pipeline.shards.sample import joined_fields
from pipeline.shards.storage import Folder

UNCHANGED: Mapping[str, Any] = {"resize_mode": "no", "skip_reencode": True}
"""Image options of a source whose images are stored as they are: they are ready, or boxes are measured in them."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of input.

    ``url`` says where the image is or was. ``image`` holds its encoded bytes where the source has them; where it is
    ``None`` the downloader fetches ``url``, unless the source has no images: ``members`` alone make the sample then.
    ``columns`` go into the parquet file and the sample's json; ``members`` are further fields of the sample, written
    as they are. ``problem`` is set where the source could not read the row. ``expected`` is the digest
    ("sha256:0123...") that the body at ``url`` has to have; None for any.
    """

    url: str
    caption: str | None = None
    image: bytes | None = None
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)
    problem: SampleError | None = None
    expected: str | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The rows that become one shard.

    ``digest`` is the SHA-256 hex of what :meth:`Source.rows` will give for it; ``where`` is plain JSON.
    """

    count: int
    digest: str
    where: Mapping[str, str | int]


@runtime_checkable
class Classed(Protocol):
    """A source that knows the classes of its boxes; the snapshot keeps them among its options, as ``classes``."""

    @property
    def classes(self) -> Mapping[str, str]:
        """Names and groups (LVIS's r, c and f; base and novel; or empty), in the classes' order."""
        ...


def fetches(source: "Source") -> bool:
    """Whether the rows' images are to be downloaded; a source may stand for a part of another, its ``base``."""
    return bool(getattr(getattr(source, "base", source), "downloads", False))


def has_images(source: "Source") -> bool:
    """Whether the rows have images, at hand or to be downloaded; a source may stand for a part of its ``base``."""
    return bool(getattr(getattr(source, "base", source), "has_images", True))


def content_of(source: "Source", row: Row) -> bytes | None:
    """What the digest of a row covers: its image, or all members where the source has no images.

    ``None`` where the image is still to be downloaded.
    """
    return row.image if has_images(source) else joined_fields(row.members)


class Source(Protocol):
    """Rows of one kind of input. Frozen dataclasses whose fields are the command line's options; they pickle.

    The module has the name of the ``kind``, with ``_`` for ``-``; nothing else lists it. Further class variables are
    optional:

    - ``summary``: one line of help. A source that has it is a preset of jobs/refresh_dataset.py.
    - ``image_options``: the preset's defaults of :class:`~pipeline.stages.crawl.images.ImageOptions`, by name.
    - ``downloads``: True where rows without image bytes are downloaded, so that servers' validators are kept.
    - ``has_images``: False where rows have no image; their ``members`` become the sample, and nothing is fetched.
    """

    kind: ClassVar[str]

    @property
    def has_captions(self) -> bool:
        """Whether the rows have captions, and the samples a ``txt`` field."""
        ...

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """Cut the input into slices of at most ``rows_per_shard`` rows, always the same way.

        ``scratch`` is a folder that workers can read too; a source may leave a random-access copy of its rows there.

        Raises:
            SettingError: the input is missing, empty or has not the columns asked for.
        """
        ...

    def rows(self, piece: Slice) -> Iterator[Row]:
        """The rows of a slice, in order; exactly ``piece.count`` of them, good or with a ``problem``."""
        ...

    def schema(self) -> Mapping[str, type]:
        """Names and Python types of the rows' ``columns``."""
        ...
