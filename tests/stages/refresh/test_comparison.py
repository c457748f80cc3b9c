"""The comparison of a refresh, checked against a simple one with dictionaries, over random rows with repeats."""

import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.stages.refresh import comparison
from pipeline.stages.refresh.comparison import (
    FAILED,
    GONE,
    HIDDEN,
    LISTED,
    VISIBLE,
    WANTED,
    Partitions,
    compare,
    place,
    records,
)

Ledger = list[tuple[str, int, int]]


def plainly(source: list[str], shards: Ledger, again: int) -> dict[str, object]:
    """By hand, one row after the other: visible first, then gone, then hidden, then the latest failure."""
    known: defaultdict[str, Ledger] = defaultdict(list)
    for entry in shards:
        known[entry[0]].append(entry)
    for entries in known.values():
        rank = {VISIBLE: 0, GONE: 1, HIDDEN: 2}
        entries.sort(key=lambda entry: (rank.get(entry[1], 3), entry[2] if entry[1] < FAILED else -entry[2]))
    fresh, kept, back, retried = [], [], [], 0
    for at, name in enumerate(source):
        match known[name]:
            case [first, *rest]:
                known[name] = rest
                if first[1] == VISIBLE:
                    kept.append(first[2])
                elif first[1] == GONE:
                    back.append(first[2])
                elif first[1] == again:
                    fresh.append(at)
                    retried += 1
            case []:
                fresh.append(at)
    gone = [entry[2] for entries in known.values() for entry in entries if entry[1] == VISIBLE]
    return {"fresh": fresh, "kept": len(kept), "back": sorted(back), "gone": sorted(gone), "retried": retried}


@pytest.mark.parametrize("held", [5, 2_000_000])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_a_plain_comparison_finds(
    seed: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "HELD_RECORDS", held)
    chance = random.Random(seed)
    names = [f"row {number}" for number in range(30)]
    source = chance.choices(names, k=60)
    states = [VISIBLE, VISIBLE, GONE, HIDDEN, FAILED, FAILED + 1]
    shards = [(chance.choice(names), chance.choice(states), at) for at in range(80)]
    here, there = Partitions(tmp_path, "here"), Partitions(tmp_path, "there")
    for start in range(0, 60, 7):
        part = source[start : start + 7]
        wanted = np.full(len(part), WANTED, np.uint8)
        here.add(records([(name,) for name in part], [None] * len(part), np.arange(start, start + len(part)), wanted))
    for start in range(0, 80, 9):
        rows = shards[start : start + 9]
        at, found = np.array([row[2] for row in rows]), np.array([row[1] for row in rows], np.uint8)
        there.add(records([(row[0],) for row in rows], [None] * len(rows), at, found))
    again = np.zeros(256, np.bool_)
    again[FAILED + 1] = True
    found_all = compare(here, there, again)
    expected = plainly(source, shards, FAILED + 1)
    assert {
        "fresh": len(found_all.fresh),
        "kept": found_all.kept,
        "back": found_all.back.tolist(),
        "gone": found_all.gone.tolist(),
        "retried": found_all.retried,
    } == {**expected, "fresh": len(expected["fresh"])}  # type: ignore[arg-type]
    # Which of several equal rows is fetched does not matter, what it holds does.
    fetched = Counter(source[at] for at in found_all.fresh)
    assert fetched == Counter(source[at] for at in expected["fresh"])  # type: ignore[attr-defined]
    accounted = found_all.kept + len(found_all.back) + len(found_all.fresh)
    assert accounted + found_all.failures.total() + found_all.hidden.total() == found_all.rows == 60


def test_images_with_another_body_are_changed_and_listed_rows_are_not_tried_again(tmp_path: Path) -> None:
    here, there = Partitions(tmp_path, "here"), Partitions(tmp_path, "there")
    rows = [("a",), ("b",), ("c",)]
    here.add(records(rows, ["ff" * 32, "11" * 32, None], np.arange(3), np.array([WANTED, WANTED, LISTED], np.uint8)))
    at = np.array([place(7, index) for index in range(3)])
    there.add(records(rows, ["00" * 31 + "01", "11" * 32, None], at, np.array([VISIBLE, VISIBLE, FAILED], np.uint8)))
    again = np.zeros(256, np.bool_)
    again[FAILED] = True
    # The first digest begins with zeros: what is kept of it says "unknown", which is never a difference.
    found = compare(here, there, again)
    assert (found.kept, found.changed, found.retried, len(found.fresh)) == (2, 0, 0, 0)
    there = Partitions(tmp_path, "others")
    there.add(records(rows, ["ee" * 32, "11" * 32, None], at, np.array([VISIBLE, VISIBLE, FAILED], np.uint8)))
    found = compare(here, there, again)
    assert (found.kept, found.changed, found.fresh.tolist(), found.gone.tolist()) == (1, 1, [0], [place(7, 0)])
