"""GroupViT's claims (Xu et al. 2022, tables 1, 4 and 5): captions alone teach to segment, and prompts help.

Held-out drawn scenes, the ten colours as words, without background: every pixel of an object gets a word. Captions name
shapes, too, but transformers of this size and budget do not learn them: their zero-shot accuracy stays near chance. The
baseline is a CLIP of the same captions, images and number of steps, whose patches are compared with the words. Two
GroupViTs, with and without the loss of the prompts, have the same order and start. Sizes and steps are what twenty
minutes of a core allow. An oracle that names each group by the mask that it overlaps most tells the errors apart.
"""

import json
from pathlib import Path

from claim import Claim, named, run

SAMPLES, VALIDATED, EPOCHS, BATCH = 6000, 300, 16, 64
COMMON = ("--epochs", EPOCHS, "--batch-size", BATCH, "--warmup-steps", 100, "--workers", 0, "--loader-workers", 0)
MODELS = {
    "clip": ("pretrain_clip", "demo", "--architecture", "clipmill-small-vit"),
    "captions": ("pretrain_groupvit", "drawn", "--prompts", 0),
    "prompts": ("pretrain_groupvit", "drawn"),
}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """mIoU over the colours that occur and accuracy of pixels, as ``prompts/miou``."""
    captions, val = prepare(folder)
    metrics: dict[str, float] = {}
    for name, (job, *words) in MODELS.items():
        output = folder / f"{name}-{seed}"
        places = ("--data", captions, "--output-folder", output, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
        run(job, *words, *places, *COMMON, "--seed", seed)
        found = evaluated(output, "--segmentation", val)
        metrics |= {f"{name}/{part}": found[f"seg/val/{part}"] for part in ("miou", "pixel_accuracy")}
        if name != "clip":
            found = evaluated(output, "--grouping", val)
            metrics |= {f"{name}/{part}": found[f"group/val/{part}"] for part in ("naming_error", "grouping_error")}
    return metrics


def evaluated(checkpoint: Path, task: str, val: Path) -> dict[str, float]:
    """The metrics of a task on the validation scenes."""
    result = checkpoint / f"{task.strip('-')}.json"
    if not result.exists():
        sets = (task, f"val={val},words=drawn_colours,label_key=colour", "--output", result)
        run("evaluate", "sets", "--checkpoint", checkpoint, *sets)
    metrics: dict[str, float] = json.loads(result.read_text())["metrics"]
    return metrics


def prepare(folder: Path) -> tuple[Path, Path]:
    """The folders of captioned scenes with phrases, and of validation scenes; makes what is not there."""
    captions, val = folder / "captions", folder / "val"
    draw = ("refresh_dataset", "drawn", "--processes-count", 1, "--number-sample-per-shard", 500)
    run(*draw, "--samples", SAMPLES, "--size", 64, "--truth", "none", "--output-folder", captions)
    run(*draw, "--samples", VALIDATED, "--size", 64, "--split", "val", "--output-folder", val)
    run("extract_phrases", "snapshot", "--data", captions, "--processes-count", 0, "--no-track")
    return captions, val


CLAIMS = (
    Claim("GroupViT segments better than CLIP's patches, mIoU", named("clip/miou"), named("prompts/miou")),
    Claim("… accuracy of pixels", named("clip/pixel_accuracy"), named("prompts/pixel_accuracy")),
    Claim("… without prompts, mIoU", named("clip/miou"), named("captions/miou")),
    Claim("prompts help, mIoU", named("captions/miou"), named("prompts/miou")),
    Claim("… accuracy of pixels", named("captions/pixel_accuracy"), named("prompts/pixel_accuracy")),
    Claim("naming is a larger error than grouping", named("prompts/grouping_error"), named("prompts/naming_error")),
)
