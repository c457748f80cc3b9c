"""GLIP's claim of prompt tuning (Li et al. 2021, tables 11 to 13): it comes near full tuning, with deep fusion alone.

The teacher and ``late`` of ``glip.py`` go on with few photographs of textured shapes, named by their shape: with all
weights, or with a prompt alone. Full tuning has the rate of the pre-training, since the paper's 1e-4 moves so small a
network little in so few steps.
"""

from pathlib import Path

import glip
from claim import Claim, named, run
from coloured_shapes import SHAPES, Part, make

STEPS, IMAGES, VALIDATED = 150, 60, 200
RATES = {"full": ("--learning-rate", 1e-3), "prompt": ()}
STARTS = {"teacher": (), "late": ("--no-fusion",)}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """AP of the photographs as ``teacher/full`` and ``late/prompt``."""
    few, val = (make(folder, *part) for part in (("few", photos(IMAGES)), ("val", photos(VALIDATED))))
    words = folder / "shapes.txt"
    words.write_text("\n".join(SHAPES) + "\n")
    pretrained, metrics = folder.parent / "glip", dict[str, float]()
    glip.prepare(pretrained)
    for start, flags in STARTS.items():
        glip.trained(pretrained, start, seed)
        for tuning, rate in RATES.items():
            output = folder / f"{start}-{tuning}-{seed}"
            what = ("--start-from", pretrained / f"{start}-{seed}", "--data", few, "--class-names", *SHAPES)
            how = ("--steps", STEPS, "--batch-size", 8, "--workers", 0, "--loader-workers", 0, "--seed", seed)
            job = ("finetune_glip", f"drawn-{tuning}", *what, *glip.NETWORK, *how, *rate, *flags)
            run(*job, "--output-folder", output, *glip.store(folder))
            found = glip.evaluated(output, "--detection", f"val={val},words={words}")
            metrics[f"{start}/{tuning}"] = found["det/val/ap"]
    return metrics


def photos(count: int) -> Part:
    return Part(count, plain=False, named_by_shape=True)


def near(full: float, prompt: float) -> bool:
    """A prompt has nine tenths of full tuning; 96 % in the paper with fusion, 68 % without."""
    return prompt >= 0.9 * full


CLAIMS = (
    Claim("deep fusion: a prompt comes near full tuning, AP", *map(named, ("teacher/full", "teacher/prompt")), near),
    Claim(
        "late fusion: it does not",
        *map(named, ("late/full", "late/prompt")),
        lambda full, prompt: not near(full, prompt),
    ),
)
