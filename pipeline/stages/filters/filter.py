"""The interface of filters.

A filter is a frozen dataclass of options. ``judge`` runs in one task per shard. A filter that needs a global view
(duplicates, quantiles, counts) first makes tables in ``prepare``: one per shard (:meth:`Step.each_shard`), then one per
part of the whole (:meth:`Step.each_part`). Every table is a file, written atomically, so a killed job resumes from the
existing tables.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.shards.parquet import parse_parquet
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder
from pipeline.stages.filters.view import ShardView
from pipeline.stages.shard_tasks import Workers, run_tasks

SMALL_ROW_GROUP = 4096


@dataclass(frozen=True)
class Verdict:
    """The samples of a view to drop, bool [n] by reason (the first reason counts), and the repeats of the others.

    ``times`` int32 [n] is for filters that repeat samples; a 0 needs a reason to drop the sample.
    """

    drops: Mapping[str, NDArray[np.bool_]]
    times: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Step:
    """One filter's step in a run: the shards, the samples left by earlier filters, and a folder for its tables."""

    folder: Folder
    shards: tuple[Shard, ...]
    work: Folder
    before: Folder | None
    workers: Workers

    def view(self, number: int) -> ShardView:
        """The samples of shard ``number`` that earlier filters left."""
        shard = self.shards[number]
        if self.before is None:
            return ShardView(self.folder, shard)
        reasons = read_table(self.before, table_file(number), columns=["reason"])["reason"].to_pylist()
        return ShardView(self.folder, shard, np.flatnonzero([not reason for reason in reasons]))

    def number(self, view: ShardView) -> int:
        """The number of a view's shard."""
        return next(number for number, shard in enumerate(self.shards) if shard.name == view.shard.name)

    def each_shard(self, name: str, make: Callable[[ShardView], pa.Table]) -> None:
        """Make the table ``name`` of every shard from its view."""
        self._each(name, len(self.shards), functools.partial(_of_view, self, make))

    def each_part(self, name: str, count: int, make: Callable[["Step", int], pa.Table]) -> None:
        """Make the tables ``name`` numbered below ``count`` from other tables of this step."""
        self._each(name, count, functools.partial(make, self))

    def read(self, name: str, number: int, **options: Any) -> pa.Table:
        """Table ``number`` called ``name``; ``options`` (columns, filters) are those of ``pq.read_table``."""
        return read_table(self.work, f"{name}/{table_file(number)}", **options)

    def read_all(self, name: str, count: int, **options: Any) -> Iterator[tuple[int, pa.Table]]:
        """The tables ``name`` numbered below ``count``, one at a time."""
        return ((number, self.read(name, number, **options)) for number in range(count))

    def _each(self, name: str, count: int, make: Callable[[int], pa.Table]) -> None:
        for _ in run_tasks(functools.partial(_written, self.work, name, make), range(count), self.workers):
            pass


class Filter:
    """The base class of filters: needs no global view, keeps every sample.

    A filter is found by its module, see :mod:`pipeline.stages.filters.options`; its ``name`` is a word of ``--steps``.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 99
    """Where its options stand among those of the others."""
    scratch: ClassVar[tuple[str, ...]] = ()
    """Tables of ``prepare`` to delete after the run."""

    def input_digest(self) -> str:
        """SHA-256 (hex) of further inputs besides the options and the snapshot, such as a list's content."""
        return ""

    def check(self) -> None:
        """Raise :class:`SettingError` for invalid options, before any data is read."""

    def prepare(self, step: Step) -> None:
        """Make the tables that ``judge`` needs; runs in the driver."""

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge the samples of a view; runs in a task."""
        return Verdict({})

    @classmethod
    def looks_at_all(cls) -> bool:
        """Whether the filter needs all shards before it judges one."""
        return cls.prepare is not Filter.prepare


def table_file(number: int) -> str:
    """File name of table ``number``."""
    return f"{number:06d}.parquet"


def read_table(folder: Folder, name: str, **options: Any) -> pa.Table:
    """A parquet file of ``folder``; ``filters`` and ``columns`` limit the data that is read."""
    if not options:
        return parse_parquet(folder.read_bytes(name))
    with folder.open(name) as file:
        return pq.read_table(file, **options)


def write_table(folder: Folder, name: str, table: pa.Table) -> None:
    """Write a parquet file atomically, in row groups small enough to read one by one."""
    buffer = BytesIO()
    pq.write_table(table, buffer, row_group_size=SMALL_ROW_GROUP)
    folder.write_atomic(name, buffer.getvalue())


def _of_view(step: Step, make: Callable[[ShardView], pa.Table], number: int) -> pa.Table:
    return make(step.view(number))


def _written(work: Folder, name: str, make: Callable[[int], pa.Table], number: int) -> str:
    file = f"{name}/{table_file(number)}"
    if not work.exists(file):
        write_table(work, file, make(number))
    return ""
