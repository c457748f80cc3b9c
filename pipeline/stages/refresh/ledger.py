"""The state of every row in the shards of a folder: visible, hidden with reason, failed with reason.

The parquet file beside each tar lists every input row of the shard. The snapshot defines the visible samples. The
reasons why refreshes hid samples are stored in ``_plan/{parent}/hidden.parquet``, all reasons so far, beside the plan
of the refresh. A row that left the source may be shown again, an opted-out row may not.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError, SnapshotError
from pipeline.shards.media import media_of_columns, part_column, reason_of
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.selection import read_selection
from pipeline.shards.snapshot import Shard, Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.writer import STATS
from pipeline.sources.source import Source, media_of
from pipeline.stages.refresh.comparison import (
    ABSENT,
    FAILED,
    GONE,
    HIDDEN,
    OPTED_OUT,
    STALE,
    TO_HIDE,
    VISIBLE,
    Places,
    Records,
    joined_digest,
    place,
    records,
)
from pipeline.stages.refresh.opt_out import OptOut
from pipeline.stages.refresh.plan import PLANS

HIDDEN_FILE = "hidden.parquet"
HASHES = ("sha256", "md5", "sha512")
OTHER = "other"
REPLACED = "changed"
"""Reason of hidden images that have changed at their url: they match no row of a source any more."""
_HIDDEN_TYPES: Mapping[str, pa.DataType] = {"shard": pa.int64(), "position": pa.int64(), "reason": pa.string()}
_HIDDEN_COLUMNS = pa.schema(_HIDDEN_TYPES)
_REASONS = {"gone": GONE, "opt_out": OPTED_OUT}


class Failures:
    """Numbers for error classes, in the order of their occurrence."""

    def __init__(self) -> None:
        self._names: list[str] = [OTHER]

    def state(self, name: str | None) -> int:
        """The state of a row that failed for this reason."""
        known = name or OTHER
        if known not in self._names:
            if FAILED + len(self._names) == 256:
                return FAILED
            self._names.append(known)
        return FAILED + self._names.index(known)

    def name(self, state: int) -> str:
        """The reason of a state."""
        return self._names[state - FAILED]

    def mask(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """The states of the given error classes, of any part; bool [256]."""
        chosen = np.zeros(256, np.bool_)
        wanted = set(names)
        for name in self._names:
            if name.rpartition(":")[2] in wanted:
                chosen[self.state(name)] = True
        return chosen


@dataclass(frozen=True)
class Ledger:
    """The shards of ``folder`` with numbers below ``first``, as visible in ``parent``.

    ``stale`` has the positions of images that have changed at their url, by the number of their shard.
    """

    folder: Folder
    parent: Snapshot | None
    first: int
    stale: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)

    def records(self, source: Source, opt_out: OptOut, failures: Failures) -> Iterator[Records]:
        """Records of all rows, shard by shard, identified by the values that ``source`` yields for them.

        Raises:
            DataError: a shard's parquet file is missing, or does not match its tar.
        """
        entries = {shard.name: shard for shard in self.parent.shards} if self.parent else {}
        reasons = read_hidden(self.folder, self.parent)
        for number, name in shard_numbers(self.folder, self.first):
            table = read_rows(self.folder, name)
            yield self._records(number, table, entries.get(name), reasons.get(number), source, opt_out, failures)

    def _records(
        self,
        number: int,
        table: pa.Table,
        shard: Shard | None,
        reasons: Mapping[int, str] | None,
        source: Source,
        opt_out: OptOut,
        failures: Failures,
    ) -> Records:
        rows = table.num_rows
        names = ["url", *(["caption"] if source.has_captions else []), *sorted(source.schema())]
        names += [part_column(medium, "url") for medium in media_of(source)[1:]]
        values = [column_values(table, name) for name in names]
        good = np.array([status == "success" for status in column_values(table, "status")], np.bool_)
        bodies = [joined_digest(of_row) for of_row in zip(*part_digests(table), strict=True)]
        at = np.where(good, np.cumsum(good) - 1, np.arange(rows))
        states = np.zeros(rows, np.uint8)
        states[good] = self._stored_states(shard, int(good.sum()), reasons or {})
        listed = opted_out_of_table(opt_out, table)
        states[listed & good & (states == VISIBLE)] = TO_HIDE
        states[listed & good & (states == GONE)] = OPTED_OUT
        states[~good] = [failures.state(reason) for reason in _reasons_of(table.filter(pa.array(~good)))]
        found = records(zip(*values, strict=True), bodies, place(number, 0) + at.astype(np.int64), states)
        found["body"][good & np.isin(at, self.stale.get(number, ()))] = STALE
        replaced = [position for position, reason in (reasons or {}).items() if reason == REPLACED]
        return found[~(good & np.isin(at, replaced))]

    def _stored_states(self, shard: Shard | None, stored: int, reasons: Mapping[int, str]) -> NDArray[np.uint8]:
        states = np.full(stored, HIDDEN, np.uint8)
        for position, reason in reasons.items():
            if position >= stored:
                raise DataError(f"{self.folder.uri}: {HIDDEN_FILE} hides sample {position} of a shard of {stored}")
            states[position] = _REASONS.get(reason, HIDDEN)
        if shard is not None:
            if shard.stored != stored:
                message = f"{self.folder.join(shard.name + '.parquet')} lists {stored} samples, {shard.tar} holds"
                raise DataError(f"{message} {shard.stored}")
            indices = read_selection(self.folder, shard)
            states[slice(None) if indices is None else indices] = VISIBLE
        return states


def shard_numbers(folder: Folder, below: int | None = None) -> list[tuple[int, str]]:
    """Numbers and names of the finished shards of a folder, ascending."""
    names = (name.removesuffix(STATS) for name in folder.names(STATS))
    found = sorted((int(name), name) for name in names if name.isdigit())
    return [(number, name) for number, name in found if below is None or number < below]


def next_number(folder: Folder) -> int:
    """The number after the largest shard number of any file in the folder."""
    heads = (name.partition(".")[0].removesuffix("_stats") for name in folder.names())
    return max((int(head) for head in heads if head.isdigit()), default=-1) + 1


def read_rows(folder: Folder, name: str) -> pa.Table:
    """The parquet file of the shard called ``name``.

    Raises:
        DataError: it is missing or damaged, or lacks a column that every list of rows has.
    """
    try:
        table = parse_parquet(folder.read_bytes(f"{name}.parquet"))
    except FileNotFoundError as error:
        raise DataError(f"{folder.join(name + '.parquet')} is missing, which lists the shard's rows") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{folder.join(name + '.parquet')} is damaged ({error})") from error
    lacking = {"key", "status", "url"} - set(table.column_names)
    if lacking:
        raise DataError(
            f"{folder.join(name + '.parquet')} lists no rows: it has no column {', '.join(sorted(lacking))}"
        )
    return table


def prefixes(table: pa.Table) -> dict[str, str]:
    """The media of the parts of a shard's rows, the first one first, with the prefixes of their columns.

    The columns of rows with one part do not name its medium, which is then empty.
    """
    media = media_of_columns(table.column_names)
    further = [medium for medium in media if part_column(medium, "url") in table.column_names]
    first = next((medium for medium in media if medium not in further), "")
    return {first: "", **{medium: part_column(medium, "") for medium in further}}


def part_digests(table: pa.Table) -> list[list[str | None]]:
    """The hex digests of the parts as downloaded, a list for each medium: None = unknown, "" = no such part."""
    name = next((name for name in HASHES if name in table.column_names), "")
    media = prefixes(table)
    found = [column_values(table, prefix + name) for prefix in media.values()]
    if not name or len(media) == 1:
        return found
    good = [status == "success" for status in table["status"].to_pylist()]
    failures = [column_values(table, part_column(medium, "error_class")) for medium in media]
    return [
        [ABSENT if value is None and stored and error is None else value for value, stored, error in rows]
        for rows in (zip(values, good, errors, strict=True) for values, errors in zip(found, failures, strict=True))
    ]


def opted_out_of_table(opt_out: OptOut, table: pa.Table) -> NDArray[np.bool_]:
    """Whether each row of a shard's table is on the list, bool [rows]: by url or digest of a part, or by its key."""
    urls = [column_values(table, prefix + "url") for prefix in prefixes(table).values()]
    return opted_out_rows(opt_out, urls, [column_values(table, "key"), *part_digests(table)])


def opted_out_rows(
    opt_out: OptOut, urls: Sequence[Sequence[str | None]], others: Sequence[Sequence[str | None]]
) -> NDArray[np.bool_]:
    """Whether each row is on the list, bool [rows], by one of its ``urls`` or of the ``others`` (keys, digests)."""
    found = opt_out.matches([url or "" for url in urls[0]], *others)
    for column in urls[1:]:
        found |= opt_out.matches([url or "" for url in column])
    return found


def _reasons_of(table: pa.Table) -> list[str | None]:
    media = media_of_columns(table.column_names)
    if not media:
        return column_values(table, "error_class")
    return [reason_of(row, media) for row in table.to_pylist()]


def column_values(table: pa.Table, name: str) -> list[Any]:
    """The values of a column; nulls where the table has none of that name."""
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def read_hidden(folder: Folder, snapshot: Snapshot | None) -> dict[int, dict[int, str]]:
    """The reasons of samples hidden by refreshes, up to ``snapshot``: shard number -> position -> reason."""
    known = set(snapshot_ids(folder))
    parent = snapshot.parent if snapshot else None
    while parent is not None:
        place = folder.folder(f"{PLANS}/{parent}")
        if place.exists(HIDDEN_FILE):
            return _read_hidden(place)
        parent = read_snapshot(f"{folder.uri}@{parent}").parent if parent in known else None
    return {}


def write_hidden(folder: Folder, parent: str, hidden: Mapping[int, Mapping[int, str]]) -> None:
    """Store the reasons beside the plan of the refresh of ``parent``, unless the same file exists."""
    rows = [(shard, at, reasons[at]) for shard, reasons in sorted(hidden.items()) for at in sorted(reasons)]
    shards, positions, texts = zip(*rows, strict=True) if rows else ((), (), ())
    content = BytesIO()
    pq.write_table(pa.table([shards, positions, texts], schema=_HIDDEN_COLUMNS), content)
    place = folder.folder(f"{PLANS}/{parent}")
    if not place.exists(HIDDEN_FILE) or place.read_bytes(HIDDEN_FILE) != content.getvalue():
        place.write_atomic(HIDDEN_FILE, content.getvalue())


def _read_hidden(place: Folder) -> dict[int, dict[int, str]]:
    try:
        table = parse_parquet(place.read_bytes(HIDDEN_FILE)).cast(_HIDDEN_COLUMNS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SnapshotError(f"{place.join(HIDDEN_FILE)} is damaged ({error})") from error
    found: dict[int, dict[int, str]] = {}
    columns = (table[name].to_pylist() for name in _HIDDEN_COLUMNS.names)
    for shard, position, reason in zip(*columns, strict=True):
        if shard is None or position is None or shard < 0 or position < 0:
            raise SnapshotError(f"{place.join(HIDDEN_FILE)} is damaged (sample {position} of shard {shard})")
        found.setdefault(shard, {})[position] = reason
    return found


def digest_of_places(*parts: Places) -> str:
    """SHA-256 (hex) of lists of positions."""
    content = hashlib.sha256()
    for part in parts:
        content.update(f"{len(part)}\n".encode() + part.astype("<i8").tobytes())
    return content.hexdigest()
