"""Url tables of every format give the same rows in the same slices."""

import gzip
import json
from pathlib import Path

import pandas
import pyarrow as pa
import pytest

from pipeline.errors import SettingError
from pipeline.shards.storage import Folder
from pipeline.sources import urls
from pipeline.sources.source import Row, Slice
from pipeline.sources.urls import UrlTable

FRAME = pandas.DataFrame(
    {
        "url": [f"http://host/{number}.jpg" for number in range(7)],
        "caption": ["plain", 'quoted "x", comma', "two\nlines", "café 🐈", "007", "", "tab\there"],
        "similarity": [0.5, 0.25, 0.125, 1.5, 2.5, 3.5, 4.5],
        "unused": range(7),
    }
)
FORMATS = ["parquet", "csv", "tsv", "json", "jsonl", "csv.gz", "jsonl.gz"]


def saved(folder: Path, form: str, frame: pandas.DataFrame = FRAME, name: str = "table") -> str:
    path = folder / f"{name}.{form}"
    if form == "parquet":
        frame.to_parquet(path)
    elif form.startswith(("csv", "tsv")):
        frame.to_csv(path, index=False, sep="\t" if form.startswith("tsv") else ",")
    else:
        frame.to_json(path, orient="records", lines=form.startswith("jsonl"))
    return str(path)


def read(source: UrlTable, scratch: Path, rows: int = 3) -> tuple[list[Slice], list[Row]]:
    slices = list(source.slices(rows, Folder(scratch)))
    return slices, [row for piece in slices for row in source.rows(piece)]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_rows_that_pandas_wrote(form: str, tmp_path: Path) -> None:
    source = UrlTable(url_list=saved(tmp_path, form), caption_col="caption", save_additional_columns=("similarity",))
    slices, rows = read(source, tmp_path / "scratch")
    assert [piece.count for piece in slices] == [3, 3, 1]
    assert [row.url for row in rows] == FRAME["url"].tolist()
    assert [row.caption for row in rows] == FRAME["caption"].tolist()
    kind = float if form == "parquet" else str
    assert [row.columns for row in rows] == [{"similarity": kind(value)} for value in FRAME["similarity"]]
    assert source.schema() == {"similarity": kind}


def test_json_of_columns_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    FRAME.to_json(path)
    _, rows = read(UrlTable(url_list=str(path), caption_col="caption"), tmp_path / "scratch")
    assert [row.caption for row in rows] == FRAME["caption"].tolist()


def test_equal_rows_have_equal_digests_whatever_the_format(tmp_path: Path) -> None:
    digests = set()
    for form in FORMATS:
        source = UrlTable(url_list=saved(tmp_path, form), caption_col="caption")
        digests.add(tuple(piece.digest for piece in read(source, tmp_path / form)[0]))
    assert len(digests) == 1


def test_a_changed_row_changes_the_digest_of_its_slice_alone(tmp_path: Path) -> None:
    changed = FRAME.copy()
    changed.loc[4, "caption"] = "other"
    before, _ = read(UrlTable(url_list=saved(tmp_path, "parquet"), caption_col="caption"), tmp_path / "a")
    path = saved(tmp_path, "parquet", changed, "changed")
    after, _ = read(UrlTable(url_list=path, caption_col="caption"), tmp_path / "b")
    assert [x.digest == y.digest for x, y in zip(before, after, strict=True)] == [True, False, True]


def test_a_folder_of_files_is_read_in_order_and_slices_end_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    saved(tmp_path / "in", "parquet", FRAME.iloc[:4], "b")
    saved(tmp_path / "in", "parquet", FRAME.iloc[4:], "a")
    slices, rows = read(UrlTable(url_list=str(tmp_path / "in")), tmp_path / "scratch")
    assert [piece.count for piece in slices] == [3, 3, 1]
    assert [row.url[-5] for row in rows] == list("4560123")


def test_small_batches_of_the_reader_do_not_move_the_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.tables.BATCH_ROWS", 2)
    slices, rows = read(UrlTable(url_list=saved(tmp_path, "parquet")), tmp_path / "scratch")
    assert [piece.count for piece in slices] == [3, 3, 1] and len(rows) == 7


def test_missing_values_become_empty_captions_and_urls(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"url": "http://a", "caption": None}) + "\n" + json.dumps({"caption": "x"}) + "\n")
    _, rows = read(UrlTable(url_list=str(path), caption_col="caption"), tmp_path / "scratch")
    assert [(row.url, row.caption) for row in rows] == [("http://a", ""), ("", "x")]


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_table_is_refused(form: str, tmp_path: Path) -> None:
    source = UrlTable(url_list=saved(tmp_path, form, FRAME.iloc[:0]))
    with pytest.raises(SettingError, match="url_list"):
        list(source.slices(3, Folder(tmp_path / "scratch")))


@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_column_is_named_with_those_there_are(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path, form)
    for options in ({"url_col": "link"}, {"caption_col": "link"}, {"save_additional_columns": ("link",)}):
        with pytest.raises(SettingError, match=r"link.*caption") as caught:
            list(UrlTable(url_list=path, **options).slices(3, Folder(tmp_path / "scratch")))
        assert caught.value.field in options


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"PAR1 not really"),
        ("t.csv", b""),
        ("t.csv", b"url,caption\n1,2,3\n"),
        ("t.json", b"{"),
        ("t.json", b"3"),
        ("t.jsonl", b'{"url":'),
        ("t.jsonl", b'[1]\n["url"]\n'),
        ("t.csv.gz", b"not gzip"),
        ("t.csv.gz", gzip.compress(b"url\nhttp://x\n" * 50, mtime=0)[:-12]),
        ("t.jsonl", b'{"url": {"href": "http://a"}}\n'),
        ("t.txt", b"http://a\n"),
    ],
)
def test_a_file_that_is_no_table_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingError):
        list(UrlTable(url_list=str(tmp_path / name)).slices(3, Folder(tmp_path / "scratch")))


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such file or folder"):
        list(UrlTable(url_list=str(tmp_path / "no.parquet")).slices(3, Folder(tmp_path)))


def test_reserved_and_repeated_columns_are_refused() -> None:
    with pytest.raises(SettingError, match="width"):
        UrlTable(url_list="x.csv", save_additional_columns=("width",))
    with pytest.raises(SettingError, match="once"):
        UrlTable(url_list="x.csv", caption_col="a", save_additional_columns=("a",))


def test_the_digest_sees_values_and_not_arrows_layout() -> None:
    texts = ["a", None, "", "bc", "ü" * 3, "d"]
    whole = pa.table({"url": texts, "n": [1, 2, 3, 4, 5, None]})
    chunked = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 1), whole.slice(3)])
    cut = pa.concat_tables([pa.table({"url": ["x"], "n": [0]}), whole]).slice(1)
    wide = whole.set_column(0, "url", whole["url"].cast(pa.large_string()))
    coded = whole.set_column(0, "url", whole["url"].dictionary_encode())
    assert len({urls._digest(table) for table in (whole, chunked, cut, wide, coded)}) == 1
    moved = (
        ["a", "", None, "bc", "ü" * 3, "d"],
        ["a", None, "", "b", "c" + "ü" * 3, "d"],
        ["ab", None, "", "c", "ü" * 3, "d"],
    )
    others = [whole.set_column(0, "url", pa.array(other)) for other in moved]
    assert len({urls._digest(table) for table in (whole, *others)}) == 4
