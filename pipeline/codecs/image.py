"""The codec of images: checked, resized and re-encoded as img2dataset does, see :mod:`image_encoding`."""

from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar

from pipeline.codecs.codec import Codec, Encoded
from pipeline.codecs.image_annotations import fitted_members
from pipeline.codecs.image_encoding import ImageOptions, transform
from pipeline.shards.media import IMAGE
from pipeline.shards.pixels import MAX_PIXELS, Pixels, read_header, rgb
from pipeline.shards.segments import Segment
from pipeline.sources.source import Scalar

BYTES_PER_PIXEL = 12  # enough for an RGB image in Pillow, in NumPy and on the way between them
# The work of these decoders (libjpeg-turbo, libpng, libwebp) is bounded by the checks before them (bytes, pixels,
# passes over the pixels), and they have been fuzzed for a decade. Pillow decodes the others, a few in a thousand
# images of the web.
_IN_PLACE = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")


class ImageCodec(Codec[ImageOptions, Pixels]):
    """See :class:`~pipeline.codecs.codec.Codec`; the columns are img2dataset's."""

    medium: ClassVar[str] = "image"
    options: ClassVar[type] = ImageOptions
    limit: ClassVar[str] = "--max-pixels"
    columns: ClassVar[Mapping[str, type]] = {
        "width": int,
        "height": int,
        "original_width": int,
        "original_height": int,
        "exif": str,
    }

    def encode(self, body: bytes, options: ImageOptions, segment: Segment | None = None) -> Encoded:
        """One field; error classes are those of :func:`~pipeline.codecs.image_encoding.transform`."""
        image = transform(body, options)
        return Encoded({image.format: image.data}, {name: getattr(image, name) for name in self.columns})

    def decode(self, body: bytes) -> Pixels:
        """uint8 [H, W, 3], red-green-blue, on white, as stored."""
        return rgb(body, MAX_PIXELS)

    def needs_care(self, body: bytes) -> bool:
        """Whether ``body`` has a format that only Pillow decodes."""
        return not body.startswith(_IN_PLACE) and IMAGE.starts(body)

    def memory(self, options: ImageOptions) -> int:
        """A file of 300 bytes may claim any size, and some decoders need 20 bytes for each pixel."""
        return BYTES_PER_PIXEL * options.max_pixels

    def accepts_all(self, options: ImageOptions) -> bool:
        """With ``disable_all_reencoding``."""
        return options.disable_all_reencoding

    def measured(self, body: bytes) -> Mapping[str, Scalar]:
        """The size that the header states, where it can be read without a process apart."""
        with suppress(Exception):  # the sample boundary, as for decoding
            if not self.needs_care(body):
                header = read_header(body)
                return {"original_width": header.width, "original_height": header.height}
        return {}

    def fitted(self, members: Mapping[str, bytes], part: Encoded, options: ImageOptions) -> Mapping[str, bytes]:
        """Boxes must be in pixels of the image as encoded; a mask is resized, cropped and padded with the image."""
        return fitted_members(members, part, options)
