"""From shards to the optimiser's step on this machine: is the step ever starved, and what does all the rest cost?

    python tests/benchmarks/end_to_end.py feed
    python tests/benchmarks/end_to_end.py overhead
    python tests/benchmarks/end_to_end.py feed --architecture ViT-B-16 --size 256 --batch-size 512 --loader-workers 12 \
        --compile-blocks                                    # where there is a GPU

``feed``: samples per second of the loader alone, of the loop alone (on batches that are in memory), and of both
together, with the share of time in which the loop waits for data: where the loader alone is faster than the loop alone,
that must be next to nothing, and both together as fast as the loop. ``overhead``: the whole job with logging to MLflow,
system metrics, checkpoints and evaluations beside the training, against the loop with none of these, in turns; asked is
a loss of at most 3 %. Speeds are those between the first log and the last. One line of JSON each.

The loop has one thread and the loader one process, as on a machine with two cores. A GPU is taken where there is one,
with bfloat16. Neither Ray nor data are needed: the shards are drawn.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import Batch, LoaderConfig, training_batches
from pipeline.models.clip import Config
from pipeline.models.method import build_method
from pipeline.runs.evaluate import CheckpointEvaluation
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking, start
from pipeline.training.launch import follower, launch
from pipeline.training.run import Run, RunPlan, prepare

KEPT = 12  # batches in memory for the loop alone


class Waits:
    """A tracker that keeps the share of time in which the loop waited for data."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep one number."""
        self.shares += [metrics["perf/data_wait"]] if "perf/data_wait" in metrics else []

    def log_file(self, name: str, content: bytes) -> None:
        """Not kept."""

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nothing is queued."""


def settle(arguments: argparse.Namespace, folder: Path, evaluates: bool = False, **changes: Any) -> RunPlan:
    """The plan of a run in a new folder."""
    settings = Run(
        output_folder=tempfile.mkdtemp(dir=folder),
        data=arguments.data or str(folder / "data"),
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        warmup_steps=arguments.steps // 4,
        checkpoint_every_minutes=None,
        compile_blocks=arguments.compile_blocks,
        loader=LoaderConfig(loader_workers=arguments.loader_workers, image_decoder=arguments.image_decoder),
        **changes,
    )
    start: Literal["bag_of_words", "paper"] = "bag_of_words" if "clipmill" in arguments.architecture else "paper"
    method = Config(architecture=arguments.architecture, text_start=start)
    return prepare(method, settings, evaluates=evaluates)[0]


def loader_batches(plan: RunPlan) -> Any:
    """The batches of a plan, as its loop makes them."""
    method = build_method(plan.method)
    settings = method.reader_settings(plan.run)
    readers = method.readers(train=True, seed=plan.run.seed, settings=settings)
    config = plan.run.loader
    return training_batches(plan.snapshot, readers, plan.order(), steps=range(plan.steps), config=config)


def loader_alone(plan: RunPlan) -> float:
    """Samples per second, once the first batches are there."""
    with closing(loader_batches(plan)) as batches:
        list(islice(batches, KEPT))
        began, seen = time.perf_counter(), 0
        for batch in islice(batches, plan.steps - KEPT):
            seen += len(batch["image"])
            if time.perf_counter() - began > 30:
                break
        return seen / (time.perf_counter() - began)


def loop_alone(plan: RunPlan) -> float:
    """Samples per second with batches that are in memory."""
    with closing(loader_batches(plan)) as batches:
        kept = list(islice(batches, KEPT))

    def again(*_: Any, **__: Any) -> Iterator[Batch]:
        yield from (dict(batch) for batch in cycle(kept))

    with patch("pipeline.training.loop.training_batches", again):
        return launch(plan).samples_per_second


def feed(arguments: argparse.Namespace, folder: Path) -> None:
    """The loader, the loop, both."""
    settings = {"log_every_steps": 20}
    loader = loader_alone(settle(arguments, folder, **settings))
    loop = loop_alone(settle(arguments, folder, **settings))
    waits = Waits()
    together = launch(settle(arguments, folder, **settings), lambda: waits).samples_per_second
    conditions = f"loader alone {loader:.0f}; waiting for data {statistics.mean(waits.shares):.4f} of the time, "
    conditions += f"{max(waits.shares):.4f} at most between two logs"
    unit, share = "samples per second, with the loader and without it", round(statistics.mean(waits.shares), 4)
    show(arguments, "end_to_end_feed", together, loop, conditions, unit, data_wait=share)


def overhead(arguments: argparse.Namespace, folder: Path) -> None:
    """Everything on, everything off, in turns."""
    bare, full = [], []
    for number in range(arguments.rounds):
        for way in ((full, bare), (bare, full))[number % 2]:
            way.append(everything(arguments, folder) if way is full else nothing(arguments, folder))
    pairs = [round(one / other, 3) for one, other in zip(full, bare, strict=True)]
    every = arguments.steps // arguments.evaluations
    conditions = f"logs every 20 steps to MLflow (sqlite), a checkpoint every {every // 2} steps, an evaluation every "
    conditions += f"{every} on two sets of {arguments.evaluated} samples, {arguments.steps} steps; rounds {pairs}"
    unit = "samples per second, with logging, checkpoints and evaluations and without"
    show(arguments, "end_to_end_overhead", statistics.median(full), statistics.median(bare), conditions, unit)


def nothing(arguments: argparse.Namespace, folder: Path) -> float:
    """The loop with a checkpoint at its end alone."""
    return launch(settle(arguments, folder, log_every_steps=10**6)).samples_per_second


def everything(arguments: argparse.Namespace, folder: Path) -> float:
    """As a job runs it; the evaluation of the last step comes behind the training."""
    sets = Evaluations(zero_shot=("drawn_shapes",), retrieval=("drawn_val",), evaluation_samples=arguments.evaluated)
    every = arguments.steps // arguments.evaluations
    plan = settle(
        arguments,
        folder,
        evaluates=True,
        log_every_steps=20,
        checkpoint_every_steps=every // 2,
        evaluate_every_steps=every,
    )
    tracking = Tracking(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    with start(tracking, replace(plan.run, output_folder="run")) as tracker:
        with follower(plan, CheckpointEvaluation(evaluations=sets, run=tracker.handle)) as beside:
            speed = launch(plan, tracker.handle.open).samples_per_second
        assert len(beside.results) >= arguments.evaluations, "an evaluation is missing"
    return speed


def show(
    arguments: argparse.Namespace, name: str, ours: float, peer: float, conditions: str, unit: str, **more: float
) -> None:
    """One line."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one thread"
    line = {
        "name": name,
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "ratio": round(ours / peer, 3),
        "unit": unit,
        "n": arguments.steps * arguments.batch_size,
        "conditions": f"{conditions}; {arguments.architecture}, batches of {arguments.batch_size}, {where}, "
        f"{arguments.loader_workers} loader processes, JPEGs decoded on {arguments.image_decoder}, "
        f"torch {torch.__version__}",
        **more,
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("feed", "overhead"))
    parser.add_argument("--architecture", default="clipmill-small")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=2, help="evaluations in a run, the last one included")
    parser.add_argument("--evaluated", type=int, default=512, help="samples of each set")
    parser.add_argument("--loader-workers", type=int, default=1)
    parser.add_argument("--image-decoder", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile-blocks", action="store_true")
    parser.add_argument("--data", default="", help="a snapshot; otherwise one is drawn")
    parser.add_argument("--samples", type=int, default=8000, help="to draw")
    parser.add_argument("--size", type=int, default=64, help="pixels a side of drawn images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="clipmill-end-to-end-") as name:
        if not arguments.data:
            options = ShardOptions(media=MediaOptions(image=ImageOptions(resize_mode="no", skip_reencode=True)))
            refresh(
                Drawn(samples=arguments.samples, size=arguments.size),
                Folder(f"{name}/data"),
                options,
                Workers(processes_count=0),
            )
        {"feed": feed, "overhead": overhead}[arguments.what](arguments, Path(name))


if __name__ == "__main__":
    main()
