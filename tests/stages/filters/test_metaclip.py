"""MetaCLIP's balancing compared with a simple implementation of its description."""

import numpy as np
import pytest

from pipeline.stages.filters.metaclip import EntryAutomaton, draw, keep_probability, spaced, spaced_entry

WORDS = ["cat", "Cat", "a", "the", "new york", "york", "hot dog", "dog", ".", "c++", "über", "at", "猫", " odd", "a a"]


def spaced_plainly(text: str) -> str:
    text = f" {text} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, f" {mark} ")
    for space in ["\t", "\n", "\r"]:
        text = text.replace(space, " ")
    return text


def random_captions(count: int) -> list[str]:
    random = np.random.default_rng(0)
    parts = [
        *(word.strip() for word in WORDS),
        "hot",
        "new",
        "New York",
        ",",
        "x",
        "cat,dog",
        "a\tcat",
        "line\nend",
        "  ",
    ]
    return [" ".join(random.choice(parts, random.integers(0, 9))) for _ in range(count)]


@pytest.mark.parametrize("text", ["a cat, a dog", "end.", "a\tb\nc\rd", "`quoted`", "", "what?! (no)", "x;y:z"])
def test_spacing(text):
    assert spaced(text) == spaced_plainly(text)


def test_matches_are_the_substrings():
    captions = random_captions(2500)
    rows, entries = EntryAutomaton(WORDS).match(captions)
    expected = [
        (row, entry)
        for row, caption in enumerate(captions)
        for entry, word in enumerate(WORDS)
        if spaced_entry(word) in spaced_plainly(caption)
    ]
    assert list(zip(rows.tolist(), entries.tolist(), strict=True)) == expected
    assert len({entry for _, entry in expected}) == len(WORDS)


def test_no_captions_match_nothing():
    assert [len(found) for found in EntryAutomaton(WORDS).match([])] == [0, 0]
    assert [len(found) for found in EntryAutomaton(WORDS).match(["", "zzz"])] == [0, 0]


def test_the_papers_probabilities():
    counts = np.array([0, 1, 20_000, 40_000, 2_000_000])
    assert keep_probability(counts, 20_000).tolist() == [1, 1, 1, 0.5, 0.01]


def test_draws_are_uniform_and_depend_on_seed_key_and_entry_only():
    keys, entries = [f"{number:09d}" for number in range(300)], [f"entry {number}" for number in range(100)]
    rows, places = (part.ravel() for part in np.meshgrid(np.arange(300), np.arange(100), indexing="ij"))
    draws = draw(0, keys, entries, rows, places)
    assert draws.min() >= 0 and draws.max() < 1 and len(set(draws.tolist())) == 30_000
    # Kolmogorov's distance from the uniform distribution, whose 99.9 % bound is 1.95 / sqrt(n).
    assert np.abs(np.sort(draws) - np.arange(30_000) / 30_000).max() < 1.95 / np.sqrt(30_000)
    grid = draws.reshape(300, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    # Another order of both, and parts of each: the same draws.
    again = draw(0, keys[::-1], entries[::-1], np.array([299 - 7, 299 - 8]), np.array([99 - 3, 99 - 4]))
    assert again.tolist() == [grid[7, 3], grid[8, 4]]
    assert not np.isin(draw(1, keys, entries, rows, places), draws).any()


def test_the_share_that_is_kept_is_one_minus_the_product():
    keys = [f"k{number}" for number in range(20_000)]
    probability = np.array([0.1, 0.25])
    rows, places = np.repeat(np.arange(20_000), 2), np.tile([0, 1], 20_000)
    hits = draw(3, keys, ["one", "two"], rows, places) < probability[places]
    share = hits.reshape(-1, 2).any(axis=1).mean()
    assert share == pytest.approx(1 - 0.9 * 0.75, abs=0.012)
