"""The refresh job with one and two CPUs, against a plain process pool, and its memory as the rows grow.

    python tests/benchmarks/write_scaling.py                    # speed; three JSON lines
    python tests/benchmarks/write_scaling.py --memory 1000000   # memory; one JSON line, some minutes

``write_scaling``: samples per second of wall time with two shards at a time (ours) and one (peer); asked 1.7 or more.
``ray_overhead``: wall time of the same units through Ray (ours) and through ``ProcessPoolExecutor`` (peer), both
with two processes that are warm; asked 1.15 or less. Needs two cores that nobody else uses.
``memory_flat``: peak resident megabytes of the driver with so many rows (ours) and with 10,000 (peer), for a source
that gives the same image for every row; ``conditions`` has the workers' figures.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import psutil

from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Part, Row, Slice
from pipeline.stages.ray_session import connect
from pipeline.stages.refresh.make_shard import AS_IT_IS, ShardOptions, make_shard
from pipeline.stages.refresh.plan import make_plan
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import shaping_options
from pipeline.stages.shard_tasks import Workers

ROUNDS = 3
FEW_ROWS = 10_000
IMAGE = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()


@dataclass(frozen=True, kw_only=True)
class OneImage:
    """So many rows with the same image: all there is to do is to carry them."""

    kind: ClassVar[str] = "one image"
    has_captions: ClassVar[bool] = True
    samples: int

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """Slices by number."""
        for start in range(0, self.samples, rows_per_shard):
            count = min(rows_per_shard, self.samples - start)
            yield Slice(count=count, digest=f"{start}", where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """The same image under another url."""
        for number in range(piece.count):
            yield Row(
                url=f"http://host/{piece.where['start']}/{number}.jpg",
                caption="an image",
                parts=(Part("image", IMAGE),),
            )

    def schema(self) -> Mapping[str, type]:
        """No columns."""
        return {}


def wall(work: Callable[[Folder], object]) -> float:
    """Seconds that ``work`` takes in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        work(Folder(folder))
        return time.monotonic() - began


def through_ray(samples: int, processes: int, folder: Folder) -> None:
    """The job as it is."""
    refresh(Drawn(samples=samples), folder, options(samples), Workers(processes_count=processes))


def through_pool(samples: int, pool: ProcessPoolExecutor, folder: Folder) -> None:
    """The same units in a plain pool of processes, one submitted for each."""
    source = Drawn(samples=samples)
    shaping = shaping_options(options(samples), ("image",))
    plan = make_plan(source, folder, options(samples).number_sample_per_shard, shaping)
    list(pool.map(partial(make_shard, source=source, folder=folder, options=options(samples)), plan.units))


def options(samples: int) -> ShardOptions:
    """Eight shards: two workers finish at about the same time, and a shard takes seconds, as real ones do."""
    return replace(AS_IT_IS, number_sample_per_shard=max(samples // 8, 1))


def measure_speed(samples: int) -> None:
    """Alternate the three ways, print two lines."""
    connect(2)
    one, two, plain = [], [], []
    with ProcessPoolExecutor(2) as pool:
        for work in (partial(through_ray, 1000, 2), partial(through_pool, 1000, pool)):
            wall(work)  # imports, and workers that Ray keeps
        for _ in range(ROUNDS):
            two.append(wall(partial(through_ray, samples, 2)))
            plain.append(wall(partial(through_pool, samples, pool)))
            one.append(wall(partial(through_ray, samples, 1)))
    rate = samples / statistics.median(two), samples / statistics.median(one)
    print_line("write_scaling", *rate, "samples/s", samples, f"drawn, 128 px, 8 shards, {ROUNDS} rounds")
    seconds = statistics.median(two), statistics.median(plain)
    print_line("ray_overhead", *seconds, "s", samples, f"2 processes each, {ROUNDS} rounds")


def measure_memory(rows: int) -> None:
    """Run a driver for few rows and one for many, each alone."""
    few, many = (
        json.loads(subprocess.run([sys.executable, __file__, "--drive", str(count)], capture_output=True).stdout)
        for count in (FEW_ROWS, rows)
    )
    workers = f"largest worker {few['worker']:.0f} MB with {FEW_ROWS} rows, {many['worker']:.0f} MB with {rows}"
    print_line("memory_flat", many["driver"], few["driver"], "MB resident at peak", rows, workers)


def drive(rows: int) -> None:
    """One refresh of ``rows`` rows; prints what its processes held at most."""
    largest, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ray::" in "".join(process.cmdline()):
                        largest[0] = max(largest[0], process.memory_info().rss)
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    many = replace(AS_IT_IS, number_sample_per_shard=10_000 if rows > FEW_ROWS else 1000)
    wall(lambda folder: refresh(OneImage(samples=rows), folder, many, Workers(processes_count=2)))
    ended.set()
    watcher.join()
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"driver": driver, "worker": largest[0] / 2**20}))


def print_line(name: str, ours: float, peer: float, unit: str, n: int, conditions: str) -> None:
    """One result."""
    cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    line = {"name": name, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(ours / peer, 3)}
    print(json.dumps({**line, "unit": unit, "n": n, "conditions": f"{conditions}; {cores}"}), flush=True)


def main() -> None:
    """Speed, or memory when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--memory", type=int, metavar="ROWS")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
    elif arguments.memory:
        measure_memory(arguments.memory)
    else:
        measure_speed(arguments.samples)


if __name__ == "__main__":
    # Ray ships classes of a script by value; as a module of its own they are found by name in the workers.
    sys.path.insert(0, str(Path(__file__).parent))
    main()
