"""GLIP's claims (Li et al. 2021, tables 1 to 3 and 11 to 13) on scenes of coloured shapes (``coloured_shapes.py``).

Unseen names are the pairs without boxes in the detection data; captions name them. A seed has four trainings of equal
length: ``boxes`` reads the detection data alone (GLIP-B), ``teacher`` also few captions with gold boxes (GLIP-C),
``late`` is the same without fusion, ``student`` also reads many captions with the teacher's pseudo boxes (GLIP-T).
Every phrase of a caption names one object, so its recall at 1 is the accuracy of referring expressions.
"""

import json
from pathlib import Path

from claim import Claim, Metrics, named, run
from coloured_shapes import SEEN, Part, make, words_file

STEPS, BATCH, VALIDATED = 1000, 8, 200
PARTS = {
    "boxes": Part(1500, labels="seen"),
    "gold": Part(120, captions=True),
    "captions": Part(1500, labels="none", captions=True),
    "val": Part(VALIDATED, captions=True),
}
NETWORK = ("--image-size", 64, "--anchor-scale", 3)
COMMON = (*NETWORK, "--batch-size", BATCH, "--mixed-captions", 6, "--workers", 0, "--loader-workers", 0)
CAPTIONED = "boxes=0.6,gold=0.4"
TRAININGS = {
    "late": (CAPTIONED, ("--no-fusion",)),
    "teacher": (CAPTIONED, ()),
    "boxes": ("boxes", ()),
    "student": ("boxes=0.5,gold=0.2,captions=0.3", ("--pseudo-boxes", "teacher_{seed}", "--least-box-score", 0.3)),
}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """AP of boxes as ``student/ap``, ``ap_r`` (unseen names), and recall of phrases as ``late/r1``, ``r1/side``."""
    prepare(folder)
    metrics: dict[str, float] = {}
    for name in TRAININGS:
        if name == "student":
            annotate(folder, seed)
        metrics |= {f"{name}/{part}": value for part, value in trained(folder, name, seed).items()}
    return metrics


def prepare(folder: Path) -> None:
    """Make what is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        make(folder, name, part)


def trained(folder: Path, name: str, seed: int) -> dict[str, float]:
    """The metrics of a training."""
    parts, options = TRAININGS[name]
    output = folder / f"{name}-{seed}"
    data = ",".join(f"{folder}/{part}" for part in parts.split(","))
    what = ("--data", data, "--output-folder", output, "--class-names", *SEEN, "--steps", STEPS, "--seed", seed)
    more = [str(word).format(seed=seed) for word in options]
    run("pretrain_glip", "drawn", *what, *COMMON, *more, *store(folder))
    sets = f"val={folder}/val"
    found = evaluated(output, "--detection", f"{sets},words={words_file(folder)}", "--phrase-grounding", sets)
    return {key.split("/", 2)[2]: value for key, value in found.items() if key.startswith(("det/", "grounding/"))}


def annotate(folder: Path, seed: int) -> None:
    """The teacher's boxes for the captions."""
    what = ("--data", folder / "captions", "--teacher", folder / f"teacher-{seed}", "--name", f"teacher_{seed}")
    run("annotate_pseudo_boxes", "checkpoint", *what, "--processes-count", 0, "--no-track")


def evaluated(checkpoint: Path, *sets: str) -> dict[str, float]:
    """The metrics of a checkpoint."""
    result = checkpoint / "result.json"
    if not result.exists():
        run("evaluate", "sets", "--checkpoint", checkpoint, *sets, "--output", result)
    metrics: dict[str, float] = json.loads(result.read_text())["metrics"]
    return metrics


def store(folder: Path) -> tuple[str, str]:
    return "--tracking-uri", f"sqlite:///{folder}/mlflow.db"


def zero(metrics: Metrics) -> float:
    return 0.0


CLAIMS = (
    Claim("deep fusion beats late fusion on referring phrases, R@1", named("late/r1"), named("teacher/r1")),
    Claim("… phrases with a side", named("late/r1/side"), named("teacher/r1/side")),
    Claim("unseen names, boxes alone: AP is more than 0", zero, named("boxes/ap_r")),
    Claim("unseen names: AP rises with 120 captions with gold boxes", named("boxes/ap_r"), named("teacher/ap_r")),
    Claim("unseen names: a student beats its teacher, AP", named("teacher/ap_r"), named("student/ap_r")),
)
