"""What a claim is, and the small trainings that the claims are measured on."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """Of two numbers of a seed's metrics, the second is larger; or ``test`` says what else must hold of them."""

    text: str
    baseline: Callable[[Metrics], float]
    result: Callable[[Metrics], float]
    test: Callable[[float, float], bool] = lambda baseline, result: result > baseline

    def verdict(self, seeds: Sequence[Metrics]) -> str:
        """``yes`` where it holds for every seed, else for how many of them."""
        held = sum(self.test(self.baseline(one), self.result(one)) for one in seeds)
        return "yes" if held == len(seeds) else "no" if not held else f"for {held} of {len(seeds)} seeds"


def named(*names: str) -> Callable[[Metrics], float]:
    """The mean of these metrics."""
    return lambda metrics: sum(metrics[name] for name in names) / len(names)


def run(job: str, *words: str | float | Path) -> None:
    """A job of the project, as one types it; what is done already is not done again."""
    subprocess.run([sys.executable, ROOT / "jobs" / f"{job}.py", *map(str, words)], check=True, cwd=ROOT)


def drawn(folder: Path, samples: int) -> Path:
    """A snapshot of drawn scenes of 64 pixels a side."""
    words = ("--samples", str(samples), "--size", "64", "--number-sample-per-shard", "1000", "--processes-count", "1")
    run("refresh_dataset", "drawn", *words, "--output-folder", folder)
    return folder


def drawn_videos(folder: Path, split: str, samples: int) -> Path:
    """A snapshot of drawn videos of 64 pixels a side."""
    words = ("--video", "--split", split, "--samples", samples, "--size", 64, "--number-sample-per-shard", 200)
    run("refresh_dataset", "drawn", *words, "--processes-count", 0, "--output-folder", folder)
    return folder


def trained_clip(folder: Path, samples: int, epochs: int, seed: int) -> Path:
    """The checkpoint of a small CLIP that was trained on drawn images, in the folder of a claim."""
    output = folder / f"clip-{seed}"
    places = ("--data", drawn(folder / "images", samples), "--output-folder", output)
    how = ("--epochs", epochs, "--workers", 0, "--loader-workers", 1, "--seed", seed)
    run("pretrain_clip", "demo", *places, *how, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    return sorted((output / "checkpoints").iterdir())[-1]


def embed_frames(data: Path, checkpoint: Path, rate: float, name: str) -> None:
    """Features of the frames of drawn videos as a sidecar, ``rate`` of them per second."""
    how = ("--frames-per-second", rate, "--processes-count", 0, "--name", name)
    run("embed_dataset", "frames", "--data", data, "--checkpoint", checkpoint, *how)
