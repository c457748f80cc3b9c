"""Parquet in memory, parsed in the calling thread.

Arrow's own threads need Python's GIL to read from a Python object, or to release its bytes. A thread that waits for the
GIL while the process ends is killed in C++: "terminate called without an active exception" and exit code 134, after
finished work (seen in one of twenty processes that ended right after ``pq.read_table(BytesIO(...))``).
"""

import pyarrow as pa
import pyarrow.parquet as pq


def parse_parquet(content: bytes, columns: list[str] | None = None) -> pa.Table:
    """Parse the bytes of a parquet file to a table; with ``columns`` only those.

    Raises:
        ArrowInvalid: not a parquet file, or a damaged one.
    """
    return pq.ParquetFile(pa.BufferReader(content)).read(columns, use_threads=False)
