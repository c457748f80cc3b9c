"""Existing WebDataset tars, including img2dataset's output: each tar becomes one shard with the same fields."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.errors import DataError, SampleError, missing, unreadable
from pipeline.shards.sample import IMAGE_FIELDS, Sample
from pipeline.shards.storage import Folder, file_system, split_file
from pipeline.shards.tar import iterate_tar
from pipeline.sources.source import UNCHANGED, Row, Scalar, Slice

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, kw_only=True)
class WebDatasetTars:
    """The samples of existing tars.

    The image is the member jpg, jpeg, png or webp, the caption the member ``caption_field``. The keys ``json_columns``
    of the json member become columns. Other members are copied unless ``keep_members`` is off.
    """

    kind: ClassVar[str] = "webdataset"
    summary: ClassVar[str] = (
        "Existing WebDataset tars, including img2dataset's; images are stored unchanged by default."
    )
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED

    tars: str
    """Folder, tar, or brace range such as `s3://bucket/{00000..00123}.tar`; join several by `::`."""
    caption_field: str | None = "txt"
    """Member with the caption; None = no captions."""
    json_columns: tuple[str, ...] = ()
    """Keys of the json member to store as columns."""
    keep_members: bool = True
    """Copy members other than image, caption and json unchanged."""

    def __post_init__(self) -> None:
        require(
            bool(self.tars),
            "tars",
            self.tars,
            "a folder, a tar or a brace range of tars",
        )

    @property
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return self.caption_field is not None

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """One slice per tar, of at most ``rows_per_shard`` samples, so that keys stay unique."""
        for uri in self._uris():
            count = 0
            digest = hashlib.sha256()
            for key, sizes in _headers(uri):
                digest.update(json.dumps([key, sizes]).encode())
                count += 1
            enough = count <= rows_per_shard
            require(
                enough,
                "number_sample_per_shard",
                rows_per_shard,
                f"{count} or more, the samples of {uri}",
            )
            digest.update(_stamp(uri).encode())
            yield Slice(count=count, digest=digest.hexdigest(), where={"uri": uri})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; samples without an image are rows with a problem."""
        uri = str(piece.where["uri"])
        place, name = split_file(uri)
        with place.open(name) as file:
            for sample in iterate_tar(file, uri):
                yield self._row(sample)

    def schema(self) -> Mapping[str, type]:
        """The json columns, as strings."""
        return {name: str for name in self.json_columns}

    def _row(self, sample: Sample) -> Row:
        plain = _json(sample.fields.get("json"))
        caption = None
        if self.caption_field is not None:
            caption = sample.fields.get(self.caption_field, b"").decode("utf-8", errors="replace")
        used = (*IMAGE_FIELDS, self.caption_field, "json")
        members = {name: value for name, value in sample.fields.items() if name not in used}
        problem = SampleError(
            "failed_to_download",
            "no_picture",
            "the sample has no jpg, jpeg, png or webp member",
        )
        return Row(
            url=str(plain.get("url") or sample.key),
            caption=caption,
            image=sample.image(),
            columns={name: _text(plain.get(name)) for name in self.json_columns},
            members=members if self.keep_members else {},
            problem=None if sample.image() is not None else problem,
        )

    def _uris(self) -> list[str]:
        uris = [uri for part in self.tars.split("::") for uri in self._expand(part)]
        require(bool(uris), "tars", self.tars, "a place with at least one .tar")
        return uris

    def _expand(self, part: str) -> list[str]:
        match = RANGE.search(part)
        if match:
            low, high = match.groups()
            numbers = range(int(low), int(high) + 1)
            return [part[: match.start()] + f"{number:0{len(low)}d}" + part[match.end() :] for number in numbers]
        place = Folder(part)
        if not place.fs.exists(place.path):
            raise missing("tars", part)
        if not place.fs.isdir(place.path):
            return [place.uri]
        return [place.join(name) for name in place.names(".tar")]


def _headers(uri: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    place, name = split_file(uri)
    try:
        with place.open(name) as file:
            for sample in iterate_tar(file, uri):
                yield (
                    sample.key,
                    [(field, len(value)) for field, value in sample.fields.items()],
                )
    except (FileNotFoundError, DataError) as error:
        raise unreadable("tars", uri, "a whole tar", error) from error


def _stamp(uri: str) -> str:
    fs, path = file_system(uri)
    info = fs.info(path)
    changed = next((info[name] for name in ("ETag", "etag", "mtime") if name in info), "")
    return f"{info.get('size', '')}/{changed}"


def _json(content: bytes | None) -> dict[str, Any]:
    try:
        plain = json.loads(content or b"{}")
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}


def _text(value: object) -> Scalar:
    if value is None or isinstance(value, str | int | float | bool):
        return None if value is None else str(value)
    return json.dumps(value)
