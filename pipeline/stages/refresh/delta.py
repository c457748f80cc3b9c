"""The source of a refresh: the rows of another source that are new, changed or retried.

They are written to a table beside the plan, with one row group per shard, so a worker reads only its rows. The table
holds complete rows for images to download. For a row whose image or members are in the source, it holds the position in
that source, and the row is read from there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SampleError
from pipeline.shards.storage import Folder, split_file
from pipeline.shards.text import storable
from pipeline.sources.source import Part, Row, Slice, Source, contents_of
from pipeline.stages.crawl.download import digest
from pipeline.stages.refresh.comparison import INDEX_BITS, RowDifference, joined_digest
from pipeline.stages.refresh.make_shard import ARROW_TYPES, clean_caption, clean_value

ROWS_FILE = "rows.parquet"
COLUMN = "column."


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The rows of ``base`` listed in the parquet file ``table``."""

    kind: ClassVar[str] = "delta"

    base: Source
    table: str

    @property
    def has_captions(self) -> bool:
        """As the source itself."""
        return self.base.has_captions

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """The row groups of the table; the digest covers the rows, not their position."""
        place, name = split_file(self.table)
        with place.open(name) as file:
            table = pq.ParquetFile(file)
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group).drop_columns(["where"]).to_pylist()
                content = json.dumps(rows, sort_keys=True).encode()
                yield Slice(count=len(rows), digest=hashlib.sha256(content).hexdigest(), where={"group": group})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; rows on the opt-out list come with a problem."""
        place, name = split_file(self.table)
        with place.open(name) as file:
            listed = pq.ParquetFile(file).read_row_group(int(piece.where["group"])).to_pylist()
        for where, group in groupby(listed, key=lambda values: values["where"]):
            run = list(group)
            yield from map(_stored, run) if where is None else self._from_base(where, run)

    def schema(self) -> Mapping[str, type]:
        """As the source itself."""
        return self.base.schema()

    def _from_base(self, where: str, run: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        wanted = {values["index"] for values in run}
        for index, row in enumerate(self.base.rows(Slice(**json.loads(where)))):
            if index in wanted:
                yield row


def write_rows(
    path: Path,
    source: Source,
    found: RowDifference,
    pieces: Sequence[Slice],
    beside: Folder,
    size: int,
    hash_name: str | None,
) -> None:
    """Write the fresh rows of ``found`` to ``path``, ``size`` per row group.

    ``pieces`` are the slices of ``source`` that the positions in ``found`` refer to. ``beside`` receives the data that
    the source needs to read rows that contain their image.
    """
    schema = _schema(source)
    names = {name: COLUMN + name for name in source.schema()}
    lasting: list[Slice] = []

    def described(number: int, index: int, row: Row, listed: bool) -> dict[str, Any]:
        values: dict[str, Any] = {
            "url": storable(row.url),
            "caption": clean_caption(row.caption),
            "parts": json.dumps([[part.medium, part.url, part.expected] for part in row.parts]),
            "listed": listed,
            "index": index,
        }
        values |= {names[name]: clean_value(value) for name, value in row.columns.items()}
        contents = contents_of(row)
        if listed or (all(content is None for content in contents) and row.problem is None):
            return values
        if not lasting:
            lasting.extend(source.slices(size, beside))
        body = joined_digest([None if content is None else digest(content, hash_name) for content in contents])
        return {**values, "where": json.dumps(asdict(lasting[number])), "slice": pieces[number].digest, "body": body}

    with pq.ParquetWriter(path, schema) as writer:
        held: list[dict[str, Any]] = []
        for number, index, row, listed in _fresh(source, found, pieces):
            held.append(described(number, index, row, listed))
            if len(held) == size:
                writer.write_table(pa.Table.from_pylist(held, schema=schema), row_group_size=size)
                held = []
        if held:
            writer.write_table(pa.Table.from_pylist(held, schema=schema), row_group_size=size)


def _fresh(source: Source, found: RowDifference, pieces: Sequence[Slice]) -> Iterator[tuple[int, int, Row, bool]]:
    numbers = found.fresh >> INDEX_BITS
    for number in np.unique(numbers).tolist():
        first, last = np.searchsorted(numbers, [number, number + 1])
        indices = (found.fresh[first:last] & ((1 << INDEX_BITS) - 1)).tolist()
        wanted = dict(zip(indices, found.fresh_listed[first:last].tolist(), strict=True))
        for index, row in enumerate(source.rows(pieces[number])):
            if index in wanted:
                yield number, index, row, wanted[index]


def _schema(source: Source) -> pa.Schema:
    columns = [(COLUMN + name, ARROW_TYPES[kind]) for name, kind in source.schema().items()]
    fixed: list[tuple[str, pa.DataType]] = [("listed", pa.bool_()), ("index", pa.int64())]
    fixed += [(name, pa.string()) for name in ("url", "caption", "parts", "where", "slice", "body")]
    return pa.schema(fixed + columns)


def _stored(values: Mapping[str, Any]) -> Row:
    columns = {name.removeprefix(COLUMN): value for name, value in values.items() if name.startswith(COLUMN)}
    listed = SampleError("failed_to_download", "opt_out", "on the opt-out list") if values["listed"] else None
    return Row(
        url=values["url"],
        caption=values["caption"],
        parts=tuple(Part(medium, url=url, expected=expected) for medium, url, expected in json.loads(values["parts"])),
        columns=columns,
        problem=listed,
    )
