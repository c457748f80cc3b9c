"""Parquet is read in the calling thread: no Arrow thread starts, which could crash at the end of the process."""

import ast
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shards.parquet import parse_parquet

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline"
TABLE = pa.table({f"c{number}": list(range(3000)) for number in range(12)})
PROGRAM = """
import os, sys
from io import BytesIO
import pyarrow.parquet as pq
from pipeline.shards.parquet import parse_parquet
content = sys.stdin.buffer.read()
before = len(os.listdir("/proc/self/task"))
{read}
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture(scope="module")
def content() -> bytes:
    file = BytesIO()
    pq.write_table(TABLE, file, row_group_size=1000)
    return file.getvalue()


def threads_started(read: str, content: bytes) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", PROGRAM.format(read=read)]
    return int(subprocess.run(command, input=content, capture_output=True, check=True, env=environment).stdout)


@pytest.mark.parametrize("read", ["parse_parquet(content)", "parse_parquet(content, ['c3'])"])
def test_no_other_thread_reads(read: str, content: bytes) -> None:
    assert threads_started(read, content) == 0


def test_what_is_read_is_what_was_written(content: bytes) -> None:
    assert parse_parquet(content).equals(TABLE)
    assert parse_parquet(content, ["c3", "c1"]).equals(TABLE.select(["c3", "c1"]))


@pytest.mark.parametrize("damaged", [b"", b"PAR1", b"x" * 100])
def test_damage_is_arrows_own_error(damaged: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid):
        parse_parquet(damaged)


def test_nobody_hands_arrow_bytes_in_another_way() -> None:
    for path in sorted(PIPELINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = ast.unparse(node) if isinstance(node, ast.Call) else ""
            assert not said.startswith("pq.read_table(BytesIO("), f"{path}:{node.lineno}: see shards/parquet.py"
