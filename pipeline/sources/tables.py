"""Tables that other people wrote, read as text.

A table is a parquet, csv, tsv, json or jsonl file. Only the columns that were asked for are read. Parquet has types,
and numbers and booleans of its other columns keep them; every value of the other formats is text, so ``000123`` stays
``000123`` and a late ``n.a.`` among numbers is a value like any other.

A row that cannot be read (too many values, a line that is no JSON) is a row with its reason in the column
:data:`PROBLEM`; the rows after it are read.
"""

import csv
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ClipmillError
from pipeline.shards.text import encoding_of, storable

logger = logging.getLogger(__name__)

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "csv.gz", "tsv.gz", "json.gz", "jsonl.gz")
PROBLEM = "clipmill.problem"
BATCH_ROWS = 65_536
# First bytes of files that are called csv or json and are not.
_OTHER_FILES = {
    b"PAR1": "it is a parquet file",
    b"\x1f\x8b": "it is compressed with gzip; call it .csv.gz, .tsv.gz, .json.gz or .jsonl.gz",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet",
    b"BZh": "it is compressed with bzip2",
    b"\xfd7zX": "it is compressed with xz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd",
}

Quoting = Literal["minimal", "none"]


class TableError(ClipmillError):
    """A file that cannot be read as a table; the sources name their option with it."""


class MissingColumn(TableError):
    """A column that was asked for is not there; ``available`` are those that are."""

    def __init__(self, column: str, available: Sequence[str]) -> None:
        self.column, self.available = column, tuple(available)
        super().__init__(f"no column {column!r}; there are: {', '.join(self.available) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is read of a table: texts, a caption, and further columns with the Arrow types that they are to have."""

    texts: tuple[str, ...]
    caption: str | None = None
    others: Mapping[str, pa.DataType] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Each name once."""
        caption = (self.caption,) if self.caption is not None else ()
        return tuple(dict.fromkeys((*self.texts, *caption, *self.others)))

    def schema(self) -> pa.Schema:
        """The schema of the batches, :data:`PROBLEM` last."""
        types = [(name, self.others.get(name, pa.string())) for name in self.names()]
        return pa.schema([*types, (PROBLEM, pa.string())])


def read_table(file: Any, form: str, columns: Columns, quoting: Quoting | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of an open binary file of a format in :data:`FORMATS` (without ``.gz``), as batches of one schema.

    ``quoting`` says whether quotation marks enclose values of a csv or tsv (``"minimal"``) or belong to the text
    (``"none"``); with ``None`` the file decides, which has to be seekable then.

    Raises:
        MissingColumn: a column is not there.
        TableError: the file is no such table, has a column twice, or none of its rows can be read.
    """
    if form == "parquet":
        return _read_parquet(file, columns)
    if form in ("csv", "tsv"):
        return _read_separated(file, columns, "," if form == "csv" else "\t", quoting)
    return _read_objects(file, columns, _objects_of_lines if form == "jsonl" else _objects_of_document)


# Parquet


def column_types(schema: pa.Schema, names: Iterable[str]) -> dict[str, pa.DataType]:
    """The type that each named column of a parquet file is read as: boolean, int64, float64, or text for all others."""
    return {name: _stored_type(_one_field(schema, name).type) for name in names}


def joined_types(parts: Sequence[Mapping[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """One type for each column over all parts of a table: nulls fit any, and whole numbers fit among fractions.

    Raises:
        TableError: a column has types with no common meaning.
    """
    found: dict[str, pa.DataType] = {}
    for part in parts:
        for name, kind in part.items():
            before = found.get(name, pa.null())
            if pa.types.is_null(before) or before == kind:
                found[name] = kind
            elif {before, kind} == {pa.int64(), pa.float64()}:
                found[name] = pa.float64()
            elif not pa.types.is_null(kind):
                raise TableError(f"column {name!r} is {before} in one part and {kind} in another")
    return {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in found.items()}


def python_type(kind: pa.DataType) -> type:
    """The Python type of a column's values, for :meth:`~pipeline.sources.source.Source.schema`."""
    if pa.types.is_boolean(kind):
        return bool
    if pa.types.is_integer(kind):
        return int
    return float if pa.types.is_floating(kind) else str


def check_caption_type(name: str, kind: Any) -> None:
    """Raise ``TableError`` where a parquet column holds neither texts nor lists of texts."""
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    if pa.types.is_struct(inner) or pa.types.is_map(inner):
        raise TableError(f"column {name!r} holds {kind}; a caption is a text or a list of texts")


def _read_parquet(file: Any, columns: Columns) -> Iterator[pa.RecordBatch]:
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        kinds = {name: _one_field(schema, name).type for name in columns.names()}
        if columns.caption is not None:
            check_caption_type(columns.caption, kinds[columns.caption])
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns.names())):
            yield parquet_columns(batch, columns)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise TableError(" ".join(str(error).split())) from error


def parquet_columns(batch: pa.RecordBatch, columns: Columns) -> pa.RecordBatch:
    """The columns of a parquet file's batch in the types of ``columns``."""
    schema = columns.schema()
    arrays = []
    for name in columns.names():
        array = batch.column(batch.schema.get_field_index(name))
        if name == columns.caption:
            array = _captions(array)
        elif pa.types.is_string(schema.field(name).type):
            array = texts_of(array)
        else:
            array = array.cast(schema.field(name).type)
        arrays.append(array)
    return pa.RecordBatch.from_arrays([*arrays, pa.nulls(batch.num_rows, pa.string())], schema=schema)


def texts_of(array: Any) -> Any:
    """A column of any type as text; lists, structs and maps as JSON, dates and decimals as they are written."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return texts_of(array.dictionary_decode())
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.string())
    if _is_text(kind) or _is_binary(kind):
        try:
            # Through binary, since Arrow checks UTF-8 on the way from there alone.
            found = array.cast(pa.large_binary()).cast(pa.large_string()).cast(pa.string())
        except pa.ArrowInvalid:
            values = array.cast(pa.large_binary()).to_pylist()
            found = pa.array([None if one is None else one.decode("utf-8", "replace") for one in values], pa.string())
        holds_nul = pc.any(pc.match_substring(found, "\0")).as_py()
        return pc.replace_substring(found, "\0", "") if holds_nul else found
    if pa.types.is_nested(kind):
        return _text_array([None if one is None else _as_json(one) for one in array.to_pylist()])[0]
    try:
        return array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array([None if one is None else str(one) for one in array.to_pylist()], pa.string())


def _captions(array: Any) -> Any:
    if not _is_list(array.type):
        return texts_of(array)
    return _text_array([text_of(first_text(one)) for one in array.to_pylist()])[0]


def _one_field(schema: pa.Schema, name: str) -> Any:
    found = [one for one in schema if one.name == name]
    if not found:
        raise MissingColumn(name, schema.names)
    if len(found) > 1:
        raise TableError(f"{len(found)} columns are called {name!r}; rename one of them")
    return found[0]


def _stored_type(kind: Any) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return kind
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else pa.string()


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _is_binary(kind: pa.DataType) -> bool:
    fixed = pa.types.is_fixed_size_binary(kind)
    return fixed or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()


# Separated values


def _read_separated(file: Any, columns: Columns, delimiter: str, quoting: Quoting | None) -> Iterator[pa.RecordBatch]:
    csv.field_size_limit(sys.maxsize)
    if quoting is None:
        quoting = _found_quoting(file, delimiter)
        file.seek(0)
    rows = csv.reader(_text_lines(file), **_dialect(delimiter, quoting))
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            raise TableError("the file is empty")
        for name in columns.names():
            if name not in header:
                raise MissingColumn(name, _printable(header))
            if header.count(name) > 1:
                raise TableError(f"{header.count(name)} columns are called {name!r}; rename one of them")
        places = [header.index(name) for name in columns.names()]
        yield from _batches(_separated_rows(rows, places, len(header)), columns)
    except csv.Error as error:
        advice = "if quotation marks belong to the text, say --quoting none"
        raise TableError(f"line {rows.line_num}: {error}; {advice}") from error


def _separated_rows(rows: Any, places: Sequence[int], width: int) -> Iterator[tuple[Sequence[str | None], str | None]]:
    pick = itemgetter(*places) if len(places) > 1 else lambda row: (row[places[0]],)
    for row in rows:
        if len(row) == width:
            yield pick(row), None
        elif row:
            problem = f"line {rows.line_num} has {len(row)} values, the table has {width} columns"
            yield [None] * len(places), problem


def _dialect(delimiter: str, quoting: Quoting) -> dict[str, Any]:
    if quoting == "none":
        return {"delimiter": delimiter, "quoting": csv.QUOTE_NONE, "quotechar": None}
    return {"delimiter": delimiter, "strict": True}


def _found_quoting(file: Any, delimiter: str) -> Quoting:
    """Whether quotation marks enclose values: they do where each that opens a value closes it, too.

    Raises:
        TableError: a value would hold a line break and a delimiter, as rows do that an open quotation mark joins.
    """
    if not any(b'"' in block for block in iter(lambda: file.read(1 << 24), b"")):
        return "minimal"
    file.seek(0)
    rows = csv.reader(_text_lines(file), **_dialect(delimiter, "minimal"))
    began = 1
    try:
        for row in rows:
            joined = rows.line_num > began and any("\n" in value and delimiter in value for value in row)
            if joined:
                raise TableError(
                    f"a quotation mark in line {began} opens a value that ends in line {rows.line_num}; say --quoting "
                    "none if quotation marks belong to the text, --quoting minimal if they enclose values"
                )
            began = rows.line_num + 1
    except csv.Error as error:
        logger.warning("quotation marks belong to the text (line %d: %s): --quoting none", rows.line_num, error)
        return "none"
    logger.info("quotation marks enclose values: --quoting minimal")
    return "minimal"


# JSON


class WrittenNumber(float):
    """A number of JSON with the text that it was written as: ``0.10`` is not 0.1, and 1e400 is not infinity."""

    text: str

    def __new__(cls, text: str) -> "WrittenNumber":
        """Read ``text``, which is a number of JSON."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def _written_integer(text: str) -> int | WrittenNumber:
    """A whole number of JSON; Python refuses to read one of more than 4,300 digits."""
    return int(text) if len(text) < 4000 else WrittenNumber(text)


AS_WRITTEN: dict[str, Any] = {"parse_float": WrittenNumber, "parse_int": _written_integer}
"""Arguments of ``json.loads`` with which :func:`text_of` gives numbers as they were written."""


def first_text(value: Any) -> Any:
    """The first element of a list that is not null, and of a list in it; other values as they are."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(reversed(value))
        elif value is not None:
            return value
    return None


def text_of(value: Any) -> str | None:
    """A value of JSON or Arrow as text: JSON for lists and objects, ``true`` and ``false`` for booleans."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _as_json(value)


def stored_text(value: Any) -> str | None:
    """A value of JSON as text that can be stored."""
    text = text_of(value)
    return None if text is None else storable(text)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # infinity or NaN, which JSON does not have
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, and a text for a number that floats cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return value.text if isinstance(value, WrittenNumber) else None


def _read_objects(file: Any, columns: Columns, objects: Callable[[Any], Iterable[Any]]) -> Iterator[pa.RecordBatch]:
    names = columns.names()
    seen: dict[str, None] = {}

    def rows() -> Iterator[tuple[Sequence[str | None], str | None]]:
        for number, record in enumerate(objects(file), 1):
            if isinstance(record, str):
                yield [None] * len(names), record
                continue
            seen.update(dict.fromkeys(record))
            yield _object_row(record, columns, names, number)

    yield from _batches(rows(), columns)
    for name in names if seen else ():
        if name not in seen:
            raise MissingColumn(name, _printable(seen))


def _object_row(
    record: Mapping[str, Any], columns: Columns, names: Sequence[str], number: int
) -> tuple[Sequence[str | None], str | None]:
    values: list[str | None] = []
    for name in names:
        value = record.get(name)
        if type(value) is str:
            values.append(value)
            continue
        if name == columns.caption:
            value = first_text(value)
        if isinstance(value, dict | list) and name not in columns.others:
            kind = "an object" if isinstance(value, dict) else "a list"
            return [None] * len(names), f"row {number}: {name!r} is {kind}, not a text"
        try:
            values.append(text_of(value))
        except RecursionError:
            return [None] * len(names), f"row {number}: {name!r} is nested too deep"
    return values, None


def _objects_of_lines(file: Any) -> Iterator[dict[str, Any] | str]:
    """The object of each line, or what is wrong with the line."""
    for number, line in enumerate(_text_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = _parsed(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number} is no JSON: {error}"
            continue
        yield record if isinstance(record, dict) else f"line {number} is no JSON object"


def _objects_of_document(file: Any) -> Iterable[dict[str, Any] | str]:
    """The objects of a list, or of an object of columns as pandas writes it: lists, or objects by row."""
    try:
        plain = _parsed("".join(_text_lines(file)))
    except (ValueError, RecursionError) as error:
        raise TableError(f"{error}; for one object per line set --input-format jsonl") from error
    if isinstance(plain, list):
        return [row if isinstance(row, dict) else f"row {n} is no JSON object" for n, row in enumerate(plain, 1)]
    if isinstance(plain, dict) and all(isinstance(column, dict) for column in plain.values()):
        keys = dict.fromkeys(key for column in plain.values() for key in column)
        return [{name: column[key] for name, column in plain.items() if key in column} for key in keys]
    if isinstance(plain, dict) and all(isinstance(column, list) for column in plain.values()):
        lengths = {len(column) for column in plain.values()}
        if len(lengths) <= 1:
            return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
        raise TableError(f"its columns have different lengths: {', '.join(map(str, sorted(lengths)))}")
    raise TableError("neither a list of objects nor an object of columns")


def _parsed(text: str) -> Any:
    return json.loads(text, **AS_WRITTEN)


# All text formats


def _text_lines(file: Any) -> io.TextIOWrapper:
    """The lines with their ends as they are; bytes that are not of the encoding become lone surrogates."""
    start = file.peek(4)[:4] if hasattr(file, "peek") else b""
    if not start:
        start = file.read(4)
        file.seek(0)
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            raise TableError(what)
    encoding = encoding_of(start)
    if encoding == "utf-8-sig" and b"\0" in start:
        raise TableError("it begins with NUL bytes: no text, or UTF-16 without a byte-order mark")
    return _KeptOpen(file, encoding=encoding, errors="surrogateescape", newline="")


def _printable(names: Iterable[str]) -> list[str]:
    """Names of strangers for a message on a terminal."""
    return [name if name.isprintable() else repr(storable(name)) for name in names]


class _KeptOpen(io.TextIOWrapper):
    """A text view of a binary file that leaves the file open."""

    def __del__(self) -> None:
        try:
            self.detach()
        except ValueError:
            pass  # closed by the reader already


def _text_array(values: Sequence[str | None]) -> tuple[Any, int]:
    """The texts as Arrow can store them, and how many had to be changed for it."""
    try:
        array = pa.array(values, pa.string())
        if not pc.any(pc.match_substring(array, "\0")).as_py():
            return array, 0
    except UnicodeEncodeError:
        pass  # a lone surrogate
    kept = [None if value is None else storable(value) for value in values]
    return pa.array(kept, pa.string()), sum(one != other for one, other in zip(values, kept, strict=True))


def _batches(rows: Iterator[tuple[Sequence[str | None], str | None]], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Batches of rows and their problems; what could not be stored as it is, is counted and reported once."""
    schema = columns.schema()
    held: list[Sequence[str | None]] = []
    problems: list[str | None] = []
    good = changed = 0
    first_problem: str | None = None

    def batch() -> pa.RecordBatch:
        nonlocal changed
        arrays = []
        for values in zip(*held, strict=True):
            array, count = _text_array(values)
            arrays.append(array)
            changed += count
        return pa.RecordBatch.from_arrays([*arrays, pa.array(problems, pa.string())], schema=schema)

    for values, problem in rows:
        held.append(values)
        problems.append(None if problem is None else storable(problem))
        good += problem is None
        first_problem = first_problem or problem
        if len(held) == BATCH_ROWS:
            yield batch()
            held, problems = [], []
    if first_problem and not good:
        raise TableError(f"no row can be read: {first_problem}")
    if held:
        yield batch()
    if changed:
        logger.warning("%d values hold bytes or characters that UTF-8 cannot store; each became ?", changed)
