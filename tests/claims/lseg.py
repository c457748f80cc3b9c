"""LSeg's claim (Li et al. 2022, section 5.1): a segmenter for any words segments classes that had no labels.

Two worlds: drawn scenes, and scenes composed of the Tux Paint stamps, whose images are real and whose validation stamps
are in no training image. Pixels of novel classes are void in training; captions name them to the text tower's CLIP. It
is trained once; a seed decides the segmenter's start, order and crops.

The background is a word in every evaluation. ``own words``: the words of one group and the background, where pixels of
the other group are void; ``all words``: both groups compete. A head of fixed labels never predicts a class that it was
not trained on, so its intersection with that class is empty and its IoU is 0.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from claim import Claim, Metrics, named, run

IMAGES, EPOCHS, VALIDATED = 3000, 12, 300
ONE_THREAD = ("--workers", 0, "--loader-workers", 0)


@dataclass(frozen=True)
class World:
    """``source``: where scenes come from; ``card``: the card of all words, with the novel ones."""

    source: str
    card: str


WORLDS = {"drawn": World("drawn", "drawn_val"), "stamps (real)": World("stamp-scenes", "stamp_scenes_val")}


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Mean IoU of the classes as ``drawn/own/base``, ``own/novel``, ``all/base``, ``all/novel``."""
    return {f"{name}/{metric}": value for name in WORLDS for metric, value in measure_world(name, seed, folder).items()}


def measure_world(name: str, seed: int, folder: Path) -> dict[str, float]:
    """One of the worlds, which do not need each other."""
    world = WORLDS[name]
    place = folder / world.source
    masks, val, words = prepare(place, world)
    output = place / f"lseg-{seed}"
    what = ("drawn", "--data", masks, "--base", world.card, "--text-tower", place / "teacher", "--seed", seed)
    run("train_lseg", *what, "--output-folder", output, "--epochs", EPOCHS, *ONE_THREAD, *store(place))
    together = overlaps(output, val, place, "all")
    metrics = {f"all/{group}": mean(together, words[group]) for group in ("base", "novel")}
    metrics |= {f"own/{group}": mean(overlaps(output, val, place, group), words[group]) for group in ("base", "novel")}
    return metrics


def mean(overlap: Metrics, words: tuple[str, ...]) -> float:
    """The mean IoU of the words that occur."""
    found = [overlap[f"seg/val/iou/{word}"] for word in words if f"seg/val/iou/{word}" in overlap]
    return sum(found) / len(found)


def overlaps(checkpoint: Path, val: Path, place: Path, group: str) -> Metrics:
    """The metrics of a segmenter that is asked for the words of a group and the background."""
    result = checkpoint / f"{group}.json"
    if not result.exists():
        options = f"words={place}/{group}.txt,unlabelled=background,background_word=background"
        sets = ("--segmentation", f"val={val},{options}", "--output", result)
        run("evaluate", "sets", "--checkpoint", checkpoint, *sets)
    metrics: dict[str, float] = json.loads(result.read_text())["metrics"]
    return metrics


def prepare(place: Path, world: World) -> tuple[Path, Path, dict[str, tuple[str, ...]]]:
    """The folders of scenes with masks and of validation scenes, and the words by group; makes what is not there."""
    captions, masks, val = (place / name for name in ("captions", "masks", "val"))
    draw = ("refresh_dataset", world.source, "--processes-count", 1, "--number-sample-per-shard", 500)
    run(*draw, "--samples", 12_000, "--size", 64, "--output-folder", captions)
    run(*draw, "--samples", IMAGES, "--size", 96, "--truth", "all", "--output-folder", masks)
    run(*draw, "--samples", VALIDATED, "--size", 96, "--split", "val", "--output-folder", val)
    teacher = ("--output-folder", place / "teacher", "--epochs", 7)
    run("pretrain_clip", "demo", "--data", captions, *teacher, *ONE_THREAD, *store(place))
    words = words_of(world)
    for group, some in words.items():
        (place / f"{group}.txt").write_text("\n".join(some) + "\n")
    return masks, val, words


def words_of(world: World) -> dict[str, tuple[str, ...]]:
    from pipeline.dataset import load_card

    card = load_card(world.card)
    return {"all": card.classes, "base": tuple(w for w in card.classes if w not in card.novel), "novel": card.novel}


def store(place: Path) -> tuple[str, str]:
    return "--tracking-uri", f"sqlite:///{place}/mlflow.db"


def claims(world: str) -> tuple[Claim, ...]:
    def half(seen: float, unseen: float) -> bool:
        return unseen >= seen / 2

    def none(metrics: Metrics) -> float:
        return 0.0

    own, together = ([named(f"{world}/{words}/{group}") for group in ("base", "novel")] for words in ("own", "all"))
    return (
        Claim(f"{world}, own words: unseen classes reach half of the IoU of seen ones", *own, half),
        Claim(f"{world}, all words: so they do", *together, half),
        Claim(f"{world}, unseen classes, all words: better than a head of fixed labels", none, together[1]),
    )


CLAIMS = tuple(claim for world in WORLDS for claim in claims(world))
