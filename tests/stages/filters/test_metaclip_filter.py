"""MetaCLIP as a filter: two passes over shards give what one loop over everything would."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SettingError
from pipeline.stages.filters import metaclip
from pipeline.stages.filters.metaclip import MetaClip, draw, read_entries
from pipeline.stages.filters.run import filter_snapshot, read_reasons
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
ENTRIES = ["red", "green", "blue", "a red", "rare"]


@pytest.fixture
def entries(tmp_path: Path) -> str:
    """The path of a list of entries."""
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(ENTRIES))
    return str(path)


def test_balancing_over_shards_is_the_plain_loops(make_data: Any, entries, monkeypatch):
    monkeypatch.setattr(metaclip, "SHARDS_PER_COUNT", 4)
    random = np.random.default_rng(0)
    words = ["red", "red", "red", "green", "blue", "a", "none", "rare"]
    captions = [" ".join(random.choice(words, 3, p=[0.2, 0.2, 0.15, 0.2, 0.1, 0.1, 0.04, 0.01])) for _ in range(120)]
    snapshot = make_data(captions, per_shard=9)
    outcome = filter_snapshot(snapshot, [MetaClip(entries=entries, entry_limit=12, balancing_seed=5)], HERE)
    tables = [table for _, table in read_reasons(outcome.snapshot)]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    found = [reason for table in tables for reason in table["reason"].to_pylist()]
    matched = [[entry for entry in ENTRIES if f" {entry} " in f" {caption} "] for caption in captions]
    counts = Counter(entry for some in matched for entry in some)
    expected = []
    for key, some in zip(keys, matched, strict=True):
        draws = [draw(5, [key], [entry], np.array([0]), np.array([0]))[0] for entry in some]
        stays = any(12 / max(counts[entry], 12) > drawn for entry, drawn in zip(some, draws, strict=True))
        expected.append("" if stays else "metaclip.balanced" if some else "metaclip.no_entry")
    assert found == expected
    assert set(expected) == {"", "metaclip.balanced", "metaclip.no_entry"}


def test_a_limit_above_all_counts_keeps_every_match(make_data: Any, entries):
    outcome = filter_snapshot(make_data(["red", "Red", "a green", "greens"]), [MetaClip(entries=entries)], HERE)
    assert outcome.dropped == {"metaclip.no_entry": 2}


def test_lists_are_json_or_lines(tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("red\nhot dog\n\nred\nüber\n", encoding="utf-8")
    assert read_entries(str(tmp_path / "lines.txt")) == ("red", "hot dog", "über")
    monkeypatch.chdir(tmp_path)
    assert read_entries("lines.txt") == ("red", "hot dog", "über")


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "[", "\n \n"])
def test_what_is_no_list_is_refused(content, tmp_path, make_data: Any):
    place = tmp_path / "list"
    if content is not None:
        place.write_text(content)
    with pytest.raises(SettingError, match="^entries:"):
        filter_snapshot(make_data(["a"]), [MetaClip(entries=str(place))], HERE)
