"""Exact duplicates: images with the same SHA-256; the first in the snapshot's order is kept.

Every shard writes the first 16 bytes of its digests, sorted into bins. Parts of the bins are then merged over all
shards by sorting. A part has about ``PART_ROWS`` samples, so memory does not grow with the dataset: a calculated 2 GB.
The probability that any two of 5 billion images share 16 bytes by chance is 4e-20.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView

PART_ROWS = 20_000_000
BINS = 4096
Positions = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(Filter):
    """Drop repeated images: ``duplicate``."""

    name: ClassVar[str] = "exact_duplicates"
    rank: ClassVar[int] = 5
    scratch: ClassVar[tuple[str, ...]] = ("digests",)

    def prepare(self, step: Step) -> None:
        """Make tables of digests by shard, then of duplicates by part."""
        step.each_shard("digests", sorted_digests)
        step.each_part("duplicates", parts_of(step), search_part)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the tables of duplicates."""
        return Verdict({"duplicate": in_duplicates(view, step, parts_of(step))})


def parts_of(step: Step, rows: int = PART_ROWS) -> int:
    """Number of parts of about ``rows`` samples."""
    total = sum(shard.samples for shard in step.shards)
    return max(1, min(BINS, -(-total // rows)))


def bins_of_part(part: int, parts: int, bins: int = BINS) -> tuple[int, int]:
    """First bin of ``part`` and the first after it."""
    return part * bins // parts, (part + 1) * bins // parts


def gather(step: Step, name: str, bins: tuple[int, int]) -> pa.Table:
    """The rows of every shard's table ``name`` whose ``bin`` is in a range, with a column ``position``.

    A position is the shard's number times 2**32 plus the sample's index in it: the snapshot's order.
    """
    tables = []
    for number in range(len(step.shards)):
        table = step.read(name, number, filters=[("bin", ">=", bins[0]), ("bin", "<", bins[1])])
        position = (number << 32) + table["index"].to_numpy().astype(np.int64)
        tables.append(table.append_column("position", pa.array(position)))
    return pa.concat_tables(tables)


def duplicates_table(position: Positions, kept: Positions) -> pa.Table:
    """Samples to drop, by shard, each with the kept sample that it repeats."""
    order = np.argsort(position)
    position, kept = position[order], kept[order]
    columns = {"shard": position >> 32, "index": position, "kept_shard": kept >> 32, "kept_index": kept}
    return pa.table({name: (values & 0xFFFFFFFF).astype(np.int32) for name, values in columns.items()})


def in_duplicates(view: ShardView, step: Step, parts: int) -> NDArray[np.bool_]:
    """The samples of the view that are in a table ``duplicates``, bool [n]."""
    tables = step.read_all("duplicates", parts, filters=[("shard", "=", step.number(view))])
    found = [table["index"].to_numpy() for _, table in tables]
    return np.isin(view.positions, np.concatenate(found))


def sorted_digests(view: ShardView) -> pa.Table:
    """The first 16 bytes of a shard's digests, sorted by bin."""
    raw = np.frombuffer(b"".join(digest[:16] for digest in view.digests()), ">u8").reshape(len(view), 2)
    high, low = raw[:, 0].astype(np.uint64), raw[:, 1].astype(np.uint64)
    bins = (high >> np.uint64(52)).astype(np.int32)
    order = np.argsort(bins, kind="stable")
    columns: dict[str, NDArray[Any]] = {"bin": bins, "high": high, "low": low, "index": view.positions.astype(np.int32)}
    return pa.table({name: values[order] for name, values in columns.items()})


def search_part(step: Step, part: int) -> pa.Table:
    """The duplicates with digests in the bins of ``part``."""
    table = gather(step, "digests", bins_of_part(part, parts_of(step)))
    high, low, position = (table[name].to_numpy() for name in ("high", "low", "position"))
    order = np.lexsort((position, low, high))
    high, low, position = high[order], low[order], position[order]
    same = np.zeros(len(position), bool)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    # A run of equal digests begins at the last position that is not "same".
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(position))))
    return duplicates_table(position[same], position[first[same]])
