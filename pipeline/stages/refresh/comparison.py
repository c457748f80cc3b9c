"""Compare the rows of a source with the rows in a folder's shards.

A row is identified by 16 bytes: the BLAKE2b digest of its url (or source key), caption and saved columns. Both sides
are partitioned by that digest; large partitions are stored in a temporary folder. Partitions are compared one by one,
so memory is bounded by the largest one (1/64 of the rows, 41 bytes each), not by the dataset.

The same row may be in the source several times, and in the shards too (if it was fetched again). The n-th row of one
side matches the n-th of the other. The shards' rows are ordered: visible, gone, hidden, then the latest failure.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PARTITIONS = 64
HELD_RECORDS = 2_000_000
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("url", "<u8"), ("body", "<u8"), ("place", "<i8"), ("state", "u1")])
"""One row: its digest in two halves, digests of url and image (0 = unknown), its position, and its state."""

STALE = np.uint64(2**64 - 1)
"""Replaces the digest of a stored image that has changed at its url."""

ABSENT = ""
"""Stands for the digest of a part that a row does not have."""

INDEX_BITS = 24
# States of rows in shards; a failure is FAILED plus the number of its error class.
VISIBLE, GONE, HIDDEN, OPTED_OUT, TO_HIDE, FAILED = range(6)
# States of rows of the source.
WANTED, LISTED = range(2)
_ORDER = np.array([0, 1, 2, 2, 2] + [3] * (256 - FAILED), np.int64)

Records = NDArray[np.void]
Places = NDArray[np.int64]


def place(number: int, index: int) -> int:
    """The position of a row: the number of its shard or slice, and its index in it (below 2 ** 24)."""
    return number << INDEX_BITS | index


def parts_of(where: Places) -> tuple[Places, Places]:
    """The numbers and indices of positions."""
    return where >> INDEX_BITS, where & ((1 << INDEX_BITS) - 1)


def records(
    values: Iterable[Sequence[object]],
    bodies: Sequence[str | None],
    places: NDArray[np.int64],
    states: NDArray[np.uint8],
) -> Records:
    """Records [rows] of rows: ``values`` are url, caption, columns and urls of further parts, ``bodies`` hex digests of
    their parts (see :func:`joined_digest`)."""
    digests, urls = bytearray(), bytearray()
    for row in values:
        texts = repr(tuple(map(_identity, row)))
        digests += hashlib.blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        urls += hashlib.blake2b(str(row[0]).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    found = np.zeros(len(places), RECORD)
    halves = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    found["high"], found["low"] = halves[:, 0], halves[:, 1]
    found["url"] = np.frombuffer(bytes(urls), "<u8")
    found["body"] = [int(body[:16], 16) if body else 0 for body in bodies]
    found["place"], found["state"] = places, states
    return found


def joined_digest(digests: Sequence[str | None]) -> str | None:
    """One hex digest for the digests of a row's parts: that of the only part; ``None`` where one is unknown."""
    if None in digests:
        return None
    if len(digests) == 1:
        return digests[0] or None
    return hashlib.sha256(repr(tuple(digests)).encode()).hexdigest()


def _identity(value: object) -> object:
    """A value by its text, so that 1, 1.0 and "1" are the same: a column's type may change, its rows stay known."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if value is None or isinstance(value, str) else str(value)


class Partitions:
    """Records partitioned by digest; written below ``folder`` above two million records."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._held: list[list[Records]] = [[] for _ in range(PARTITIONS)]
        self._count = 0

    def add(self, found: Records) -> None:
        """Add records [any] to their partitions."""
        number = (found["high"] >> np.uint64(58)).astype(np.int64)
        order = np.argsort(number, kind="stable")
        ends = np.searchsorted(number[order], np.arange(PARTITIONS + 1))
        for partition in np.unique(number):
            self._held[partition].append(found[order[ends[partition] : ends[partition + 1]]])
        self._count += len(found)
        if self._count > HELD_RECORDS:
            self._spill()

    def read(self, partition: int) -> Records:
        """All records of one partition."""
        path = self._path(partition)
        stored = [np.fromfile(path, RECORD)] if path.exists() else []
        return np.concatenate([np.zeros(0, RECORD), *stored, *self._held[partition]])

    def _spill(self) -> None:
        for partition, held in enumerate(self._held):
            with open(self._path(partition), "ab") as file:
                for part in held:
                    part.tofile(file)
        self._held, self._count = [[] for _ in range(PARTITIONS)], 0

    def _path(self, partition: int) -> Path:
        return self._folder / f"{self._name}-{partition:02d}"


@dataclass(kw_only=True)
class RowDifference:
    """The work of a refresh. ``fresh`` are positions in the source, the others in the shards, all ascending.

    ``replaced`` is the part of ``gone`` whose images have changed at their urls; these samples are never shown again.
    ``fresh_listed`` is True for each fresh row on the opt-out list. ``failures`` counts the remaining known failures by
    state; ``hidden`` counts the rows of the source whose samples are hidden.
    """

    fresh: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    fresh_listed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    gone: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    replaced: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    opted_out: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    back: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: int = 0
    kept: int = 0
    changed: int = 0
    retried: int = 0
    failures: Counter[int] = field(default_factory=Counter)
    hidden: Counter[int] = field(default_factory=Counter)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to fetch, to hide or to show again."""
        return not (len(self.fresh) or len(self.gone) or len(self.opted_out) or len(self.back))


def compare(source: Partitions, shards: Partitions, again: NDArray[np.bool_]) -> RowDifference:
    """The difference of two sides; ``again`` bool [256] selects the failures to fetch again, by state."""
    parts = [_compare(source.read(number), shards.read(number), again) for number in range(PARTITIONS)]
    total = RowDifference()
    for name in ("gone", "replaced", "opted_out", "back"):
        setattr(total, name, np.sort(np.concatenate([getattr(part.found, name) for part in parts])))
    fresh = np.concatenate([part.found.fresh for part in parts])
    order = np.argsort(fresh)
    total.fresh = fresh[order]
    total.fresh_listed = np.concatenate([part.found.fresh_listed for part in parts])[order]
    for name in ("rows", "kept", "retried"):
        setattr(total, name, sum(getattr(part.found, name) for part in parts))
    for part in parts:
        total.failures.update(part.found.failures)
        total.hidden.update(part.found.hidden)
    gone = np.concatenate([part.gone_urls for part in parts])
    total.changed = _in_both(gone, np.concatenate([part.new_urls for part in parts]))
    return total


@dataclass(frozen=True)
class _Part:
    found: RowDifference
    gone_urls: NDArray[np.uint64]
    new_urls: NDArray[np.uint64]


def _compare(source: Records, shards: Records, again: NDArray[np.bool_]) -> _Part:
    at_source, at_shards = _pairs(source, shards)
    here, there = source[at_source], shards[at_shards]
    other_body = (here["body"] != 0) & (there["body"] != 0) & (here["body"] != there["body"])
    other_body |= there["body"] == STALE
    other_body &= (there["state"] == VISIBLE) | (there["state"] == GONE)
    retried = again[there["state"]] & (here["state"] != LISTED)
    answered = ~other_body & ~retried
    new = np.ones(len(source), np.bool_)
    new[at_source] = other_body
    kept = np.zeros(len(shards), np.bool_)
    kept[at_shards[answered]] = True
    gone = shards[(shards["state"] == VISIBLE) & ~kept]
    fresh = np.concatenate([source[new], here[retried]])
    states = there["state"][answered]
    found = RowDifference(
        fresh=fresh["place"],
        fresh_listed=fresh["state"] == LISTED,
        gone=gone["place"],
        replaced=gone["place"][gone["body"] == STALE],
        opted_out=shards["place"][shards["state"] == TO_HIDE],
        back=there["place"][answered & (there["state"] == GONE)],
        rows=len(source),
        kept=int((states == VISIBLE).sum()),
        retried=int(retried.sum()),
        failures=_counts(states[states >= FAILED]),
        hidden=_counts(states[(states > GONE) & (states < FAILED)]),
    )
    return _Part(found, gone["url"], source["url"][new])


def _pairs(source: Records, shards: Records) -> tuple[Places, Places]:
    """Indices of matching rows: same digest, same rank among the rows with that digest."""
    both = np.concatenate([source, shards])
    side = np.arange(len(both)) >= len(source)
    order = np.where(side, _ORDER[both["state"]], 0)
    failed = side & (both["state"] >= FAILED)
    at = np.where(failed, -both["place"], both["place"])
    by_rank = np.lexsort((at, order, side, both["low"], both["high"]))
    sorted_rows = both[by_rank]
    new_digest = np.ones(len(both), np.bool_)
    new_digest[1:] = (np.diff(sorted_rows["high"]) != 0) | (np.diff(sorted_rows["low"]) != 0)
    new_run = new_digest.copy()
    new_run[1:] |= side[by_rank][1:] != side[by_rank][:-1]
    group, position = np.cumsum(new_digest), np.arange(len(both))
    rank = position - np.maximum.accumulate(np.where(new_run, position, 0))
    key = np.empty(len(both), np.int64)
    key[by_rank] = group << 32 | rank
    left, right = key[: len(source)], key[len(source) :]
    _, at_source, at_shards = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    return at_source, at_shards


def _counts(states: NDArray[np.uint8]) -> Counter[int]:
    values, counts = np.unique(states, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _in_both(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
    """Number of common elements, with repeats."""
    values, counts = np.unique(first, return_counts=True)
    others, numbers = np.unique(second, return_counts=True)
    _, here, there = np.intersect1d(values, others, assume_unique=True, return_indices=True)
    return int(np.minimum(counts[here], numbers[there]).sum())
