"""The whole job jobs/draw_prompts.py on a running Ray, against the same images from a plain pool of processes.

    python tests/benchmarks/draw_overhead.py      # two processes, a minute each way on idle cores
    python tests/benchmarks/draw_overhead.py --prompts 4 --steps 20 --rounds 1

Both ways are scripts that are started anew, with as many processes of one thread, and draw CLIPDraw's images with the
same code. Ours is the job as users submit it: it checks all settings by starting an image, runs a task for each image
on a Ray that runs already, and writes scores and the gallery. The peer is ``multiprocessing.Pool`` with spawned
processes and the same units, without any check or report. Wall time of the scripts, imports included; both take turns,
and the fastest round counts. ``equal``: all PNG are the same bytes. Asked: at most 1.10 times the pool.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[2]
JUDGE = "clipmill-tiny:untrained"
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("star", "disc", "ring", "house", "arrow", "heart")


def spec_of(options: argparse.Namespace) -> str:
    """The method with its options."""
    loop = f"loop.steps={options.steps},loop.evaluate_every=50"
    return f"clipdraw:clips=[{options.model}],strokes={options.strokes},side={options.side},{loop}"


def texts_of(options: argparse.Namespace) -> list[str]:
    """The prompts."""
    return [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS][: options.prompts]


def pool(options: argparse.Namespace, folder: Path) -> None:
    """All images from a plain pool; this process is the script of the peer."""
    import torch

    from pipeline.runs.drawings import DrawingRunner, SubjectSource, parse_drawing_spec, plan_drawings

    spec = parse_drawing_spec(spec_of(options))
    subjects = {text: SubjectSource(text) for text in texts_of(options)}
    settings = {"specs": {spec.text: spec}, "subjects": subjects, "judge": JUDGE, "output": str(folder)}
    runner = DrawingRunner(**settings, device="cpu")
    units = plan_drawings([spec], list(subjects.values()), [1])
    with multiprocessing.get_context("spawn").Pool(options.processes, torch.set_num_threads, (1,)) as workers:
        workers.map(runner, [[unit] for unit in units], chunksize=1)


def job(options: argparse.Namespace, folder: Path, address: str) -> None:
    """All images from the job."""
    words = ["clipdraw", "--methods", spec_of(options), "--prompts", *texts_of(options), "--judge", JUDGE]
    words += ["--processes-count", str(options.processes), "--no-track", "--device", "cpu", "--output-folder"]
    started([str(ROOT / "jobs/draw_prompts.py"), *words, str(folder)], {"RAY_ADDRESS": address})


def started(words: list[str], more: dict[str, str]) -> None:
    """Run a script of Python to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def wall(work: Callable[..., None], *arguments: object) -> float:
    """Seconds of wall time."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def images(folder: Path) -> dict[str, bytes]:
    """The finished images."""
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Both ways in turns, in new folders."""
    import ray

    from pipeline.stages.ray_session import connect

    connect(options.processes)
    address = ray.get_runtime_context().gcs_address
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    equal = True
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            ours, peer = Path(name, f"ours-{number}"), Path(name, f"peer-{number}")
            seconds["ours"].append(wall(job, options, ours, address))
            seconds["peer"].append(wall(started, [__file__, *sys.argv[1:], "--pool", str(peer)], {}))
            equal = equal and images(ours) == images(peer) and len(images(ours)) > 0
    ray.shutdown()
    least = {name: min(some) for name, some in seconds.items()}
    line: dict[str, object] = {"name": "draw_overhead"} | {name: round(one, 2) for name, one in least.items()}
    line |= {"ratio": round(least["ours"] / least["peer"], 3), "unit": "s", "n": options.prompts, "equal": equal}
    work = f"{options.model}, {options.strokes} strokes, {options.side} px, {options.steps} steps"
    return line | {"conditions": f"{options.processes} processes, {options.rounds} rounds; {work}"}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clipmill-small:untrained")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--strokes", type=int, default=32)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", type=Path, help="Folder for the images of the pool; the script calls itself with it.")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.pool:
        pool(options, options.pool)
    else:
        print(json.dumps(compare(options)))


if __name__ == "__main__":
    main()
