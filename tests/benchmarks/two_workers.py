"""Two workers with a core each against one worker with one: the same global batch, the same losses.

    python tests/benchmarks/two_workers.py

The whole loop runs, from shards to the optimiser, each process pinned to a core and with one thread; the two exchange
features and gradients through gloo on the loopback interface. What the machine lets two processes reach that exchange
nothing is measured too, each with half of the batch. The three take turns; a speed is that of the
median step, since other programs may want the cores at times. Prints one line of JSON.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Config
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from pipeline.training.loop import run_training
from pipeline.training.measure import PHASES
from pipeline.training.run import Run, RunPlan, prepare

# A transformer, since batch normalisation would give each worker statistics, and so losses, of its own.
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SKIPPED = 5  # first steps: start-up, and the count of a step's work for three lengths of text


class Remember:
    """A tracker that keeps its records in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of a step."""
        self.rows.append((step, dict(metrics)))

    def log_file(self, name: str, content: bytes) -> None:
        """Not kept."""

    def flush(self, seconds: float) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nothing is queued."""


def draw(folder: str, samples: int) -> None:
    """Shards of the drawn world at 64 px."""
    options = ShardOptions(
        media=MediaOptions(image=ImageOptions(resize_mode="no", skip_reencode=True)), number_sample_per_shard=1000
    )
    refresh(Drawn(samples=samples, size=64), Folder(folder), options, Workers(processes_count=0))


def train(pickled: str, meeting: str, rank: int, world: int) -> None:
    """Be one rank: train the plan, and print the samples per second of this process's part and its losses."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    plan: RunPlan = pickle.loads(Path(pickled).read_bytes())
    tracker = Remember()
    run_training(plan, torch.device("cpu"), tracker)
    if tracker.rows:
        steps = [metrics for _, metrics in tracker.rows[SKIPPED:]]
        speed = statistics.median(metrics["perf/samples_per_second"] for metrics in steps)
        parts = {part: round(statistics.median(metrics[f"perf/{part}"] for metrics in steps), 3) for part in PHASES}
        losses = [metrics["train/loss"] for _, metrics in tracker.rows]
        print(json.dumps({"speed": speed, "losses": losses, "parts": parts}), flush=True)


def run(plan: RunPlan, folder: Path, ways: list[tuple[RunPlan, int, int]]) -> list[dict[str, object]]:
    """Start processes side by side, each with a plan, its rank (and core) and its world; what they print."""
    processes = []
    meeting = tempfile.mktemp(dir=folder)
    for number, (one, rank, world) in enumerate(ways):
        pickled = folder / f"plan-{number}.pickle"
        output_folder = tempfile.mkdtemp(dir=folder) if world == 1 else f"{meeting}-run"
        pickled.write_bytes(pickle.dumps(replace(one, run=replace(one.run, output_folder=output_folder))))
        command = [sys.executable, __file__, "--rank", pickled, meeting, str(rank), str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "a process failed"
    return [json.loads(output) for output in outputs if output]


def settle(arguments: argparse.Namespace, folder: Path, batch_size: int, steps: int) -> RunPlan:
    """The plan of a run that saves at its end alone."""
    settings = Run(
        output_folder=str(folder / f"settled-{batch_size}"),
        data=arguments.data or str(folder / "data"),
        batch_size=batch_size,
        steps=steps,
        warmup_steps=steps // 4,
        log_every_steps=1,
        checkpoint_every_minutes=None,
        loader=LoaderConfig(loader_workers=0),
    )
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    return prepare(Config(architecture=arguments.architecture or f"local-dir:{folder}"), settings)[0]


def main() -> None:
    """Take turns, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="", help="otherwise a small transformer")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", default="", help="a snapshot; otherwise one is drawn")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        pickled, meeting, rank, world = arguments.rank
        return train(pickled, meeting, int(rank), int(world))
    with tempfile.TemporaryDirectory(prefix="clipmill-two-workers-") as name:
        folder = Path(name)
        if not arguments.data:
            draw(str(folder / "data"), 4000)
        whole = settle(arguments, folder, arguments.batch_size, arguments.steps)
        half = settle(arguments, folder, arguments.batch_size // 2, arguments.steps)
        ones, twos, aparts, lines = [], [], [], []
        for number in range(arguments.rounds):
            (one,) = run(whole, folder, [(whole, number % 2, 1)])
            (two,) = run(whole, folder, [(whole, 0, 2), (whole, 1, 2)])
            apart = run(half, folder, [(half, 0, 1), (half, 1, 1)])
            ones.append(one["speed"]), twos.append(two["speed"]), aparts.append(sum(way["speed"] for way in apart))
            lines += [(one, two)]
    difference = max(abs(a - b) for one, two in lines for a, b in zip(one["losses"], two["losses"], strict=True))
    ratio = statistics.median(two / one for one, two in zip(ones, twos, strict=True))
    ceiling = statistics.median(apart / one for one, apart in zip(ones, aparts, strict=True))
    model = arguments.architecture or "ViT of width 128, 4 layers"
    line = {
        "name": "two_workers",
        "ours": round(statistics.median(twos), 1),
        "peer": round(statistics.median(ones), 1),
        "ratio": round(ratio, 3),
        "unit": "samples per second, two workers with a core each against one with one",
        "n": arguments.rounds * arguments.steps * arguments.batch_size,
        "conditions": f"{model}, global batch {arguments.batch_size}, float32, gloo, torch {torch.__version__}; rounds "
        f"{[round(two / one, 2) for one, two in zip(ones, twos, strict=True)]}; two that exchange nothing, with half "
        f"the batch each: {ceiling:.2f}; largest difference of a loss {difference:.1e}; parts of the two's time "
        f"{lines[-1][1]['parts']}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
