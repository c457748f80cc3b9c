"""Parquet files that contain the images, as Hugging Face stores image datasets.

An image is a struct ``{bytes, path}`` (Hugging Face's feature ``Image``) or plain bytes. The caption is a string, or
the first of a list of strings. Rows are read by row group, so a worker holds a few images at a time.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import parse_json, require
from pipeline.errors import ReadError, SampleError, SettingError, missing, unreadable
from pipeline.shards.storage import Folder, file_stamp, read_errors, split_file
from pipeline.shards.text import storable
from pipeline.shards.writer import reserved_columns
from pipeline.sources.source import Part, Row, Scalar, Slice
from pipeline.sources.tables import (
    Columns,
    TableError,
    check_caption_type,
    column_types,
    joined_types,
    parquet_columns,
    python_type,
)

BATCH_ROWS = 32  # images held at a time
FEATURES = b"huggingface"  # key of the parquet metadata in which the package `datasets` describes its columns


@dataclass(frozen=True, kw_only=True)
class HuggingFaceParquet:
    """The rows of parquet files that contain their images.

    Class labels (Hugging Face's feature ``ClassLabel``, integers) in additional columns are replaced by class names.
    An image with only an http address is downloaded.
    """

    kind: ClassVar[str] = "hugging-face"
    summary: ClassVar[str] = "Parquet files that contain the images, as Hugging Face stores image datasets."

    parquet: str
    """Parquet file, folder of them, or glob pattern such as `data/train-*.parquet`; a path or fsspec URI."""
    image_col: str = "image"
    """Column of the images."""
    caption_col: str | None = "text"
    """Column of the captions; None = no captions."""
    url_col: str | None = None
    """Column of the image URLs, if any."""
    save_additional_columns: tuple[str, ...] = ()
    """Additional columns to store in the shards' json and parquet."""

    def __post_init__(self) -> None:
        require(bool(self.parquet), "parquet", self.parquet, "a parquet file, a folder or a pattern")
        reserved = sorted(set(self.save_additional_columns) & set(reserved_columns()))
        require(not reserved, "save_additional_columns", reserved, "columns with names that the shards do not use")
        names = self._columns
        require(len(set(names)) == len(names), "save_additional_columns", names, "each column once")

    @property
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return self.caption_col is not None

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """Runs of rows of one file; the digest covers the file's size, time and footer, not its images."""
        total = 0
        self.schema()
        for file in self._files:
            rows, _, stamp = self._footer(file)
            total += rows
            for start in range(0, rows, rows_per_shard):
                count = min(rows_per_shard, rows - start)
                digest = hashlib.sha256(json.dumps([stamp, start, count, self._columns]).encode()).hexdigest()
                yield Slice(count=count, digest=digest, where={"uri": file, "start": start, "count": count})
        require(total > 0, "parquet", self.parquet, "files with at least one row")

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; reads only the row groups that the slice touches."""
        uri = str(piece.where["uri"])
        start, end = int(piece.where["start"]), int(piece.where["start"]) + int(piece.where["count"])
        place, name = split_file(uri)
        with place.open(name) as opened:
            file = pq.ParquetFile(opened)
            names = _class_names(file.schema_arrow)
            groups, position = _groups(file, start, end)
            kinds = self._kinds
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=list(self._columns)):
                inside = batch.slice(max(0, start - position), max(0, end - max(start, position)))
                images = inside.column(self.image_col).to_pylist()
                texts = parquet_columns(inside, kinds).to_pylist()
                rows = zip(images, texts, strict=True)
                for offset, (image, values) in enumerate(rows, start=max(start, position)):
                    yield self._row(image, values, f"{name}#{offset}", names)
                position += batch.num_rows

    def schema(self) -> Mapping[str, type]:
        """The additional columns; numbers and booleans stay what they are, class labels and the rest become text."""
        labels = _class_names(self._schemas[self._files[0]])
        return {name: str if name in labels else python_type(kind) for name, kind in self._kinds.others.items()}

    @cached_property
    def _schemas(self) -> Mapping[str, pa.Schema]:
        found = {file: self._footer(file)[1] for file in self._files}
        for file, schema in found.items():
            self._check(file, schema)
        return found

    @cached_property
    def _kinds(self) -> Columns:
        """The columns but the images, with types on which all files agree."""
        try:
            parts = [column_types(schema, self.save_additional_columns) for schema in self._schemas.values()]
            others = joined_types(parts)
        except TableError as error:
            raise SettingError("parquet", self.parquet, f"files of one table ({error})") from error
        texts = (self.url_col,) if self.url_col is not None else ()
        return Columns(texts=texts, caption=self.caption_col, others=others)

    def _row(self, stored: Any, values: Mapping[str, Any], place: str, names: Mapping[str, list[str]]) -> Row:
        image, path = _image(stored)
        address = values[self.url_col] if self.url_col else path
        to_fetch = image is None and str(address).startswith(("http://", "https://"))
        problem = SampleError("failed_to_download", "no_picture", "the row has neither bytes nor an http address")
        url = storable(str(address or place))
        return Row(
            url=url,
            caption=values[self.caption_col] or "" if self.caption_col else None,
            parts=(Part("image", image, url=url),),
            columns={name: _label(values[name], names.get(name)) for name in self.save_additional_columns},
            problem=None if image is not None or to_fetch else problem,
        )

    @property
    def _columns(self) -> tuple[str, ...]:
        given = (self.image_col, self.caption_col, self.url_col, *self.save_additional_columns)
        return tuple(name for name in given if name is not None)

    @cached_property
    def _files(self) -> list[str]:
        place = Folder(self.parquet)
        fs, path = place.fs, place.path
        with read_errors(self.parquet):
            if "*" in path:
                found = sorted(fs.glob(path))
            elif place.kind() == "directory":
                found = sorted(file for file in fs.find(path, maxdepth=1) if file.endswith(".parquet"))
            else:
                found = [path] if fs.exists(path) else []
        if not found and place.kind() is None:
            raise missing("parquet", self.parquet)
        require(bool(found), "parquet", self.parquet, "a folder with parquet files")
        return [Folder(fs.unstrip_protocol(file).removeprefix("file://")).uri for file in map(str, found)]

    def _footer(self, file: str) -> tuple[int, pa.Schema, str]:
        """Number of rows, schema, and a version stamp of the file."""
        place, name = split_file(file)
        try:
            with place.open(name) as opened:
                parquet = pq.ParquetFile(opened)
                groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
                sizes = [(group.num_rows, group.total_byte_size) for group in groups]
                stamp = json.dumps([file_stamp(place.info(name)), sizes])
                return parquet.metadata.num_rows, parquet.schema_arrow, stamp
        except ReadError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable("parquet", file, "a whole parquet file", error) from error

    def _check(self, file: str, schema: pa.Schema) -> None:
        asked = [("image_col", self.image_col), ("caption_col", self.caption_col), ("url_col", self.url_col)]
        asked += [("save_additional_columns", name) for name in self.save_additional_columns]
        for option, column in asked:
            present = column is None or column in schema.names
            require(present, option, column, f"a column of {file}: " + ", ".join(schema.names))
        try:
            column_types(schema, self._columns)
            if self.caption_col is not None:
                check_caption_type(self.caption_col, schema.field(self.caption_col).type)
        except TableError as error:
            raise SettingError("parquet", file, f"a table that says which column is meant ({error})") from error
        images = [field.name for field in schema if _holds_images(field.type)]
        allowed = "a column of structs with bytes and path, or of bytes; the file has: " + (", ".join(images) or "none")
        require(self.image_col in images, "image_col", self.image_col, allowed)


def _groups(file: pq.ParquetFile, start: int, end: int) -> tuple[list[int], int]:
    """Row groups that overlap rows ``start`` to ``end``, and the index of the first row in them."""
    groups: list[int] = []
    first = position = 0
    for index in range(file.num_row_groups):
        count = file.metadata.row_group(index).num_rows
        if position < end and position + count > start:
            first = position if not groups else first
            groups.append(index)
        position += count
    return groups, first


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, Mapping):
        return value.get("bytes"), value.get("path")
    return value, None


def _label(value: Scalar, names: list[str] | None) -> Scalar:
    """The name of a class number; -1 is an unknown label."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names by column, for the class labels in the metadata of the package ``datasets``."""
    try:
        features = parse_json((schema.metadata or {}).get(FEATURES, b"{}"))["info"]["features"]
        labels = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {name: [str(one) for one in kind["names"]] for name, kind in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
