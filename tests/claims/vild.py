"""ViLD's claims (Gu et al. 2021, table 3): what text, CLIP's features, both, and both apart teach about novel classes.

Two worlds: drawn scenes, and scenes composed of the Tux Paint stamps, whose images are real and whose validation
stamps are in no training image. Novel classes have no boxes and no labels, only captions name them. The teacher, a
small CLIP of those captions, and the proposer are trained once; a seed decides the detectors' start, order and draws.
The numbers of images and epochs are what the time allowed; docs/methods.md says what more of them change. That
ViLD-text and the supervised head are also asked for the base words alone was added when a first run had shown what
novel words do; the number of epochs was raised from 4 to 12 when that run had shown that no mode was trained enough.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from claim import Claim, Metrics, named, run

IMAGES, EPOCHS, VALIDATED = 1500, 12, 300
MODES = ("supervised", "text", "image", "vild", "ensemble")
PARTS = ("ap", "ap_base", "ap_novel")
ONE_THREAD = ("--workers", 0, "--loader-workers", 0)


@dataclass(frozen=True)
class World:
    """``source``: where scenes come from; ``base`` and ``words``: cards of what has boxes, and of all that is asked."""

    source: str
    base: str
    words: str


WORLDS = {
    "drawn": World("drawn", "drawn_base", "drawn_val"),
    "stamps (real)": World("stamp-scenes", "stamp_scenes_base", "stamp_scenes_val"),
}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Box AP as ``drawn/vild/ap``, ``ap_base`` and ``ap_novel``, all words asked for; ``base alone``: only these."""
    return {f"{name}/{metric}": value for name in WORLDS for metric, value in measure_world(name, seed, folder).items()}


def measure_world(name: str, seed: int, folder: Path) -> dict[str, float]:
    """One of the worlds, which do not need each other."""
    world, metrics = WORLDS[name], dict[str, float]()
    place = folder / world.source
    boxes, val = prepare(place, world)
    for mode in MODES:
        output = place / f"{mode}-{seed}"
        begin = ("--teacher", place / "teacher", "--start-from", place / "proposer", "--mode", mode, "--no-masks")
        what = ("drawn", "--data", boxes, "--base", world.base, "--output-folder", output, "--seed", seed)
        run("train_vild", *what, *begin, "--epochs", EPOCHS, *ONE_THREAD, *store(place))
        found = asked(output, val, world.words)
        metrics |= {f"{mode}/{part}": found[f"det/val/{part}"] for part in PARTS}
        if mode in ("supervised", "text"):
            metrics[f"{mode}/base alone"] = asked(output, val, world.base)["det/val/ap"]
    return metrics


def asked(checkpoint: Path, val: Path, words: str) -> dict[str, float]:
    """What a detector finds when it looks for the classes of the card ``words``."""
    result = checkpoint / f"{words}.json"
    if not result.exists():
        sets = ("--detection", f"val={val}", "--detection-words", words, "--output", result)
        run("evaluate", "sets", "--checkpoint", checkpoint, *sets)
    metrics: dict[str, float] = json.loads(result.read_text())["metrics"]
    return metrics


def prepare(place: Path, world: World) -> tuple[Path, Path]:
    """The folders of scenes with stored regions and of validation scenes; makes what is not there."""
    captions, boxes, val = (place / name for name in ("captions", "boxes", "val"))
    draw = ("refresh_dataset", world.source, "--processes-count", 1, "--number-sample-per-shard", 500)
    run(*draw, "--samples", 12_000, "--size", 64, "--output-folder", captions)
    run(*draw, "--samples", IMAGES, "--size", 96, "--truth", "base", "--output-folder", boxes)
    run(*draw, "--samples", VALIDATED, "--size", 96, "--split", "val", "--output-folder", val)
    teacher, proposer = ("--output-folder", place / "teacher"), ("--output-folder", place / "proposer")
    run("pretrain_clip", "demo", "--data", captions, *teacher, "--epochs", 7, *ONE_THREAD, *store(place))
    run("train_proposer", "drawn", "--data", boxes, "--base", world.base, *proposer, *ONE_THREAD, *store(place))
    made = ("--teacher", place / "teacher", "--proposer", place / "proposer", "--most", 24, "--classes", world.base)
    run("extract_region_features", "proposals", "--data", boxes, *made, "--processes-count", 0, "--no-track")
    return boxes, val


def store(place: Path) -> tuple[str, str]:
    return "--tracking-uri", f"sqlite:///{place}/mlflow.db"


def claims(world: str) -> tuple[Claim, ...]:
    def of(mode: str, part: str) -> "Metrics":
        return named(f"{world}/{mode}/{part}")

    def best(metrics: Metrics) -> float:
        return max(of(mode, "ap")(metrics) for mode in ("supervised", "text", "image"))

    def close(baseline: float, result: float) -> bool:
        return abs(result - baseline) <= 0.1 * baseline

    return (
        Claim(f"{world}, novel: ViLD beats ViLD-text", of("text", "ap_novel"), of("vild", "ap_novel")),
        Claim(f"{world}, novel: ViLD-image beats ViLD-text", of("text", "ap_novel"), of("image", "ap_novel")),
        Claim(f"{world}, base: ViLD-image loses to ViLD-text", of("image", "ap_base"), of("text", "ap_base")),
        Claim(f"{world}, all: ViLD is better than supervised, text and image", best, of("vild", "ap")),
        Claim(f"{world}, all: so is ViLD-ensemble", best, of("ensemble", "ap")),
        Claim(
            f"{world}, base words alone: ViLD-text is within a tenth of supervised",
            of("supervised", "base alone"),
            of("text", "base alone"),
            close,
        ),
        Claim(
            f"{world}, novel: supervised finds nothing",
            of("text", "ap_novel"),
            of("supervised", "ap_novel"),
            lambda _, result: result == 0,
        ),
    )


CLAIMS = tuple(claim for world in WORLDS for claim in claims(world))
