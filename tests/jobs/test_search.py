"""The search job as users type it: with and without a preset; wrong options said so before a model is loaded."""

from pathlib import Path

import pytest

from tests.evaluation.conftest import image
from tests.jobs.conftest import Type

TINY = ("--checkpoint", "clipmill-tiny:untrained")


def test_smoke_prints_and_writes_a_page(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("search", "smoke", "--data", str(tmp_path / "drawn"), "--output", "found.html") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["caption", "cosine", "key"] and len(lines) == 7
    assert lines[-1].endswith("found.html: 5 of 64 samples, 0 from a sidecar")
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img ") == 5 and "a red star" in page

    (tmp_path / "query").write_bytes(image((250, 0, 0)))
    words = ("--query-file", str(tmp_path / "query"), "--data", str(tmp_path / "drawn"), *TINY, "--top", "200")
    assert job("search", *words, "--medium", "image") == 0  # no preset is named
    assert "64 of 64 samples" in capsys.readouterr().out
    assert job("search", *words, "--medium", "audio") == 2
    assert "--medium" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--query", ""), "a text with a word"),
        (("--query", "a", "--query-file", "b"), "one of the two"),
        (("--query-file", "nowhere.jpg"), "--query-file"),
        (("--query", "a", "--top", "0"), "1 to 1000"),
        (("--query", "a", "--output", "page.pdf"), "ends in .html"),
        (("--query", "a", "--play-seconds", "0"), "--play-seconds"),
        (("--query", "a"), "no such set: 'nowhere'"),
    ],
)
def test_wrong_settings_are_said(
    job: Type, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("search", *words, "--data", "nowhere", *TINY) == 2
    assert sentence in capsys.readouterr().err
