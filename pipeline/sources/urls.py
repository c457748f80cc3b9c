"""Url tables: rows of a parquet, csv, tsv, json or jsonl file, or of a folder of them.

Planning copies the selected columns into parquet files in the scratch folder: one file per input file, one row group
per slice. So a worker reads only its slice, for every input format. As in img2dataset, a slice has rows of one input
file only.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.errors import missing, unreadable
from pipeline.shards.storage import Folder, split_file
from pipeline.shards.writer import reserved_columns
from pipeline.sources.source import Row, Scalar, Slice

FORMATS = (
    "parquet",
    "csv",
    "tsv",
    "json",
    "jsonl",
    "csv.gz",
    "tsv.gz",
    "json.gz",
    "jsonl.gz",
)
BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class UrlTable:
    """Rows whose images are downloaded.

    Option names are img2dataset's. Without ``input_format`` the file extension decides; in a folder, only files with
    that extension are read.
    """

    kind: ClassVar[str] = "urls"
    summary: ClassVar[str] = "Download a url table (parquet, csv, tsv, json, jsonl)."
    downloads: ClassVar[bool] = True

    url_list: str
    """Table of urls: a file or folder, as a path or fsspec URI."""
    url_col: str = "url"
    """Column of the image URLs."""
    caption_col: str | None = None
    """Column of the captions; None = no captions."""
    save_additional_columns: tuple[str, ...] = ()
    """Additional columns to store in the shards' json and parquet."""
    verify_hash: str | None = None
    """COLUMN:sha256, COLUMN:md5 or COLUMN:sha512: reject downloads whose hex digest differs from that column."""
    input_format: str | None = None
    """Format: parquet, csv, tsv, json or jsonl; all but parquet also with .gz. None = by file extension."""

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
        reserved = sorted(set(self.save_additional_columns) & set(reserved_columns()))
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
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return self.caption_col is not None

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; memory holds one slice at a time."""
        schema: pa.Schema | None = None
        for number, file in enumerate(self.files()):
            copy = scratch.join(f"rows-{number:05d}.parquet")
            for group, table in enumerate(self._copy(file, rows_per_shard, scratch, copy)):
                schema = schema or table.schema
                same = table.schema.equals(schema)
                require(
                    same,
                    "url_list",
                    file,
                    f"columns of the same types as in the first file: {_types(schema)}",
                )
                yield Slice(
                    count=table.num_rows,
                    digest=_digest(table),
                    where={"uri": copy, "group": group},
                )
        require(
            schema is not None,
            "url_list",
            self.url_list,
            "a table with at least one row",
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        uri, group = str(piece.where["uri"]), int(piece.where["group"])
        folder, name = split_file(uri)
        with folder.open(name) as file:
            table = pq.ParquetFile(file).read_row_group(group)
        for values in table.to_pylist():
            yield self._row(values)

    def schema(self) -> Mapping[str, type]:
        """The additional columns; numbers and booleans keep their type, all others become strings."""
        with closing(self._read(self.files()[0])) as batches:
            first = next(batches, None)
        require(
            first is not None,
            "url_list",
            self.url_list,
            "a table with at least one row",
        )
        return {
            name: _python_type(cast(pa.RecordBatch, first).schema.field(name).type)
            for name in self.save_additional_columns
        }

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
        return Row(
            url=_text(values[self.url_col]) or "",
            caption=_text(values[self.caption_col]) or "" if self.caption_col else None,
            columns={name: _scalar(values[name]) for name in self.save_additional_columns},
            expected=self._expected(values),
        )

    def _expected(self, values: Mapping[str, Any]) -> str | None:
        if self.verify_hash is None:
            return None
        column, _, algorithm = self.verify_hash.rpartition(":")
        # As in img2dataset, a row without a hash matches no download.
        return f"{algorithm}:{_text(values[column]) or ''}"

    def _columns(self) -> tuple[str, ...]:
        caption = (self.caption_col,) if self.caption_col else ()
        named = (self.url_col, *caption, *self.save_additional_columns)
        column = self._hash_column
        return named if column is None or column in named else (*named, column)

    @property
    def _hash_column(self) -> str | None:
        return self.verify_hash.rpartition(":")[0] if self.verify_hash else None

    def _texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.url_col, self.caption_col, self._hash_column) if name))

    def files(self) -> list[str]:
        """Paths of the input files on the table's file system, sorted.

        Raises:
            SettingError: there are none.
        """
        fs, path = fsspec.core.url_to_fs(self.url_list)
        if not fs.exists(path):
            raise missing("url_list", self.url_list)
        if not fs.isdir(path):
            return [str(path)]
        endings = (self.input_format,) if self.input_format else FORMATS
        found = sorted(str(file) for file in fs.find(path, maxdepth=1))
        files = [file for file in found if file.endswith(tuple(f".{ending}" for ending in endings))]
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
            "a file ending in " + ", ".join(FORMATS) + ", or set input_format",
        )
        return max(matches, key=len)

    def _read(self, file: str) -> Generator[pa.RecordBatch]:
        fs, _ = fsspec.core.url_to_fs(self.url_list)
        form = self.format_of(file)
        compression = "gzip" if form.endswith(".gz") else None
        try:
            with fs.open(file, "rb", compression=compression) as opened:
                read = _READERS[form.removesuffix(".gz")]
                yield from read(opened, self._columns(), self._texts(), self._refuse_missing)
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise unreadable("url_list", file, f"a {form} table", error) from error

    def _refuse_missing(self, available: list[str]) -> None:
        asked = [("url_col", self.url_col), ("caption_col", self.caption_col), ("verify_hash", self._hash_column)]
        asked += [("save_additional_columns", name) for name in self.save_additional_columns]
        for field, column in asked:
            present = column is None or column in available
            require(present, field, column, "a column of the table: " + ", ".join(available))


Check = Callable[[list[str]], None]


def _read_parquet(
    file: Any, columns: tuple[str, ...], texts: tuple[str, ...], check: Check
) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(file)
    check(table.schema_arrow.names)
    yield from table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))


def _read_csv(
    delimiter: str,
    file: Any,
    columns: tuple[str, ...],
    texts: tuple[str, ...],
    check: Check,
) -> Any:
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # Captions that look like numbers or dates stay strings.
    convert = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in texts})
    reader = pyarrow.csv.open_csv(file, parse_options=parse, convert_options=convert)
    check(reader.schema.names)
    for batch in reader:
        yield batch.select(list(columns))


def _read_jsonl(file: Any, columns: tuple[str, ...], texts: tuple[str, ...], check: Check) -> Iterator[pa.RecordBatch]:
    explicit = pa.schema([(name, pa.string()) for name in texts])
    parse = pyarrow.json.ParseOptions(explicit_schema=explicit, newlines_in_values=False)
    reader = pyarrow.json.open_json(file, parse_options=parse)
    for batch in reader:
        # The explicit columns are in the schema even where no row has them.
        check([name for name in batch.schema.names if name not in texts or batch[name].null_count < batch.num_rows])
        yield batch.select(list(columns))


def _read_json(file: Any, columns: tuple[str, ...], texts: tuple[str, ...], check: Check) -> Iterator[pa.RecordBatch]:
    try:
        plain = json.load(file)
    except ValueError as error:
        raise pa.ArrowInvalid(f"{error}; for one object per line set input_format to jsonl") from error
    if isinstance(plain, list) and all(isinstance(row, dict) for row in plain):
        table = pa.Table.from_pylist(plain)
    elif isinstance(plain, dict):
        lists = {name: list(part.values()) if isinstance(part, dict) else part for name, part in plain.items()}
        table = pa.table(lists)
    else:
        raise pa.ArrowInvalid("neither a list of objects nor an object of columns")
    if table.num_rows:
        check(table.column_names)
        yield from table.select(list(columns)).to_batches()


_READERS: Mapping[str, Any] = {
    "parquet": _read_parquet,
    "csv": partial(_read_csv, ","),
    "tsv": partial(_read_csv, "\t"),
    "jsonl": _read_jsonl,
    "json": _read_json,
}


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
        column: Any = table[name]  # pyarrow's own types know too few of its functions
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        digest.update(json.dumps([name, len(column)]).encode())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            lengths: Any = pc.binary_length(column.cast(pa.large_string()))
            digest.update(lengths.fill_null(-1).to_numpy().astype("<i8"))
            digest.update(b"".join(_text_bytes(chunk) for chunk in column.chunks))
        else:
            digest.update(json.dumps([_scalar(value) for value in column.to_pylist()]).encode())
    return digest.hexdigest()


def _text_bytes(chunk: Any) -> bytes:
    """The concatenated strings of a chunk; nulls are empty."""
    filled = chunk.cast(pa.large_string()).fill_null("")
    _, offsets, data = filled.buffers()
    if data is None:
        return b""
    ends = np.frombuffer(offsets, "<i8")[filled.offset : filled.offset + len(filled) + 1]
    return bytes(memoryview(data)[int(ends[0]) : int(ends[-1])])


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _python_type(kind: pa.DataType) -> type:
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind):
        return int
    return float if pa.types.is_floating(kind) else str


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return None if value is None else str(value)


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return json.dumps(value, default=str)
