"""Opt-out lists: the rows that an entry matches, and those it does not."""

from pathlib import Path

import pandas
import pytest

from pipeline.errors import SettingError
from pipeline.stages.refresh.opt_out import OptOut, read_opt_out


@pytest.mark.parametrize(
    ("entry", "reached", "not_reached"),
    [
        (
            "https://a.example/x.jpg",
            ["https://a.example/x.jpg", "HTTP://A.example/x.jpg#y"],
            ["https://a.example/x.jp"],
        ),
        ("https://a.example/X.jpg", ["https://a.example/X.jpg"], ["https://a.example/x.jpg"]),
        (
            "https://a.example/p/",
            ["http://a.example/p/1.jpg", "https://me@a.example/p/"],
            ["https://a.example/q/p/1.jpg"],
        ),
        ("a.example/img*", ["https://a.example/img7.jpg", "https://a.example/img/s"], ["https://b.example/img7.jpg"]),
        (
            "a.example",
            ["https://a.example/x", "http://cdn.A.EXAMPLE:8080/y"],
            ["https://xa.example/", "https://example/"],
        ),
        ("https://a.example/", ["https://a.example/x"], ["https://b.a.example/x"]),
        ("http://[2001:db8::1]/*", ["http://[2001:DB8::1]/x"], ["http://[2001:db8::2]/x"]),
        ("people/7.jpg", ["people/7.jpg"], ["people/17.jpg", "7.jpg"]),
        ("7.jpg", ["7.jpg"], ["people/7.jpg", "https://a.example/7.jpg"]),
        ("https://a.example/é x.jpg", ["https://a.example/é x.jpg"], ["https://a.example/e x.jpg"]),
    ],
)
def test_what_an_entry_reaches(entry: str, reached: list[str], not_reached: list[str]) -> None:
    found = OptOut([entry]).matches(reached + not_reached)
    assert found.tolist() == [True] * len(reached) + [False] * len(not_reached)


def test_digests_and_keys_are_compared_with_their_own_columns() -> None:
    listed = OptOut(["AB" * 32, "000000017"])
    keys, bodies = ["000000016", "000000017", "000000018"], ["ab" * 32, None, "cd" * 32]
    assert listed.matches(["a", "b", "c"], keys, bodies).tolist() == [True, True, False]


def test_an_empty_list_reaches_nothing() -> None:
    assert OptOut().matches(["", "a"], ["", ""]).tolist() == [False, False]
    assert OptOut(["x"]).matches(["", "a"], ["", ""], [None, None]).tolist() == [False, False]


def test_text_and_parquet_say_the_same(tmp_path: Path) -> None:
    text, table = tmp_path / "list.txt", tmp_path / "list.parquet"
    text.write_bytes("\ufeff# comment\r\nhttps://a.example/1.jpg\r\n\r\n  b.example  \r\n".encode())
    pandas.DataFrame({"when": [1, 2, 3], "url": ["https://a.example/1.jpg", None, "b.example"]}).to_parquet(table)
    urls = ["https://a.example/1.jpg", "https://b.example/", "https://c.example/"]
    for path in (text, table):
        assert read_opt_out(str(path)).matches(urls).tolist() == [True, True, False]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"not parquet"])
def test_a_list_that_cannot_be_read_is_a_wrong_setting(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / ("list.parquet" if content == b"not parquet" else "list.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match="opt_out"):
        read_opt_out(str(path))
