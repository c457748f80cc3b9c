"""Tables as strangers write them: every value is kept or its row says why not."""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.shards.text import decoded, escaped, storable
from pipeline.sources.source import Row
from pipeline.sources.tables import (
    PROBLEM,
    Columns,
    MissingColumn,
    TableError,
    column_types,
    joined_types,
    read_table,
    texts_of,
)
from pipeline.sources.urls import UrlTable

BOTH = Columns(texts=("url",), caption="caption")


def rows_of(content: bytes, form: str, columns: Columns = BOTH, **options: Any) -> list[dict[str, Any]]:
    return [row for batch in read_table(io.BytesIO(content), form, columns, **options) for row in batch.to_pylist()]


def captions(content: bytes, form: str, **options: Any) -> list[str | None]:
    return [row["caption"] for row in rows_of(content, form, **options)]


def url_rows(path: Path, scratch: Path, **options: Any) -> list[Row]:
    source = UrlTable(url_list=str(path), caption_col="caption", **options)
    pieces = list(source.slices(100, Folder(scratch)))
    return [row for piece in pieces for row in source.rows(piece)]


# Quotation marks


def test_marks_that_nobody_closes_belong_to_the_text() -> None:
    texts = ["plain", '"An open mark', "plain two", 'a 5" pipe', '"closed" five']
    content = "url\tcaption\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    assert captions(content.encode(), "tsv") == texts


def test_marks_that_enclose_values_are_taken_off() -> None:
    assert captions(b'url,caption\n1,"a, b"\n2,"say ""hi"""\n3,5" pipe\n', "csv") == ["a, b", 'say "hi"', '5" pipe']


def test_rows_that_two_marks_join_are_refused_unless_the_user_says_what_they_are() -> None:
    content = b'url,caption\n1,"begins\n2,in between\n3,ends"\n'
    with pytest.raises(TableError, match=r"line 2 .* line 4.*--quoting none.*--quoting minimal"):
        rows_of(content, "csv")
    assert captions(content, "csv", quoting="none") == ['"begins', "in between", 'ends"']
    assert captions(content, "csv", quoting="minimal") == ["begins\n2,in between\n3,ends"]


def test_an_open_mark_is_refused_where_marks_are_said_to_enclose() -> None:
    with pytest.raises(TableError, match="--quoting none"):
        rows_of(b'url,caption\n1,"open\n2,x\n', "csv", quoting="minimal")


AWKWARD = ("", " ", '"', '""', 'a"b', "a,b", "a\tb", "two\nlines", "two\r\nlines", "'", "\\", "ü", "🐈", 'x,\n"y')


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_what_pythons_writer_quotes_comes_back(form: str) -> None:
    values = list(itertools.product(AWKWARD, repeat=2))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="," if form == "csv" else "\t", quoting=csv.QUOTE_ALL)
    writer.writerows([("url", "caption"), *values])
    found = rows_of(file.getvalue().encode(), form, quoting="minimal")
    assert [(row["url"], row["caption"]) for row in found] == values


# Values


def test_csv_values_are_texts_whatever_they_look_like() -> None:
    others = {"id": pa.string(), "day": pa.string()}
    content = b"url,id,day,score\na,000123,2023-01-05,1\nb,1e5,,n.a.\n"
    found = rows_of(content, "csv", Columns(texts=("url",), others=others))
    assert [(row["id"], row["day"]) for row in found] == [("000123", "2023-01-05"), ("1e5", "")]


def test_a_late_odd_value_of_an_unasked_column_matters_to_nobody() -> None:
    line = b"http://host/%d.jpg,caption %d,%s\n"
    content = b"url,caption,score\n" + b"".join(line % (n, n, b"n.a." if n == 39_999 else b"1") for n in range(40_000))
    assert len(rows_of(content, "csv")) == 40_000


def test_json_values_become_the_texts_that_they_were() -> None:
    records = [
        {"url": "a"},
        {"url": "b", "caption": None},
        {"url": "c", "caption": 7},
        {"url": "d", "caption": ["first", "second"]},
        {"url": "e", "caption": "cut \ud83d"},
        {"url": "f", "caption": 0.5, "later": True},
        {"url": "g", "caption": "w" * 3_000_000},
    ]
    expected = [None, None, "7", "first", "cut ?", "0.5", "w" * 3_000_000]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    assert captions(lines, "jsonl") == expected
    assert captions(json.dumps(records).encode(), "json") == expected
    by_column = {name: {str(n): r[name] for n, r in enumerate(records) if name in r} for name in ("url", "caption")}
    assert captions(json.dumps(by_column).encode(), "json") == expected


WRITTEN = ["0.10", "1e400", "-0.0", "1E5", "12345678901234567890123", "7", "9" * 5000]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_numbers_of_json_are_the_texts_that_were_written(form: str) -> None:
    objects = [f'{{"url": "u", "caption": {number}}}' for number in WRITTEN]
    content = "\n".join(objects) if form == "jsonl" else f"[{', '.join(objects)}]"
    assert captions(content.encode(), form) == WRITTEN


def test_lists_and_objects_of_columns_are_json_that_any_reader_knows() -> None:
    columns = Columns(texts=("url",), others={"more": pa.string()})
    content = '{"url": "u", "more": {"a": [NaN, 1e400, 0.5, null], "b": %s}}' % ("9" * 5000)
    found = rows_of(content.encode(), "jsonl", columns)[0]["more"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(found, parse_constant=refuse) == {"a": [None, "1e400", 0.5, None], "b": "9" * 5000}
    nested = pa.array([{"bytes": b"caf\xe9", "none": float("nan"), "list": [float("inf")]}])
    expected = {"bytes": "caf\ufffd", "none": None, "list": [None]}
    assert json.loads(texts_of(nested)[0].as_py(), parse_constant=refuse) == expected


def test_the_caption_of_a_list_is_its_first_text() -> None:
    assert captions(b'{"url": "u", "caption": [null, [], "second"]}\n{"url": "v", "caption": [null]}', "jsonl") == [
        "second",
        None,
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_say_the_encoding(encoding: str) -> None:
    assert captions("url\tcaption\na\tcafé 🐈\n".encode(encoding), "tsv") == ["café 🐈"]
    assert captions('{"url": "a", "caption": "café"}\n'.encode(encoding), "jsonl") == ["café"]
    assert decoded("café".encode(encoding)) == "café"


def test_bytes_that_are_no_utf_8_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert captions(b"url,caption\na,caf\xe9\nb,plain\n", "csv") == ["caf?", "plain"]
    assert "1 values" in caplog.text


def test_storable_text_survives_utf_8() -> None:
    for text in ("plain", "nul\0", "half \ud83d", "café"):
        assert storable(text).encode().decode() == storable(text) and "\0" not in storable(text)


# Odd rows


def test_an_odd_row_is_a_row_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("url,caption\nhttp://a,x\nhttp://b,y,z\nhttp://c\n\nhttp://d,w\n")
    rows = url_rows(tmp_path / "t.csv", tmp_path / "scratch")
    assert [row.url for row in rows] == ["http://a", "", "", "http://d"]
    assert [row.problem and row.problem.message for row in rows[1:3]] == [
        "line 3 has 3 values, the table has 2 columns",
        "line 4 has 1 values, the table has 2 columns",
    ]


@pytest.mark.parametrize("odd", ['{"url":', "[1]", "[" * 3000, '{"url": {"href": "x"}}', '{"url": "x", "caption": {}}'])
def test_a_line_that_is_no_object_is_one_row(odd: str) -> None:
    found = rows_of(('{"url": "a", "caption": "x"}\n' + odd + '\n{"url": "b"}\n').encode(), "jsonl")
    assert [row["url"] for row in found] == ["a", None, "b"] and found[1][PROBLEM]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_column_that_is_nested_too_deep_is_one_row(form: str) -> None:
    deep = '{"url": "a", "more": ' + "[" * 600 + "NaN" + "]" * 600 + "}"
    content = deep + '\n{"url": "b"}' if form == "jsonl" else f'[{deep}, {{"url": "b"}}]'
    found = rows_of(content.encode(), form, Columns(texts=("url",), others={"more": pa.string()}))
    assert [row["url"] for row in found] == [None, "b"] and "too deep" in found[0][PROBLEM]


def test_blank_lines_before_the_header_are_skipped() -> None:
    assert captions(b"\n\nurl,caption\n1,one\n", "csv") == ["one"]


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl"])
def test_other_files_by_that_name_are_called_what_they_are(form: str) -> None:
    parquet = io.BytesIO()
    pq.write_table(pa.table({"url": ["a"]}), parquet)
    text = b"url,caption\na,b\n"
    files = {"parquet file": parquet.getvalue(), "gzip": gzip.compress(text, mtime=0), "bzip2": bz2.compress(text)}
    for expected, content in {**files, "UTF-16 without": text.decode().encode("utf-16-le")}.items():
        with pytest.raises(TableError, match=expected):
            rows_of(content, form)


def test_names_of_columns_do_not_reach_the_terminal_as_control_characters() -> None:
    with pytest.raises(MissingColumn) as error:
        rows_of(b"\x1b[2Jodd,caption\na,b\n", "csv")
    assert str(error.value).isprintable()


def test_a_key_that_no_object_has_is_missing() -> None:
    with pytest.raises(MissingColumn, match=r"'caption'.*url, text"):
        rows_of(b'{"url": "a"}\n{"url": "b", "text": "x"}\n', "jsonl")


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_a_column_that_is_asked_for_must_be_there_once(form: str) -> None:
    twice = b"url,caption,caption\na,b,c\n".replace(b",", b"," if form == "csv" else b"\t")
    with pytest.raises(TableError, match="2 columns are called 'caption'"):
        rows_of(twice, form)
    assert rows_of(twice, form, Columns(texts=("url",)))[0]["url"] == "a"


# Parquet


def parquet(table: pa.Table) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(table, file)
    file.seek(0)
    return file


def test_every_type_of_parquet_is_text() -> None:
    values: dict[str, tuple[Any, str]] = {
        "day": (pa.array([datetime.date(2023, 1, 5)]), "2023-01-05"),
        "time": (pa.array([datetime.time(12, 30)]), "12:30:00.000000"),
        "price": (pa.array([decimal.Decimal("1.50")]), "1.50"),
        "tags": (pa.array([["x", "y"]]), '["x", "y"]'),
        "pair": (pa.array([{"a": 1, "b": None}]), '{"a": 1, "b": null}'),
        "bytes": (pa.array([b"caf\xe9"]), "caf\ufffd"),
        "fixed": (pa.array([b"abcd"], pa.binary(4)), "abcd"),
        "large": (pa.array(["x"], pa.large_string()), "x"),
        "coded": (pa.array(["x"]).dictionary_encode(), "x"),
        "unsigned": (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
        "truth": (pa.array([True]), "true"),
        "span": (pa.array([datetime.timedelta(seconds=3)]), "0:00:03"),
        "nothing": (pa.nulls(1), None),  # type: ignore[dict-item]
    }
    for name, (array, expected) in values.items():
        found = texts_of(array)
        if name != "span":  # Arrow and Python write it differently; either is a text
            assert found.to_pylist() == [expected], name
        assert found.type == pa.string() and texts_of(array.slice(0, 0)).to_pylist() == []


def test_bytes_in_a_string_column_that_are_no_utf_8(tmp_path: Path) -> None:
    bad = pa.array([b"http://a", b"http://\xff"]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    pq.write_table(pa.table({"url": broken, "caption": broken}), tmp_path / "t.parquet")
    assert [row.caption for row in url_rows(tmp_path / "t.parquet", tmp_path / "scratch")] == ["http://a", "http://�"]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((pa.int8(), pa.uint32()), pa.int64()),
        ((pa.int64(), pa.float32()), pa.float64()),
        ((pa.null(), pa.int16()), pa.int64()),
        ((pa.null(), pa.null()), pa.string()),
        ((pa.string(), pa.large_string()), pa.string()),
        ((pa.date32(), pa.dictionary(pa.int8(), pa.string())), pa.string()),
    ],
)
def test_parts_of_one_meaning_join(kinds: tuple[pa.DataType, ...], expected: pa.DataType) -> None:
    parts = [column_types(pa.schema([("c", kind)]), ["c"]) for kind in kinds]
    assert joined_types(parts) == joined_types(parts[::-1]) == {"c": expected}


def test_parts_of_different_meanings_are_refused() -> None:
    with pytest.raises(TableError, match="'c' is int64 in one part and string in another"):
        joined_types([{"c": pa.int64()}, {"c": pa.string()}])


def test_parts_become_one_table(tmp_path: Path) -> None:
    parts = [
        pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.null()), "n": pa.array([], pa.int8())}),
        pa.table({"url": ["a"], "caption": ["x"], "n": [1]}),
        pa.table(
            {"n": [2.5], "caption": pa.array(["y"], pa.large_string()), "url": pa.array(["b"], pa.large_string())}
        ),
    ]
    for number, part in enumerate(parts):
        pq.write_table(part, tmp_path / f"{number}.parquet")
    source = UrlTable(url_list=str(tmp_path), caption_col="caption", save_additional_columns=("n",))
    pieces = list(source.slices(9, Folder(tmp_path / "s")))
    rows = [row for piece in pieces for row in source.rows(piece)]
    assert source.schema() == {"n": float}
    assert [(row.url, row.caption, row.columns["n"]) for row in rows] == [("a", "x", 1.0), ("b", "y", 2.5)]


@pytest.mark.parametrize("kind", [pa.struct([("en", pa.string())]), pa.list_(pa.struct([("raw", pa.string())]))])
def test_captions_that_are_no_texts_are_refused(kind: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "caption": pa.array([None], kind)}), tmp_path / "t.parquet")
    with pytest.raises(SettingError, match="a caption is a text or a list of texts"):
        url_rows(tmp_path / "t.parquet", tmp_path / "scratch")


def test_lists_of_captions_give_their_first(tmp_path: Path) -> None:
    table = pa.table({"url": ["a", "b", "c"], "caption": [["one", "two"], [], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row.caption for row in url_rows(tmp_path / "t.parquet", tmp_path / "scratch")] == ["one", "", ""]


def test_escaped_names_stay_different() -> None:
    names = [name.decode("utf-8", "surrogateescape") for name in (b"a", b"caf\xe9", b"caf\xe8", "café".encode())]
    assert [escaped(name) for name in names] == ["a", "caf%E9", "caf%E8", "café"]
