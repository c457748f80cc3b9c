"""The protocol of a codec: bytes of one medium become fields of a sample and columns of its row, and arrays again.

A codec is the class ``<Medium>Codec`` in ``pipeline/codecs/<medium>.py``, with its options beside it. Where a refresh
meets a part of a row, it calls nothing but these methods. Bodies are hostile: a codec checks every limit before it
allocates. All methods are pure and thread-safe.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from pipeline.shards.segments import Segment
from pipeline.sources.source import Scalar

Options = TypeVar("Options", contravariant=True)
Decoded = TypeVar("Decoded", covariant=True)


class Encoded(NamedTuple):
    """The result of :meth:`Codec.encode`: the fields of the sample, by ending, and the values of :attr:`Codec.columns`.

    ``fields`` may have more than the part itself; its first field is the part.
    """

    fields: Mapping[str, bytes]
    columns: Mapping[str, Scalar]


class Codec(Protocol[Options, Decoded]):
    """Encodes and decodes one medium; a class that derives from this one has the defaults below.

    The module imports its decoding libraries where they are used, since every job reads its options.
    """

    medium: ClassVar[str]
    """Name of the medium in :data:`pipeline.shards.media.MEDIA`, and of the module."""
    options: ClassVar[type]
    """A frozen, keyword-only dataclass; its fields are flags. All but those of images begin with the medium's name
    (``audio_rate``)."""
    limit: ClassVar[str]
    """The flag that bounds :meth:`memory`, for messages: ``--max-pixels``."""
    columns: ClassVar[Mapping[str, type]]
    """Name and Python type (str, int, float, bool) of the columns in the parquet file and in the sample's json. All but
    those of images begin with the medium's name (``audio_seconds``)."""

    def encode(self, body: bytes, options: Options, segment: Segment | None = None) -> Encoded:
        """Check, decode, convert and encode one body, or only a segment of a sound or video.

        Raises:
            SampleError: status "failed_to_resize"; few and fixed classes and messages, for counting.
        """
        ...

    def decode(self, body: bytes) -> Decoded:
        """The part of a sample for a reader: an image as uint8 [H, W, 3]; another medium says its shape and range.

        Raises:
            SampleError: as :meth:`encode`.
        """
        ...

    def needs_care(self, body: bytes) -> bool:
        """Whether ``body`` is encoded in a process apart, because its decoder may hang or crash."""
        return True

    def memory(self, options: Options) -> int:
        """Largest number of bytes that :meth:`encode` allocates besides the body; the process apart is held to it."""
        ...

    def seconds(self, options: Options) -> float:
        """Most CPU time for a body in the process apart, in seconds."""
        return 10.0

    def load(self) -> None:
        """Import the decoding libraries; the process apart does so before its memory is limited."""

    def accepts_all(self, options: Options) -> bool:
        """Whether bodies are stored unchecked, whatever they are."""
        return False

    def measured(self, body: bytes) -> Mapping[str, Scalar]:
        """Columns for the row of a body that failed, from its header; runs outside of the process apart."""
        return {}

    def fitted(self, members: Mapping[str, bytes], part: Encoded, options: Options) -> Mapping[str, bytes]:
        """Other members of the sample, fitted to the encoded part: boxes, masks and what else is measured in it.

        Raises:
            SampleError: a member does not fit the part.
        """
        return members

    def fitted_columns(self, columns: Mapping[str, Any], part: Encoded) -> Mapping[str, Any]:
        """Columns of the row that change with the encoded part, such as times in it.

        Raises:
            SampleError: a column does not fit the part.
        """
        return {}


AnyCodec = Codec[Any, Any]
