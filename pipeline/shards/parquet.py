"""Parquet in memory, parsed in the thread that asks.

Given a Python object, Arrow's own threads have to take Python's lock in order to read from it, or merely to let go of
its bytes. One that still wants it while the process ends is killed inside C++: "terminate called without an active
exception" and exit code 134, after work that was done (seen in one of twenty processes that ended right after
``pq.read_table(BytesIO(...))``).
"""

import pyarrow as pa
import pyarrow.parquet as pq


def parse_parquet(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in the bytes of a parquet file; of ``columns`` alone where they are given.

    Raises:
        ArrowInvalid: it is no parquet file, or a damaged one.
    """
    return pq.ParquetFile(pa.BufferReader(content)).read(columns, use_threads=False)
