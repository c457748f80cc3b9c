"""Make one shard: read its rows, download, encode, and write in the order of the input.

Runs in one process; Ray only schedules the units. Downloads run in their own thread while bodies are encoded here, each
by the codec of its medium. Output is in order: rows that finish before a slow row are held in memory.

A row with several parts is finished with the last of them. Where one of them fails, ``failed_part`` decides about the
others. The columns of a row's first medium have no prefix, as in img2dataset's files; those of the others begin with
their medium.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from pipeline.codecs import codec_of
from pipeline.codecs.codec import Encoded
from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.codecs.video import VideoOptions
from pipeline.errors import SampleError
from pipeline.shards.media import MEDIA, part_column
from pipeline.shards.sample import Sample, joined_fields, sample_key, shard_name
from pipeline.shards.segments import Segment, split_segment
from pipeline.shards.storage import Folder
from pipeline.shards.text import storable
from pipeline.shards.writer import ShardStats, ShardWriter, parquet_schema, read_stats
from pipeline.sources.source import (
    UNCHANGED,
    VIDEO_UNCHANGED,
    Cell,
    Part,
    Row,
    Scalar,
    Source,
    TimedCaption,
    fetches,
    media_of,
)
from pipeline.stages.crawl.decode_apart import Apart
from pipeline.stages.crawl.download import Download, DownloadOptions, KnownBody, Request, digest, download_all
from pipeline.stages.refresh.plan import Unit

ARROW_TYPES: Mapping[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    list: pa.list_(pa.string()),
    TimedCaption: pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("text", pa.string())])),
}
VALIDATORS = ("last_modified", "etag")


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Inputs and options of a shard."""

    media: MediaOptions = field(default_factory=MediaOptions)
    downloads: DownloadOptions = field(default_factory=DownloadOptions)
    failed_part: Literal["fail-row", "keep-row"] = "fail-row"
    """A row with several parts (image and sound), some of which fail: fail-row drops it, so that every sample has all
    its parts; keep-row stores the parts that are left."""
    number_sample_per_shard: int = 10_000


AS_IT_IS = ShardOptions(media=MediaOptions(image=ImageOptions(**UNCHANGED), video=VideoOptions(**VIDEO_UNCHANGED)))
"""Images and videos are stored byte for byte as in the source; those that cannot be decoded fail."""


def make_shard(unit: Unit, source: Source, folder: Folder, options: ShardOptions) -> ShardStats:
    """Make the shard of ``unit`` in ``folder``, or return the stats of the finished shard.

    Raises:
        StorageError: the disk is full or the store failed.
    """
    done = read_stats(folder, shard_name(unit.shard_id))
    if done is not None and done.unit == unit.digest:
        return done
    maker = _Maker(unit, source, options)
    with ExitStack() as open_, ShardWriter(folder, unit.shard_id, maker.schema, unit.digest) as writer:
        for apart in maker.apart.values():
            open_.enter_context(apart)
        for row, sample in maker.finished():
            writer.add(row, sample)
        return writer.commit()


@dataclass(frozen=True, slots=True)
class _PartResult:
    """What became of one part: its encoded form or its failure, and what the download has told about it."""

    medium: str
    url: str
    result: Encoded | SampleError
    digest: str | None = None
    http_status: int | None = None
    attempts: int = 0
    validators: Mapping[str, str | None] = field(default_factory=dict)
    measured: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def error(self) -> SampleError | None:
        return self.result if isinstance(self.result, SampleError) else None


Made = tuple[dict[str, Any], Sample | None]
"""The parquet row of an input row, and its sample if it became one."""


class _Maker:
    """Turns the rows of one unit into parquet rows and samples."""

    def __init__(self, unit: Unit, source: Source, options: ShardOptions) -> None:
        self._unit, self._source, self._options = unit, source, options
        self._hash = options.downloads.compute_hash
        self._media = media_of(source)
        self._several = len(self._media) > 1
        self._codecs = {medium: codec_of(medium) for medium in self._media}
        self._of_medium = {medium: options.media.of(medium) for medium in self._media}
        self.apart = {medium: Apart(medium, self._of_medium[medium]) for medium in self._media}
        columns: dict[str, pa.DataType] = {name: ARROW_TYPES[kind] for name, kind in source.schema().items()}
        if source.has_captions:
            columns["caption"] = pa.string()
        self.schema = parquet_schema({**columns, "url": pa.string()}, self._hash)
        for name, kind in self._part_columns().items():
            if name not in self.schema.names:
                self.schema = self.schema.append(pa.field(name, kind))

    def _part_columns(self) -> dict[str, pa.DataType]:
        """The columns of the parts, except img2dataset's: those of the first medium, of all codecs, of other media."""
        # The server's validators of this version of a body, for the next refresh.
        of_server = dict.fromkeys(VALIDATORS, pa.string()) if fetches(self._source) else {}
        found: dict[str, pa.DataType] = dict(of_server)
        for codec in self._codecs.values():
            found |= {name: ARROW_TYPES[kind] for name, kind in codec.columns.items()}
        for medium in self._media[1:]:
            own: dict[str, pa.DataType] = {
                "url": pa.string(),
                **({self._hash: pa.string()} if self._hash else {}),
                **of_server,
            }
            own |= {"http_status": pa.int32(), "attempts": pa.int32()} if of_server else {}
            found |= {part_column(medium, name): kind for name, kind in own.items()}
        for medium in self._media if self._several else ():
            found |= {part_column(medium, name): pa.string() for name in ("error_class", "error_message")}
        return found

    def finished(self) -> Iterator[Made]:
        """Every input row, in order."""
        ahead: dict[int, Made] = {}
        following = 0
        for index, row, results in self._rows():
            ahead[index] = self._finish(index, row, results)
            while following in ahead:
                yield ahead.pop(following)
                following += 1

    def _rows(self) -> Iterator[tuple[int, Row, Sequence[_PartResult] | SampleError]]:
        """Every row with its parts; rows that need no download first, then the others in order of completion."""
        waiting: dict[int, tuple[Row, dict[int, _PartResult]]] = {}
        asked: list[list[tuple[int, int]]] = []
        requests: list[tuple[int, str, KnownBody]] = []
        for index, row in enumerate(self._source.rows(self._unit.piece)):
            if row.problem is not None:
                yield index, row, row.problem
                continue
            if not row.parts and not row.members:
                yield index, row, SampleError("failed_to_resize", "empty", "the row has no members")
                continue
            there = {at: self._taken(part, part.body) for at, part in enumerate(row.parts) if part.body is not None}
            if len(there) == len(row.parts):
                yield index, row, [there[at] for at in range(len(row.parts))]
                continue
            bare = tuple(replace(part, body=None) for part in row.parts)
            waiting[index] = (replace(row, parts=bare), there)
            for at, part in enumerate(row.parts):
                if part.body is not None:
                    continue
                url, known = split_segment(part.url)[0], self._known(part)
                # Clips of one file are fetched once where their rows follow one another.
                if not requests or requests[-1][1:] != (url, known):
                    requests.append((len(asked), url, known))
                    asked.append([])
                asked[-1].append((index, at))
        if requests:
            yield from self._downloaded(requests, asked, waiting)

    def _downloaded(
        self,
        requests: Sequence[Request],
        asked: Sequence[Sequence[tuple[int, int]]],
        waiting: dict[int, tuple[Row, dict[int, _PartResult]]],
    ) -> Iterator[tuple[int, Row, Sequence[_PartResult]]]:
        for number, answer in download_all(requests, self._options.downloads):
            for index, at in asked[number]:
                row, there = waiting[index]
                there[at] = self._received(row.parts[at], answer)
                if len(there) == len(row.parts):
                    del waiting[index]
                    yield index, row, [there[at] for at in range(len(row.parts))]

    def _known(self, part: Part) -> KnownBody:
        any_kind = self._codecs[part.medium].accepts_all(self._of_medium[part.medium])
        return KnownBody(expected=part.expected, medium=MEDIA[part.medium], any_kind=any_kind)

    def _received(self, part: Part, answer: Download | SampleError) -> _PartResult:
        if isinstance(answer, SampleError):
            return _PartResult(part.medium, part.url, answer, None, answer.http_status, answer.attempts)
        validators = {"last_modified": answer.last_modified, "etag": answer.etag}
        made = self._taken(part, answer.body, answer.digest)
        return replace(made, http_status=answer.http_status, attempts=answer.attempts, validators=validators)

    def _taken(self, part: Part, body: bytes, known_digest: str | None = None) -> _PartResult:
        """The part of a complete body."""
        segment = split_segment(part.url)[1]
        result = self._encoded(part.medium, body, segment)
        measured = self._codecs[part.medium].measured(body) if isinstance(result, SampleError) else {}
        # A source may give the same file for several clips; a downloaded one is compared with that of its url later.
        found = known_digest or digest(body if segment is None else body + repr(segment).encode(), self._hash)
        return _PartResult(part.medium, part.url, result, found, measured=measured)

    def _encoded(self, medium: str, body: bytes, segment: Segment | None) -> Encoded | SampleError:
        codec = self._codecs[medium]
        try:
            if codec.needs_care(body):
                return self.apart[medium].encode(body, segment)
            return codec.encode(body, self._of_medium[medium], segment)
        except SampleError as error:
            return error
        except Exception as error:
            # The sample boundary: decoders raise arbitrary exceptions on hostile input, and must fail one row only.
            message = f"{medium.capitalize()} decoding error: {error}"
            return SampleError("failed_to_resize", "decode", message)

    def _finish(self, index: int, row: Row, results: Sequence[_PartResult] | SampleError) -> Made:
        key = sample_key(self._unit.shard_id, index, self._options.number_sample_per_shard)
        record: dict[str, Any] = {name: clean_value(value) for name, value in row.columns.items()}
        if self._source.has_captions:
            record["caption"] = clean_caption(row.caption)
        record |= {"url": storable(row.url), "key": key}
        if isinstance(results, SampleError):
            return {**record, **_why(results)}, None
        members, changed, results = self._fitted(row, record, results)
        record |= changed
        failed = next((one for one in results if one.error), None)
        alone = all(one.error for one in results)
        if failed is not None and (alone or self._options.failed_part == "fail-row"):
            return self._failed(record, failed, results), None
        record |= {"status": "success", "error_message": None, **self._described(row, results)}
        # The validators and the attempts are not in the sample, whose bytes do not depend on the server.
        sample = self._sample(key, members, record, results)
        return {**record, **self._of_server(results)}, sample

    def _fitted(
        self, row: Row, record: Mapping[str, Any], results: Sequence[_PartResult]
    ) -> tuple[Mapping[str, bytes], dict[str, Any], Sequence[_PartResult]]:
        """The row's members and columns, fitted to its parts; a part that one of them does not fit has failed."""
        members: Mapping[str, bytes] = row.members
        changed: dict[str, Any] = {}
        checked = []
        for one in results:
            if not isinstance(one.result, SampleError):
                try:
                    _refuse_second(members, one.medium, next(iter(one.result.fields)))
                    members = self._codecs[one.medium].fitted(members, one.result, self._of_medium[one.medium])
                    changed |= self._codecs[one.medium].fitted_columns(record, one.result)
                except SampleError as error:
                    measured = {n: v for n, v in one.result.columns.items() if n.startswith("original_")}
                    one = replace(one, result=error, measured=measured)
            checked.append(one)
        return members, changed, checked

    def _failed(self, record: dict[str, Any], failed: _PartResult, results: Sequence[_PartResult]) -> dict[str, Any]:
        assert failed.error is not None
        # Status and attempts are those of the download, also where what came by it was no good.
        of_first = {"http_status": failed.http_status, "attempts": failed.attempts}
        record = {**record, **_why(failed.error), **of_first, **failed.measured}
        for one in results if self._several else ():
            record |= {**self._address(one), **_why_of_part(one)}
        return record

    def _described(self, row: Row, results: Sequence[_PartResult]) -> dict[str, Any]:
        """The columns of a sample about its parts; the digest of the first medium stands for the row."""
        described: dict[str, Any] = {}
        for one in results:
            described |= one.result.columns if isinstance(one.result, Encoded) else one.measured
            if one.medium == self._media[0] and self._hash:
                described[self._hash] = one.digest
            if self._several:
                described |= {**self._address(one), **(_why_of_part(one) if one.error else {})}
        if not results and self._hash:
            described[self._hash] = digest(joined_fields(row.members), self._hash)
        return described

    def _address(self, one: _PartResult) -> dict[str, Any]:
        """Url and digest of a part that is not of the first medium."""
        if one.medium == self._media[0]:
            return {}
        found = {part_column(one.medium, "url"): storable(one.url)}
        return found | ({part_column(one.medium, self._hash): one.digest} if self._hash else {})

    def _of_server(self, results: Sequence[_PartResult]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in results:
            own: dict[str, Any] = {**one.validators, **({"attempts": one.attempts} if one.attempts else {})}
            first = one.medium == self._media[0]
            found |= own if first else {part_column(one.medium, name): value for name, value in own.items()}
        return found

    def _sample(
        self, key: str, members: Mapping[str, bytes], record: Mapping[str, Any], results: Sequence[_PartResult]
    ) -> Sample:
        fields = dict(members)
        for one in results:
            fields |= one.result.fields if isinstance(one.result, Encoded) else {}
        if self._source.has_captions:
            fields["txt"] = (record["caption"] or "").encode()
        fields["json"] = _flat_json(record)
        return Sample(key, fields)


def _why(error: SampleError) -> dict[str, Any]:
    return {
        "status": error.status,
        "error_message": error.message,
        "error_class": error.error_class,
        "http_status": error.http_status,
        "attempts": error.attempts,
    }


def _why_of_part(one: _PartResult) -> dict[str, Any]:
    error = one.error
    found = {"error_class": error.error_class, "error_message": error.message} if error else {}
    return {part_column(one.medium, name): value for name, value in found.items()}


def _refuse_second(members: Mapping[str, bytes], medium: str, field: str) -> None:
    """Reject a member that readers would take for the part of ``medium``, which is stored as ``field``."""
    endings = MEDIA[medium].endings
    other = next((name for name in endings[: endings.index(field) + 1] if name in members), None)
    if other is not None:
        message = f"the sample has a member .{other}, which readers would take for its {medium}, stored as .{field}"
        raise SampleError("failed_to_resize", f"two_{medium}s", message)


def clean_value(value: Cell) -> Cell:
    """The value of a column as it can be stored: texts as captions, numbers and booleans as they are."""
    if isinstance(value, list):
        return [_clean_item(item) for item in value]  # type: ignore[return-value]  # a list of one of the two
    return storable(value) if isinstance(value, str) else value


def _clean_item(item: str | TimedCaption) -> str | TimedCaption:
    return storable(item) if isinstance(item, str) else {**item, "text": storable(item["text"])}


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


def clean_caption(caption: str | None) -> str | None:
    """The caption as it can be stored as UTF-8: lone surrogates and NUL, which other readers choke on, are replaced."""
    return None if caption is None else storable(caption)
