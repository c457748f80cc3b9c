"""Import and export of DataComp's lists of samples (Gadre et al., 2023, arXiv 2304.14108).

A list is a .npy file of dtype "u8,u8": the upper and lower half of 128-bit uids (32 hex characters), sorted. A uid
listed several times repeats its sample. Reading is a binary search in a memory map, so a list of a billion uids needs
no memory. Writing proceeds by ranges of uids, each small enough to sort.
"""

import functools
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, unreadable
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder, read_errors, split_file
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView

UID = np.dtype("u8,u8")
CHECKED_ROWS = 1 << 20
RANGE_ROWS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class UidList(Filter):
    """Keep the listed samples, with the repeats of the list: ``not_listed``."""

    name: ClassVar[str] = "uids"
    rank: ClassVar[int] = 10
    uids: str = ""
    """List of uids: a .npy file, as a path or fsspec URI (copied to each node's temporary folder)."""
    uid_column: str = "uid"
    """Column of the shards' parquet (or key of the samples' json) with the uid."""

    def check(self) -> None:
        """Require a sorted list of the right dtype; reads it once."""
        listed = read_uids(self.uids)
        before = np.zeros(0, UID)
        for start in range(0, len(listed), CHECKED_ROWS):
            block = np.concatenate([before, listed[start : start + CHECKED_ROWS]])
            high, low = block["f0"], block["f1"]
            ordered = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))
            require(bool(ordered.all()), "uids", self.uids, "a list that is sorted")
            before = block[-1:]

    def input_digest(self) -> str:
        """Of the uids."""
        listed, digest = read_uids(self.uids), hashlib.sha256()
        for start in range(0, len(listed), CHECKED_ROWS):
            digest.update(listed[start : start + CHECKED_ROWS].tobytes())
        return digest.hexdigest()

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Count each sample's uid in the list."""
        wanted = parse_uids(view.column(self.uid_column))
        listed = read_uids(self.uids)
        times = (bisect(listed, wanted, right=True) - bisect(listed, wanted)).astype(np.int32)
        return Verdict({"not_listed": times == 0}, times=times)


def parse_uids(texts: list[Any]) -> NDArray[Any]:
    """Uids of 32 hex characters as "u8,u8" [n].

    Raises:
        DataError: an invalid uid.
    """
    parsed = np.zeros(len(texts), UID)
    for row, text in enumerate(texts):
        try:
            number = int(str(text), 16)  # digits alone are a number in a strange tar's json
            parsed[row] = (number >> 64, number & 0xFFFFFFFFFFFFFFFF)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{text!r} is not a uid of 32 hex characters") from error
    return parsed


def bisect(listed: NDArray[Any], wanted: NDArray[Any], right: bool = False) -> NDArray[np.int64]:
    """Insertion positions of ``wanted`` in the sorted list, before or after equal uids; int64 [n]."""
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(listed), np.int64)
    while (low < high).any():
        open_ = low < high
        middle = (low[open_] + high[open_]) // 2
        found, sought = listed[middle], wanted[open_]
        before = (found["f0"] < sought["f0"]) | ((found["f0"] == sought["f0"]) & (found["f1"] < sought["f1"]))
        if right:
            before |= (found["f0"] == sought["f0"]) & (found["f1"] == sought["f1"])
        low[open_] = np.where(before, middle + 1, low[open_])
        high[open_] = np.where(before, high[open_], middle)
    return low


@functools.lru_cache(maxsize=2)
def read_uids(place: str) -> NDArray[Any]:
    """The list as a memory map.

    Raises:
        SettingError: no such file, or not of dtype "u8,u8".
    """
    allowed = 'a .npy file of dtype "u8,u8"'
    try:
        with read_errors(place):
            local = place if "://" not in place else fsspec.open_local(f"simplecache::{place}")
        listed = np.load(local, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise unreadable("uids", place, allowed, error) from error
    require(listed.dtype == UID and listed.ndim == 1, "uids", f"{place}: {listed.dtype}", allowed)
    found: NDArray[Any] = listed
    return found


def write_uids(snapshot: Snapshot, place: str, uid_column: str = "uid", range_rows: int = RANGE_ROWS) -> int:
    """Write the uids of the visible samples of ``snapshot``, with repeats, as a sorted list; returns their number.

    Raises:
        DataError: a shard without the column, or an invalid uid.
        StorageError: the file system or store failed.
    """
    folder, (parent, file) = Folder(snapshot.folder), split_file(place)
    ranges = max(1, -(-snapshot.samples // range_rows))
    edges = [(number << 64) // ranges for number in range(1, ranges)]
    with tempfile.TemporaryDirectory(prefix="clipmill-uids-") as scratch:
        parts = [Path(scratch) / f"{number}.part" for number in range(ranges)]
        for shard in snapshot.shards:
            found = parse_uids(ShardView(folder, shard).column(uid_column))
            part = np.searchsorted(np.array(edges, np.uint64), found["f0"], side="right")
            for number in np.unique(part):
                with open(parts[number], "ab") as out:
                    out.write(found[part == number].tobytes())
        whole = Path(scratch) / "uids.npy"
        listed = np.lib.format.open_memmap(whole, mode="w+", dtype=UID, shape=(snapshot.samples,))
        start = 0
        for path in parts:
            block = np.fromfile(path, UID) if path.exists() else np.zeros(0, UID)
            listed[start : start + len(block)] = block[np.lexsort((block["f1"], block["f0"]))]
            start += len(block)
        listed.flush()
        parent.write_atomic(file, whole)
    return snapshot.samples
