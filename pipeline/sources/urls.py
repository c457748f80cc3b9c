"""Url tables: rows of a parquet, csv, tsv, json or jsonl file, or of a folder of them.

Planning copies the selected columns into parquet files in the scratch folder: one file per input file, one row group
per slice. So a worker reads only its slice, for every input format. As in img2dataset, a slice has rows of one input
file only.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.errors import ReadError, SampleError, SettingError, missing, unreadable
from pipeline.shards.media import IMAGE, MEDIA
from pipeline.shards.segments import with_segment
from pipeline.shards.storage import Folder, split_file
from pipeline.shards.writer import reserved_columns
from pipeline.sources.source import Part, Row, Slice
from pipeline.sources.tables import (
    FORMATS,
    PROBLEM,
    Columns,
    MissingColumn,
    Quoting,
    TableError,
    column_types,
    joined_types,
    python_type,
    read_table,
)


@dataclass(frozen=True, kw_only=True)
class UrlTable:
    """Rows whose images, sounds or videos are downloaded.

    ``media`` are those of ``url_col``, in its order. A row without a url of one medium has only the other parts.

    Option names are img2dataset's. Without ``input_format`` the file extension decides; in a folder, only files with
    that extension are read.
    """

    kind: ClassVar[str] = "urls"
    summary: ClassVar[str] = "Download a url table (parquet, csv, tsv, json, jsonl)."
    downloads: ClassVar[bool] = True

    url_list: str
    """Table of urls: a file or folder, as a path or fsspec URI."""
    url_col: str | tuple[str, ...] = "url"
    """Column of the image URLs; or a column for each medium, as in `image=url audio=sound_url`. The first medium has
    the columns url and sha256 of the shards, the others audio_url and audio_sha256."""
    caption_col: str | None = None
    """Column of the captions; None = no captions."""
    start_col: str | None = None
    """Column of the begin of a clip in its file, in seconds; sounds and videos are cut there. The rows of one file are
    fetched once where they follow one another."""
    end_col: str | None = None
    """Column of the end of a clip in its file, in seconds; empty = the end of the file."""
    save_additional_columns: tuple[str, ...] = ()
    """Additional columns to store in the shards' json and parquet."""
    verify_hash: str | None = None
    """COLUMN:sha256, COLUMN:md5 or COLUMN:sha512: reject downloads whose hex digest differs from that column; of the
    first medium."""
    input_format: str | None = None
    """Format: parquet, csv, tsv, json or jsonl; all but parquet also with .gz. None = by file extension."""
    quoting: Quoting | None = None
    """Quotation marks of a csv or tsv enclose values (minimal) or belong to the text (none). None = as found."""

    def __post_init__(self) -> None:
        require(
            bool(self.url_list),
            "url_list",
            self.url_list,
            "a file, a folder or an fsspec URI",
        )
        known = self.input_format is None or self.input_format in FORMATS
        require(known, "input_format", self.input_format, "one of " + ", ".join(FORMATS))
        column, _, algorithm = (self.verify_hash or "-:md5").rpartition(":")
        known = bool(column) and algorithm in ("sha256", "md5", "sha512")
        require(known, "verify_hash", self.verify_hash, "COLUMN:sha256, COLUMN:md5 or COLUMN:sha512")
        _check_url_columns(self.url_col)
        require(self.end_col is None or self.start_col is not None, "end_col", self.end_col, "a --start-col with it")
        cuts = self.start_col is None or self.media != (IMAGE.name,)
        require(cuts, "start_col", self.start_col, "none for images; --url-col video=COLUMN or audio=COLUMN")
        taken = {*reserved_columns(self.media), *(("start", "end") if self.start_col else ())}
        reserved = sorted(set(self.save_additional_columns) & taken)
        require(
            not reserved,
            "save_additional_columns",
            reserved,
            "columns with names that the shards do not use",
        )
        repeated = len(set(self._columns())) < len(self._columns())
        require(
            not repeated,
            "save_additional_columns",
            self.save_additional_columns,
            "each column once",
        )

    @property
    def media(self) -> tuple[str, ...]:
        """The media of ``url_col``, in its order."""
        return tuple(self._url_columns)

    @property
    def _url_columns(self) -> dict[str, str]:
        """The column of the urls of each medium."""
        if isinstance(self.url_col, str) and not _names_medium(self.url_col):
            return {IMAGE.name: self.url_col}
        given = (self.url_col,) if isinstance(self.url_col, str) else self.url_col
        pairs = (text.partition("=") for text in given)
        return {medium: column for medium, _, column in pairs}

    @property
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return self.caption_col is not None

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; memory holds one slice at a time."""
        total = 0
        for number, file in enumerate(self._files):
            copy = scratch.join(f"rows-{number:05d}.parquet")
            for group, table in enumerate(self._copy(file, rows_per_shard, scratch, copy)):
                total += table.num_rows
                yield Slice(count=table.num_rows, digest=_digest(table), where={"uri": copy, "group": group})
        require(total > 0, "url_list", self.url_list, "a table with at least one row")

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        uri, group = str(piece.where["uri"]), int(piece.where["group"])
        folder, name = split_file(uri)
        with folder.open(name) as file:
            table = pq.ParquetFile(file).read_row_group(group)
        for values in table.to_pylist():
            yield self._row(values)

    def schema(self) -> Mapping[str, type]:
        """The additional columns: numbers and booleans of parquet stay what they are, everything else is text.

        With ``start_col`` also ``start`` and ``end``.
        """
        found = {name: python_type(kind) for name, kind in self._table_columns.others.items()}
        return found | ({"start": float, "end": float} if self.start_col else {})

    def _copy(self, file: str, rows: int, scratch: Folder, copy: str) -> Iterator[pa.Table]:
        with scratch.scratch_file(".parquet") as path:
            writer: pq.ParquetWriter | None = None
            for table in _regroup(self._read(file), rows):
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table, row_group_size=table.num_rows)
                yield table
            if writer is not None:
                writer.close()
                scratch.write_atomic(copy.rpartition("/")[2], path)

    def _row(self, values: dict[str, Any]) -> Row:
        malformed = values[PROBLEM]
        problem = SampleError("failed_to_download", "malformed_row", malformed) if malformed else None
        urls = {medium: values[column] or "" for medium, column in self._url_columns.items()}
        columns = {name: values[name] for name in self.save_additional_columns}
        if self.start_col is not None:
            begin, end = self._segment(values)
            if begin is None or (end is not None and end <= begin) or begin < 0:
                problem = problem or SampleError("failed_to_resize", "segment", "no begin, or an end that is not later")
            else:
                urls = {medium: with_segment(url, begin, end) if url else "" for medium, url in urls.items()}
            columns |= {"start": begin, "end": end}
        url = next((url for url in urls.values() if url), "")
        # A row without any url has the failure of an empty one.
        known = {medium: url for medium, url in urls.items() if url} or {self.media[0]: ""}
        digests = {self.media[0]: self._expected(values)}
        return Row(
            url=url,
            parts=tuple(Part(medium, url=url, expected=digests.get(medium)) for medium, url in known.items()),
            caption=values[self.caption_col] or "" if self.caption_col else None,
            columns=columns,
            problem=problem,
        )

    def _segment(self, values: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Begin and end of a row, in seconds; a begin that is no number is None, as is an end that is not given."""
        texts = [values[column] or "" if column else "" for column in (self.start_col, self.end_col)]
        try:
            begin, end = (float(text) if text.strip() else None for text in texts)
        except ValueError:
            return None, None
        finite = all(number is None or math.isfinite(number) for number in (begin, end))
        return (begin, end) if finite else (None, None)

    def _expected(self, values: Mapping[str, Any]) -> str | None:
        if self.verify_hash is None:
            return None
        column, _, algorithm = self.verify_hash.rpartition(":")
        # As in img2dataset, a row without a hash matches nothing.
        return f"{algorithm}:{values[column] or ''}"

    @cached_property
    def _table_columns(self) -> Columns:
        """The columns with their types, on which the parquet files of one table agree."""
        others: dict[str, pa.DataType] = dict.fromkeys(self.save_additional_columns, pa.string())
        parts = [file for file in self._files if others and self.format_of(file) == "parquet"]
        if parts:
            others |= self._types(parts)
        named = (*self._url_columns.values(), self._hash_column, self.start_col, self.end_col)
        texts = tuple(dict.fromkeys(name for name in named if name))
        return Columns(texts=texts, caption=self.caption_col, others=others)

    def _types(self, parts: list[str]) -> Mapping[str, pa.DataType]:
        found: list[Mapping[str, pa.DataType]] = []
        for file in parts:
            with self._said_in_one_sentence(file), _opened(file) as opened:
                found.append(column_types(pq.ParquetFile(opened).schema_arrow, self.save_additional_columns))
        with self._said_in_one_sentence(self.url_list):
            return joined_types(found)

    def _columns(self) -> tuple[str, ...]:
        caption = (self.caption_col,) if self.caption_col else ()
        cuts = tuple(name for name in (self.start_col, self.end_col) if name)
        named = (*self._url_columns.values(), *caption, *cuts, *self.save_additional_columns)
        column = self._hash_column
        return named if column is None or column in named else (*named, column)

    @property
    def _hash_column(self) -> str | None:
        return self.verify_hash.rpartition(":")[0] if self.verify_hash else None

    def files(self) -> list[str]:
        """Paths or URIs of the input files, sorted.

        Raises:
            SettingError: there are none.
        """
        place = Folder(self.url_list)
        kind = place.kind()
        if kind is None:
            raise missing("url_list", self.url_list)
        if kind == "file":
            return [place.uri]
        endings = (self.input_format,) if self.input_format else FORMATS
        files = [
            place.join(file) for file in place.find(depth=1) if file.endswith(tuple(f".{ending}" for ending in endings))
        ]
        require(
            bool(files),
            "url_list",
            self.url_list,
            "a folder with files ending in " + ", ".join(endings),
        )
        return files

    def format_of(self, file: str) -> str:
        """One of :data:`FORMATS`: ``input_format``, or by the file extension."""
        if self.input_format:
            return self.input_format
        matches = [ending for ending in FORMATS if file.lower().endswith(f".{ending}")]
        require(
            bool(matches),
            "url_list",
            file,
            "a file ending in " + ", ".join(FORMATS) + ", or --input-format",
        )
        return max(matches, key=len)

    @cached_property
    def _files(self) -> list[str]:
        return self.files()

    def _read(self, file: str) -> Generator[pa.RecordBatch]:
        form = self.format_of(file)
        with self._said_in_one_sentence(file), _opened(file) as opened:
            plain = gzip.GzipFile(fileobj=opened) if form.endswith(".gz") else opened
            yield from read_table(plain, form.removesuffix(".gz"), self._table_columns, self.quoting)

    @contextmanager
    def _said_in_one_sentence(self, file: str) -> Iterator[None]:
        try:
            yield
        except ReadError:
            raise
        except MissingColumn as error:
            option = next(option for option, column in self._asked() if column == error.column)
            raise SettingError(option, error.column, "a column of the table: " + ", ".join(error.available)) from error
        except (TableError, pa.ArrowInvalid, OSError, UnicodeError, EOFError, zlib.error) as error:
            raise unreadable("url_list", file, f"a {self.format_of(file)} table", error) from error

    def _asked(self) -> list[tuple[str, str | None]]:
        """Columns with the options that ask for them."""
        asked: list[tuple[str, str | None]] = [("url_col", column) for column in self._url_columns.values()]
        asked += [("caption_col", self.caption_col), ("verify_hash", self._hash_column)]
        asked += [("start_col", self.start_col), ("end_col", self.end_col)]
        return asked + [("save_additional_columns", name) for name in self.save_additional_columns]


def _names_medium(text: str) -> bool:
    """Whether ``text`` is a column with its medium, ``audio=sound_url``."""
    return text.partition("=")[0] in MEDIA and "=" in text


def _check_url_columns(given: str | tuple[str, ...]) -> None:
    texts = (given,) if isinstance(given, str) else given
    plain = [text for text in texts if not _names_medium(text)]
    allowed = "a column, or MEDIUM=COLUMN for each medium once, of " + ", ".join(MEDIA)
    require(bool(texts) and (not plain or len(texts) == 1), "url_col", given, allowed)
    names = [text.partition("=") for text in texts if text not in plain]
    once = len({medium for medium, _, _ in names}) == len(names) and all(column for _, _, column in names)
    require(once, "url_col", given, allowed)


def _opened(file: str) -> BinaryIO:
    folder, name = split_file(file)
    return folder.open(name)


def _regroup(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            taken = batch.slice(start, rows - count)
            held.append(taken)
            count += taken.num_rows
            start += taken.num_rows
            if count == rows:
                yield pa.Table.from_batches(held)
                held, count = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _digest(table: pa.Table) -> str:
    """SHA-256 of names and values, independent of Arrow's memory layout (chunks, offsets, null buffers).

    Strings are hashed as lengths and bytes, without Python objects: a plan may have 100 million rows.
    """
    digest = hashlib.sha256()
    for name in table.column_names:
        if name == PROBLEM and table[name].null_count == len(table):
            continue  # a table without malformed rows has the digest of its values alone
        column: Any = table[name]  # pyarrow's own types know too few of its functions
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        digest.update(json.dumps([name, len(column)]).encode())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            lengths: Any = pc.binary_length(column.cast(pa.large_string()))
            digest.update(lengths.fill_null(-1).to_numpy().astype("<i8"))
            digest.update(b"".join(_text_bytes(chunk) for chunk in column.chunks))
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()


def _text_bytes(chunk: Any) -> bytes:
    """The concatenated strings of a chunk; nulls are empty."""
    filled = chunk.cast(pa.large_string()).fill_null("")
    _, offsets, data = filled.buffers()
    if data is None:
        return b""
    ends = np.frombuffer(offsets, "<i8")[filled.offset : filled.offset + len(filled) + 1]
    return bytes(memoryview(data)[int(ends[0]) : int(ends[-1])])
