"""CLIP-ViL's claims (Shen et al. 2021, sections 4 and 5) on drawn scenes with ten annotators to each question.

A CLIP is trained on captions, an image classifier of the same architecture on the labels of the same images, once each.
A transformer answers questions from the frozen grid of either, as stored by ``jobs/embed_dataset.py grid``, and from
CLIP's tower trained along with it. Questions are about other images than the towers were trained on; a seed decides the
transformer's start and the order of the data.
"""

import json
from pathlib import Path

from claim import Claim, named, run

IMAGES, ASKED, VALIDATED = 12_000, 4_000, 800
CLIP_EPOCHS, LABEL_EPOCHS, EPOCHS = 7, 7, 40
SIDE = 64
SIZE = ("--image-size", SIDE, SIDE)
ONE_THREAD = ("--workers", 0, "--loader-workers", 0)
TOWERS = ("clip", "classifier")


def measure(seed: int, folder: Path) -> dict[str, float]:
    """VQA's accuracy, also by kind of question, as ``clip/accuracy``, ``classifier/accuracy_colour``, ``tuned/...``."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, val = prepare(folder)
    metrics: dict[str, float] = {}
    for name in TOWERS:
        frozen = ("--frozen", "--grid", f"grid_{name}")
        metrics |= answered(name, seed, folder, asked, val, "--tower", folder / name, *frozen)
    return metrics | answered("tuned", seed, folder, asked, val, "--tower", folder / "clip")


def answered(name: str, seed: int, folder: Path, asked: Path, val: Path, *options: str | Path) -> dict[str, float]:
    """One transformer on one kind of grid."""
    output = folder / f"{name}-{seed}"
    what = ("drawn", "--data", asked, *options, *SIZE, "--output-folder", output, "--seed", seed)
    run("train_clipvil", *what, "--epochs", EPOCHS, "--least-count", 2, *ONE_THREAD, *store(folder))
    result = output / "result.json"
    if not result.exists():
        run("evaluate", "sets", "--checkpoint", output, "--vqa", f"val={val}", "--output", result)
    found: dict[str, float] = json.loads(result.read_text())["metrics"]
    prefix = "vqa/val/"
    return {f"{name}/{key.removeprefix(prefix)}": value for key, value in found.items() if key.startswith(prefix)}


def prepare(folder: Path) -> tuple[Path, Path]:
    """The folders of images with questions, for training and for validation, and both towers with their grids."""
    towers, asked, val = (folder / name for name in ("images", "asked", "val"))
    draw = ("refresh_dataset", "drawn", "--size", SIDE, "--processes-count", 0, "--number-sample-per-shard", 500)
    run(*draw, "--samples", IMAGES, "--output-folder", towers)
    more = ("--questions", 7, "--annotators", 10)
    run(*draw, "--samples", ASKED, "--first", IMAGES, *more, "--output-folder", asked)
    run(*draw, "--samples", VALIDATED, "--split", "val", *more, "--output-folder", val)
    place = (*ONE_THREAD, *store(folder))
    run("pretrain_clip", "demo", "--data", towers, "--output-folder", folder / "clip", "--epochs", CLIP_EPOCHS, *place)
    labels = ("--card", "drawn_shapes", "--head", "random", "--features", "tower", "--learning-rate", 1.5e-3)
    what = ("--data", towers, "--output-folder", folder / "classifier", "--epochs", LABEL_EPOCHS)
    run("finetune", "drawn", *what, *labels, *place)
    for name in TOWERS:
        grid = ("--checkpoint", folder / name, "--name", f"grid_{name}", "--batch-size", 64, "--processes-count", 0)
        run("embed_dataset", "grid", "--data", asked, *grid, *SIZE)
    return asked, val


def store(folder: Path) -> tuple[str, str]:
    """A tracking store of its own."""
    return "--tracking-uri", f"sqlite:///{folder}/mlflow.db"


ACCURACY = {name: named(f"{name}/accuracy") for name in (*TOWERS, "tuned")}
CONSTANT = named("clip/constant_by_kind")
CLAIMS = (
    Claim("questions: the grid sees more than each kind's most frequent answer", CONSTANT, ACCURACY["clip"]),
    Claim("CLIP's grid against that of a classifier of the same images", ACCURACY["classifier"], ACCURACY["clip"]),
    Claim("a tower that is trained end to end against the frozen one", ACCURACY["clip"], ACCURACY["tuned"]),
)
