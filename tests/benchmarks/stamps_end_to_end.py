#!/usr/bin/env python
"""Real images through the whole road: Tux Paint stamps over loopback HTTP, shards, a small CLIP, its evaluation.

    apt-get install tuxpaint-stamps-default
    python tests/benchmarks/stamps_end_to_end.py --folder runs/stamps

Every step is a job as users type it; the commands are printed before they run. Ends with a table of what the model does
on held-out stamps and, as the last line, the same as JSON: ours is its image to text R@1, peer is chance. Where the
stamps are not installed it says so and does nothing.
"""

import argparse
import functools
import http.server
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.stamps import TuxPaintStamps

ROOT = Path(__file__).resolve().parents[2]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a line per request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The address of a loopback server on ``folder``."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def write_table(split: str, stamps: str, address: str, place: Path) -> int:
    """The url table of a split; returns its number of rows."""
    source = TuxPaintStamps(folder=stamps, split=split)
    pieces = source.slices(10_000, Folder(place.parent / "scratch"))
    rows = [row for piece in pieces for row in source.rows(piece) if row.problem is None]
    table = {
        "url": [f"{address}/{quote(row.url)}" for row in rows],
        "caption": [row.caption for row in rows],
        "label": [row.columns["label"] for row in rows],
    }
    pq.write_table(pa.table(table), place)
    return len(rows)


def call(*command: str) -> float:
    """Run a job, its command printed; returns the seconds it took."""
    print("$ python", shlex.join(command), flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def refresh(folder: Path, split: str, stamps: str, address: str) -> dict[str, Any]:
    """Make the shards of a split."""
    table = folder / f"{split}.parquet"
    rows = write_table(split, stamps, address, table)
    options = ["--caption-col", "caption", "--save-additional-columns", "label", "--allow-hosts", "127.0.0.1"]
    sizes = ["--image-size", "96", "--resize-mode", "border", "--number-sample-per-shard", "200"]
    out = ["--output-folder", str(folder / split)]
    seconds = call("jobs/refresh_dataset.py", "urls", "--url-list", str(table), *options, *sizes, *out)
    return {"rows": rows, "samples": read_snapshot(str(folder / split)).samples, "seconds": round(seconds, 1)}


def train_and_evaluate(folder: Path, steps: int) -> dict[str, float]:
    """Pre-train on the training shards, then evaluate the checkpoint and an untrained one on the held-out shards."""
    run = folder / "run"
    own = ["--data", str(folder / "train"), "--output-folder", str(run), "--workers", "0", "--steps", str(steps)]
    store = ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    call("jobs/pretrain_clip.py", "demo", *own, "--batch-size", "128", *store)
    card = str(ROOT / "datasets" / "tuxpaint_stamps.yaml")
    classes = folder / "classes.txt"
    classes.write_text("\n".join(read_classes(card)))
    held_out = str(folder / "held_out")
    sets = ["--zero-shot", f"stamps={held_out}", "--retrieval", f"stamps={held_out}", "--classes", str(classes)]
    call("jobs/evaluate.py", "sets", "--checkpoint", str(run), *sets, "--output", str(folder / "result.json"))
    return dict(json.loads((folder / "result.json").read_text())["metrics"])


def read_classes(card: str) -> tuple[str, ...]:
    """The class names of a card."""
    from pipeline.dataset import load_card

    return load_card(card).classes


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", default="/usr/share/tuxpaint/stamps", help="folder of the stamps")
    parser.add_argument("--folder", default="runs/stamps", help="where tables, shards and the run go")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    if not Path(options.stamps).is_dir():
        print(f"{options.stamps} is missing: apt-get install tuxpaint-stamps-default")
        return
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with served(options.stamps) as address:
        data = {split: refresh(folder, split, options.stamps, address) for split in ("train", "held_out")}
    metrics = train_and_evaluate(folder, options.steps)
    for name, value in metrics.items():
        print(f"{name:40} {value:.4f}")
    ours, held_out = metrics["retrieval/stamps/i2t_r1"], data["held_out"]["samples"]
    line = {"name": "stamps_end_to_end", "ours": ours, "peer": 1 / held_out, "ratio": round(ours * held_out, 1)}
    conditions = {"data": data, "metrics": metrics, "steps": options.steps}
    print(json.dumps({**line, "unit": "image to text R@1", "n": held_out, "conditions": conditions}))


if __name__ == "__main__":
    main()
