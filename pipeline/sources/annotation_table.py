"""Rows of an annotation file as a parquet table in the scratch folder, with one row group per slice.

The driver parses the file once; workers read the row group of their slice.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.storage import Folder, split_file
from pipeline.sources.source import Slice

TABLE = "annotations.parquet"


def table_slices(
    rows: Iterator[dict[str, Any]], schema: pa.Schema, rows_per_shard: int, scratch: Folder, salt: str
) -> Iterator[Slice]:
    """Write ``rows`` with the columns of ``schema``, and give the slices; ``salt`` is what else decides the content."""
    with scratch.scratch_file(".parquet") as path:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for group in itertools.count():
                part = list(itertools.islice(rows, rows_per_shard))
                if not part:
                    break
                writer.write_table(pa.Table.from_pylist(part, schema=schema), row_group_size=len(part))
                digest = hashlib.sha256(repr((salt, part)).encode("utf-8", "surrogatepass")).hexdigest()
                yield Slice(count=len(part), digest=digest, where={"uri": scratch.join(TABLE), "group": group})
        scratch.write_atomic(TABLE, path)


def table_rows(piece: Slice) -> list[dict[str, Any]]:
    """The rows of a slice."""
    folder, name = split_file(str(piece.where["uri"]))
    with folder.open(name) as file:
        rows: list[dict[str, Any]] = pq.ParquetFile(file).read_row_group(int(piece.where["group"])).to_pylist()
    return rows
