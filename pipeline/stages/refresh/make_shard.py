"""Make one shard: read its rows, download, transform, and write in the order of the input.

Runs in one process; Ray only schedules the units. Downloads run in their own thread while images are decoded here.
Output is in order: rows that finish before a slow row are held in memory.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.errors import SampleError
from pipeline.shards.label_values import MASK_FIELD
from pipeline.shards.objects import FIELD as BOXES
from pipeline.shards.pixels import read_header
from pipeline.shards.media import IMAGE
from pipeline.shards.sample import Sample, sample_key, shard_name
from pipeline.shards.storage import Folder
from pipeline.shards.text import storable
from pipeline.shards.writer import ShardStats, ShardWriter, parquet_schema, read_stats
from pipeline.sources.source import UNCHANGED, Row, Scalar, Source, content_of, fetches, has_images
from pipeline.stages.crawl.decode_apart import Apart, needs_care
from pipeline.stages.crawl.download import Download, DownloadOptions, KnownBody, digest, download_all
from pipeline.codecs.image_encoding import EncodedImage, ImageOptions, transform
from pipeline.stages.crawl.masks import fitted_mask
from pipeline.stages.refresh.plan import Unit

ARROW_TYPES: Mapping[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Inputs and options of a shard."""

    images: ImageOptions = field(default_factory=ImageOptions)
    downloads: DownloadOptions = field(default_factory=DownloadOptions)
    number_sample_per_shard: int = 10_000


AS_IT_IS = ShardOptions(images=ImageOptions(**UNCHANGED))
"""Images are stored byte for byte as in the source; those that cannot be decoded fail."""


def make_shard(unit: Unit, source: Source, folder: Folder, options: ShardOptions) -> ShardStats:
    """Make the shard of ``unit`` in ``folder``, or return the stats of the finished shard.

    Raises:
        StorageError: the disk is full or the store failed.
    """
    done = read_stats(folder, shard_name(unit.shard_id))
    if done is not None and done.unit == unit.digest:
        return done
    maker = _Maker(unit, source, options)
    with maker.apart, ShardWriter(folder, unit.shard_id, maker.schema, unit.digest) as writer:
        for row, sample in maker.finished():
            writer.add(row, sample)
        return writer.commit()


@dataclass(frozen=True, slots=True)
class _Body:
    content: bytes
    digest: str | None
    http_status: int | None = None
    attempts: int = 0
    validators: Mapping[str, str | None] = field(default_factory=dict)

    @staticmethod
    def of(fetched: Download) -> "_Body":
        validators = {"last_modified": fetched.last_modified, "etag": fetched.etag}
        return _Body(fetched.body, fetched.digest, fetched.http_status, fetched.attempts, validators)


class _Maker:
    """Turns the rows of one unit into parquet rows and samples."""

    def __init__(self, unit: Unit, source: Source, options: ShardOptions) -> None:
        self._unit, self._source, self._options = unit, source, options
        self._hash = options.downloads.compute_hash
        self._imaged = has_images(source)
        self.apart = Apart(options.images)
        columns: dict[str, pa.DataType] = {name: ARROW_TYPES[kind] for name, kind in source.schema().items()}
        if source.has_captions:
            columns["caption"] = pa.string()
        self.schema = parquet_schema({**columns, "url": pa.string()}, self._hash)
        if fetches(source):
            # The server's validators of this version of the image, for the next refresh.
            for name in ("last_modified", "etag"):
                self.schema = self.schema.append(pa.field(name, pa.string()))

    def finished(self) -> Iterator[tuple[dict[str, Any], Sample | None]]:
        """The parquet row and the sample of every input row, in order."""
        ahead: dict[int, tuple[dict[str, Any], Sample | None]] = {}
        following = 0
        for index, row, body in self._bodies():
            ahead[index] = self._finish(index, row, body)
            while following in ahead:
                yield ahead.pop(following)
                following += 1

    def _bodies(self) -> Iterator[tuple[int, Row, _Body | SampleError]]:
        """Every row with its image's bytes; rows with images first, then the downloads in order of completion.

        Where the source has no images, the bytes are those of the members.
        """
        waiting: dict[int, Row] = {}
        for index, row in enumerate(self._source.rows(self._unit.piece)):
            content = content_of(self._source, row)
            if row.problem is not None:
                yield index, row, row.problem
            elif not self._imaged and not row.members:
                yield index, row, SampleError("failed_to_resize", "empty", "the row has no members")
            elif content is not None:
                yield index, row, _Body(content, digest(content, self._hash))
            else:
                waiting[index] = row
        requests = [(index, row.url, KnownBody(expected=row.expected)) for index, row in waiting.items()]
        if not requests:
            return
        downloads = self._options.downloads
        if self._options.images.disable_all_reencoding:
            downloads = replace(downloads, pictures_only=False)
        for index, result in download_all(requests, downloads):
            yield index, waiting.pop(index), result if isinstance(result, SampleError) else _Body.of(result)

    def _finish(self, index: int, row: Row, body: _Body | SampleError) -> tuple[dict[str, Any], Sample | None]:
        key = sample_key(self._unit.shard_id, index, self._options.number_sample_per_shard)
        record: dict[str, Any] = {name: clean_value(value) for name, value in row.columns.items()}
        if self._source.has_captions:
            record["caption"] = clean_caption(row.caption)
        record |= {"url": storable(row.url), "key": key}
        try:
            if isinstance(body, SampleError):
                raise body
            image = self._image(body.content) if self._imaged else None
            if image is not None:
                _refuse_stale_boxes(row, image)
                _refuse_other_images(row, image)
                row = self._with_fitted_mask(row, image)
        except SampleError as error:
            return self._failed(record, error, body), None
        record |= self._described(image, body.digest)
        # The validators and the attempts are not in the sample, whose bytes do not depend on the server.
        of_server = {**body.validators, **({"attempts": body.attempts} if body.attempts else {})}
        return {**record, **of_server}, self._sample(key, row, record, image)

    def _image(self, content: bytes) -> EncodedImage:
        try:
            if needs_care(content):
                return self.apart.transform(content)
            return transform(content, self._options.images)
        except SampleError:
            raise
        except Exception as error:
            # The sample boundary: decoders raise arbitrary exceptions on hostile input, and must fail one row only.
            raise SampleError("failed_to_resize", "decode", f"Image decoding error: {error}") from error

    def _with_fitted_mask(self, row: Row, image: EncodedImage) -> Row:
        mask = row.members.get(MASK_FIELD)
        if mask is None:
            return row
        return replace(row, members={**row.members, MASK_FIELD: fitted_mask(mask, image, self._options.images)})

    def _failed(self, record: dict[str, Any], error: SampleError, body: _Body | SampleError) -> dict[str, Any]:
        return {
            **record,
            "status": error.status,
            "error_message": error.message,
            "error_class": error.error_class,
            # Of the download, also where what came by it was no good.
            "http_status": body.http_status,
            "attempts": body.attempts,
            **(_original_size(body.content) if self._imaged and isinstance(body, _Body) else {}),
        }

    def _described(self, image: EncodedImage | None, digest: str | None) -> dict[str, Any]:
        described: dict[str, Any] = {"status": "success", "error_message": None}
        for name in ("width", "height", "original_width", "original_height", "exif") if image else ():
            described[name] = getattr(image, name)
        if self._hash:
            described[self._hash] = digest
        return described

    def _sample(self, key: str, row: Row, record: Mapping[str, Any], image: EncodedImage | None) -> Sample:
        fields = dict(row.members)
        if image is not None:
            fields[image.format] = image.data
        if self._source.has_captions:
            fields["txt"] = (record["caption"] or "").encode()
        fields["json"] = _flat_json(record)
        return Sample(key, fields)


def _original_size(content: bytes) -> dict[str, int]:
    """The columns of the size that an image's header states, where it can be read without a process apart."""
    with suppress(Exception):  # the sample boundary, as for decoding
        if not needs_care(content):
            header = read_header(content)
            return {"original_width": header.width, "original_height": header.height}
    return {}


def clean_value(value: Scalar) -> Scalar:
    """The value of a column as it can be stored: texts as captions, numbers and booleans as they are."""
    return storable(value) if isinstance(value, str) else value


def _flat_json(record: Mapping[str, Any]) -> bytes:
    """``json.dumps(record, indent=4)`` of a flat dict, in a fifth of the time.

    The standard library's fast encoder does not indent, but takes any separator. JSON has no NaN and no infinity:
    null stands for both.
    """
    try:
        flat = json.dumps(record, separators=(",\n    ", ": "), allow_nan=False)
    except ValueError:
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in record.items()}
        flat = json.dumps(finite, separators=(",\n    ", ": "))
    return b"{\n    " + flat[1:-1].encode() + b"\n}"


def _refuse_stale_boxes(row: Row, image: EncodedImage) -> None:
    """Reject resized images with boxes, which are in pixels of the original image."""
    if BOXES in row.members and (image.width, image.height) != (image.original_width, image.original_height):
        message = f"{BOXES} would not fit the resized image; use --resize-mode no"
        raise SampleError("failed_to_resize", "stale_annotation", message)
    measured = _measured_in(row.members.get(BOXES))
    if measured is not None and measured != (image.width, image.height):
        sizes = f"{measured[0]} x {measured[1]} pixels, the image has {image.width} x {image.height}"
        turned = measured == (image.height, image.width)
        advice = "; if it is displayed turned, use --apply-exif-orientation" if turned else ""
        message = f"{BOXES} is measured in {sizes}{advice}"
        raise SampleError("failed_to_resize", "stale_annotation", message)


def _refuse_other_images(row: Row, image: EncodedImage) -> None:
    """Reject a member that readers would take for the image."""
    before = IMAGE.endings[: IMAGE.endings.index(image.format) + 1]
    other = next((name for name in before if name in row.members), None)
    if other is not None:
        message = f"the sample has a member .{other}, which readers would take for its image, stored as .{image.format}"
        raise SampleError("failed_to_resize", "two_images", message)


def _measured_in(boxes: bytes | None) -> tuple[int, int] | None:
    """Width and height of the image according to ``boxes.json``; None where it has none, as in other tools' formats."""
    try:
        record = json.loads(boxes or b"{}")
        return int(record["width"]), int(record["height"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def clean_caption(caption: str | None) -> str | None:
    """The caption as it can be stored as UTF-8: lone surrogates and NUL, which other readers choke on, are replaced."""
    return None if caption is None else storable(caption)
