"""Plan, manifest and duplicate search for 100 million rows of metadata, in this one process.

    python tests/benchmarks/planner_at_scale.py --rows 100000000

Nothing is downloaded: a folder of parquet files with a million rows each is planned as a refresh would, a snapshot
with as many shards as that makes is published and read back, and duplicates are sought among as many digests. Prints
one JSON line for each part with rows per second, bytes written and the peak of resident memory so far; asked are 8 GB.
The input files are links to one file, since the planner reads but does not compare them.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.shards.snapshot import Shard, publish_shards, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.urls import UrlTable
from pipeline.stages.filters.duplicates import parts_of, search_part, sorted_digests
from pipeline.stages.filters.filter import Step, table_file, write_table
from pipeline.stages.filters.view import ShardView
from pipeline.stages.refresh.plan import make_plan
from pipeline.stages.shard_tasks import Workers

FILE_ROWS = 1_000_000
ROWS_PER_SHARD = 10_000


def write_tables(folder: Path, rows: int) -> None:
    """``rows`` rows of urls of 60 characters and captions of 50, in files of a million."""
    random = np.random.default_rng(0)
    words = np.array(["small", "red", "photograph", "of", "the", "old", "harbour", "sunset", "cat", "portrait"])
    captions = [" ".join(words[picks]) for picks in random.integers(0, len(words), (FILE_ROWS, 8))]
    urls = [f"https://images.example.org/{number:016x}/original-image.jpg" for number in range(FILE_ROWS)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "first.parquet", row_group_size=100_000)
    for number in range(rows // FILE_ROWS):
        os.link(folder / "first.parquet", folder / f"part-{number:05d}.parquet")
    (folder / "first.parquet").unlink()


@contextmanager
def measured(name: str, rows: int, conditions: dict[str, object]) -> Iterator[None]:
    """Print what the block cost."""
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    conditions["peak_gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    line = {"name": name, "ours": round(rows / seconds), "peer": None, "ratio": None, "unit": "rows/s of wall time"}
    print(json.dumps({**line, "n": rows, "conditions": conditions}), flush=True)


def size_of(folder: Path) -> int:
    """Bytes of the files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def plan(tables: Path, folder: Folder, rows: int) -> None:
    """Cut the tables into shards and write the plan."""
    notes: dict[str, object] = {}
    with measured("plan", rows, notes):
        made = make_plan(UrlTable(url_list=str(tables), caption_col="caption"), folder, ROWS_PER_SHARD, {})
        notes |= {"shards": len(made.units), "bytes": size_of(Path(folder.path))}


def manifest(folder: Folder, rows: int) -> None:
    """Publish a snapshot of as many shards, and read it."""
    notes: dict[str, object] = {}
    with measured("manifest", rows, notes):
        shards = tuple(
            Shard(name=f"{number:05d}", samples=ROWS_PER_SHARD, bytes=2**28, sha256=f"{number:064x}")
            for number in range(rows // ROWS_PER_SHARD)
        )
        fields = ("jpg", "json", "txt")
        publish_shards(folder, shards, fields=fields, card=None, options={}, rows=rows, dropped={})
        snapshot = read_snapshot(folder.uri)
        notes |= {"shards": len(snapshot.shards), "bytes": size_of(Path(folder.path, "_snapshots"))}


@dataclass(frozen=True)
class Digests:
    """A shard's view as the search sees it: every hundredth image of the set is that of half its number."""

    number: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """All of the shard."""
        return np.arange(ROWS_PER_SHARD)

    def __len__(self) -> int:
        return ROWS_PER_SHARD

    def digests(self) -> list[bytes]:
        """16 bytes for each image, a mix of its number (splitmix64), and 16 more that nobody reads."""
        rows = self.number * ROWS_PER_SHARD + self.positions
        words = np.where(rows % 100 == 0, rows // 2, rows).astype(np.uint64)
        mixed = np.stack([_mixed(words), _mixed(words + np.uint64(2**63)), words, words], axis=1)
        return [row.tobytes() for row in mixed]


def duplicates(folder: Folder, rows: int) -> None:
    """Sort the digests of all shards into bins, then search each part of the bins."""
    shards = tuple(
        Shard(name=f"{number:05d}", samples=ROWS_PER_SHARD, bytes=0, sha256="")
        for number in range(rows // ROWS_PER_SHARD)
    )
    step = Step(folder, shards, folder.folder("work"), None, Workers(processes_count=0))
    notes: dict[str, object] = {}
    with measured("duplicates", rows, notes):
        for number in range(len(shards)):
            write_table(step.work, f"digests/{table_file(number)}", sorted_digests(cast(ShardView, Digests(number))))
        parts = parts_of(step)
        step.each_part("duplicates", parts, search_part)
        found = sum(len(table) for _, table in step.read_all("duplicates", parts))
        special = np.arange(0, rows, 100)
        assert found == int(np.count_nonzero(special // 2 % 100)), found
        notes |= {"found": found, "parts": parts, "bytes": size_of(Path(step.work.path))}


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def main() -> None:
    """All parts in a temporary folder, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10 * FILE_ROWS)
    parser.add_argument("--parts", nargs="+", choices=("plan", "manifest", "duplicates"))
    arguments = parser.parse_args()
    rows, parts = arguments.rows // FILE_ROWS * FILE_ROWS, arguments.parts or ("plan", "manifest", "duplicates")
    place = Path(tempfile.mkdtemp(prefix="clipmill-plan-"))
    try:
        folder = Folder(str(place / "out"))
        if "plan" in parts:
            (place / "tables").mkdir()
            write_tables(place / "tables", rows)
            plan(place / "tables", folder, rows)
        if "manifest" in parts:
            manifest(folder, rows)
        if "duplicates" in parts:
            duplicates(folder, rows)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
