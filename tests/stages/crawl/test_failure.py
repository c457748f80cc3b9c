"""The error classes compared with the table in the documentation."""

import re
from pathlib import Path

import pytest

from pipeline.stages.crawl.failure import ERROR_CLASSES, TRANSIENT, Failure, http_failure

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


def table() -> dict[str, bool]:
    """Class -> whether it is retried at once, according to docs/operations.md."""
    part = GUIDE.read_text().partition("### Why rows fail")[2].partition("###")[0]
    rows = [line.split("|") for line in part.splitlines() if line.startswith("| `")]
    return {name: row[3].strip() == "yes" for row in rows for name in re.findall(r"`(\w+)`", row[1])}


def test_the_guide_has_every_class() -> None:
    assert set(ERROR_CLASSES) <= set(table())


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
def test_the_guide_says_what_is_tried_again(error_class: str) -> None:
    assert table()[error_class] is (error_class in TRANSIENT) is Failure(error_class, "").may_pass


@pytest.mark.parametrize(
    ("status", "error_class"),
    [(300, "http_3xx"), (404, "http_4xx"), (429, "http_429"), (500, "http_5xx"), (599, "http_5xx"), (999, "http_5xx")],
)
def test_a_status_has_a_class(status: int, error_class: str) -> None:
    assert http_failure(status).error_class == error_class and http_failure(status).http_status == status
