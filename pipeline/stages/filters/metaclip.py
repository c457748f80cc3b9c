"""Balancing by MetaCLIP (Xu et al., 2023, "Demystifying CLIP data", arXiv 2309.16671, section 3).

Every caption is searched for a list of entries (the paper: 500,000 from WordNet and Wikipedia). An entry matches
between spaces, after the paper's spacing: case matters, and , . ; : ? ! ` are words. With ``count(e)`` captions
matching entry e and a limit t, entry e keeps a caption with probability

    p(e) = t / max(count(e), t)        t = 20,000 for 400M pairs, 170,000 for 2.5B

and a pair is kept if at least one of its entries keeps it. So rare entries keep all their captions, frequent ones about
t each, and captions without entries are dropped. There are two passes: counts over all shards, then sampling. The
random number of a caption and an entry is a hash of the seed, the sample's key and the entry, so it does not depend on
order or machine. (The paper's code uses a global random state; the rest is identical.)
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import parse_json, require
from pipeline.errors import unreadable
from pipeline.shards.storage import split_file
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView

PUNCTUATION = ",.;:?!`"
CHUNK = 1_000
SHARDS_PER_COUNT = 256


@dataclass(frozen=True, kw_only=True)
class MetaClip(Filter):
    """Balance captions over entries: ``no_entry`` without entries, ``balanced`` if no entry keeps the caption."""

    name: ClassVar[str] = "metaclip"
    rank: ClassVar[int] = 9
    scratch: ClassVar[tuple[str, ...]] = ("matches", "counts")
    entries: str = ""
    """List of entries: a JSON list of strings, or a text file with one entry per line; a path or fsspec URI."""
    entry_limit: int = 20_000
    """Limit t of the paper: approximate number of captions kept per entry."""
    balancing_seed: int = 0

    def check(self) -> None:
        """Require a readable list and a valid limit."""
        require(self.entry_limit >= 1, "entry_limit", self.entry_limit, "1 or more")
        read_entries(self.entries)

    def input_digest(self) -> str:
        """SHA-256 (hex) of the entries."""
        return hashlib.sha256("\n".join(read_entries(self.entries)).encode("utf-8", "surrogatepass")).hexdigest()

    def prepare(self, step: Step) -> None:
        """Make tables of matches by shard, counts by groups of shards, and total counts."""
        step.each_shard("matches", self._matches)
        step.each_part("counts", -(-len(step.shards) // SHARDS_PER_COUNT), _counts)
        step.each_part("total", 1, _total)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the stored captions, with the counts over all shards."""
        # The view is the one that was matched: a filter with a global view is the first of its pass.
        matches = step.read("matches", step.number(view))
        rows, entries = matches["row"].to_numpy(), matches["entry"].to_numpy()
        probability = keep_probability(_dense(step.read("total", 0), len(read_entries(self.entries))), self.entry_limit)
        draws = draw(self.balancing_seed, view.keys(), read_entries(self.entries), rows, entries)
        matched, kept = np.zeros(len(view), bool), np.zeros(len(view), bool)
        matched[rows] = True
        kept[rows[draws < probability[entries]]] = True
        return Verdict({"no_entry": ~matched, "balanced": ~kept})

    def _matches(self, view: ShardView) -> pa.Table:
        rows, entries = automaton(self.entries).match(view.captions(cleaned=False))
        return pa.table({"row": rows.astype(np.int32), "entry": entries.astype(np.int32)})


def spaced(text: str) -> str:
    """``text`` between spaces, with spaces around punctuation and in place of tabs and line ends."""
    # Seven replacements without matches are three times as fast as one str.translate.
    text = f" {text} "
    for mark in PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def spaced_entry(entry: str) -> str:
    """``entry`` as a search string, which begins and ends with a space."""
    return ("" if entry.startswith(" ") else " ") + entry + ("" if entry.endswith(" ") else " ")


class EntryAutomaton:
    """Finds many entries in captions at once (Aho and Corasick, 1975); 500,000 entries take 4 CPU seconds to build."""

    def __init__(self, entries: Sequence[str]) -> None:
        import ahocorasick_rs

        kind = ahocorasick_rs.Implementation.ContiguousNFA
        self._automaton = ahocorasick_rs.AhoCorasick([spaced_entry(entry) for entry in entries], implementation=kind)

    def match(self, captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and entry of every match, int64 [any] each, ascending, each entry once per caption."""
        found = [self._match_chunk(captions[start : start + CHUNK]) for start in range(0, len(captions), CHUNK)]
        rows = [chunk[0] + number * CHUNK for number, chunk in enumerate(found)]
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(rows), np.concatenate([chunk[1] for chunk in found])

    def _match_chunk(self, captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # One search through all captions of a chunk, separated by line ends, which no spaced caption contains.
        lines = [spaced(caption) for caption in captions]
        matches = self._automaton.find_matches_as_indexes("\n".join(lines), overlapping=True)
        if not matches:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        flat = itertools.chain.from_iterable(matches)
        found = np.fromiter(flat, np.int64, 3 * len(matches)).reshape(-1, 3)
        ends = np.cumsum([len(line) + 1 for line in lines])
        rows = np.searchsorted(ends, found[:, 1], side="right")
        both = np.unique(rows << 32 | found[:, 0])
        return both >> 32, both & 0xFFFFFFFF


def keep_probability(counts: NDArray[np.int64], limit: int) -> NDArray[np.float64]:
    """The probability with which each entry keeps a caption, float64 [entries]."""
    probability: NDArray[np.float64] = limit / np.maximum(counts, limit)
    return probability


def draw(
    seed: int, keys: Sequence[str], entries: Sequence[str], rows: NDArray[np.integer], places: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Numbers in [0, 1), one per match, that depend on seed, the caption's key and the entry only."""
    caption = np.array([_hash64(f"{seed}\t{key}") for key in keys], np.uint64)
    used, place = np.unique(places, return_inverse=True)
    entry = np.array([_hash64(entries[number]) for number in used], np.uint64)
    if not len(places):
        return np.zeros(0)
    mixed = _scramble(_scramble(caption[rows]) ^ entry[place])
    uniform: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


@functools.lru_cache(maxsize=2)
def read_entries(place: str) -> tuple[str, ...]:
    """The entries of a list, each once, in its order.

    Raises:
        SettingError: no such file, or an empty one.
    """
    allowed = "a JSON list of strings, or a text file with one entry per line"
    try:
        folder, file = split_file(place)
        text = folder.read_text(file)
        plain = parse_json(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise unreadable("entries", place, allowed, error) from error
    listed = isinstance(plain, list) and all(isinstance(entry, str) for entry in plain)
    require(listed, "entries", place, allowed)
    entries = tuple(dict.fromkeys(entry for entry in plain if entry.strip()))
    require(bool(entries), "entries", place, allowed)
    return entries


@functools.lru_cache(maxsize=2)
def automaton(place: str) -> EntryAutomaton:
    """The search automaton of a list, built once per process."""
    return EntryAutomaton(read_entries(place))


def _counts(step: Step, group: int) -> pa.Table:
    first = group * SHARDS_PER_COUNT
    numbers = range(first, min(first + SHARDS_PER_COUNT, len(step.shards)))
    return _summed(step.read("matches", number, columns=["entry"]) for number in numbers)


def _total(step: Step, number: int) -> pa.Table:
    groups = -(-len(step.shards) // SHARDS_PER_COUNT)
    return _summed(table for _, table in step.read_all("counts", groups))


def _summed(tables: Any) -> pa.Table:
    """Counts by entry over tables of entries, with or without a column of counts."""
    counts = np.zeros(0, np.int64)
    for table in tables:
        entries = table["entry"].to_numpy()
        more = np.zeros(max(len(counts), int(entries.max(initial=-1)) + 1), np.int64)
        more[: len(counts)] = counts
        weights = table["count"].to_numpy() if "count" in table.column_names else 1
        np.add.at(more, entries, weights)
        counts = more
    used = np.flatnonzero(counts)
    return pa.table({"entry": used.astype(np.int32), "count": counts[used]})


def _dense(table: pa.Table, entries: int) -> NDArray[np.int64]:
    counts = np.zeros(entries, np.int64)
    counts[table["entry"].to_numpy()] = table["count"].to_numpy()
    return counts


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al., 2014): every input bit affects every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
