"""A teacher's pseudo boxes on scenes of the Tux Paint stamps, whose images are real, against the stamps' true boxes.

The teacher is a small GLIP, trained on scenes of the training stamps: boxes with classes, and captions whose noun
phrases name a class. It annotates captioned scenes of other stamps of the same eight classes. A pseudo box is right if
it overlaps, by 0.5 or more, a true box of its phrase's class that no better box has.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from claim import Claim, named, run
from glip import COMMON, store

CLASSES = ("bird", "chess piece", "coin", "fish", "flower", "hat", "house", "insect")
SAMPLES, VALIDATED, STEPS, SIZE = 1500, 300, 1000, 64
THRESHOLDS = (0.25, 0.5)
NAME = "pseudo"


def measure(seed: int, folder: Path) -> dict[str, float]:
    """``precision/0.5``, ``recall/0.5`` and boxes per caption ``boxes/0.5``, of boxes with this score or more."""
    train, val = stamps(folder, "train", SAMPLES), stamps(folder, "val", VALIDATED)
    output = folder / f"teacher-{seed}"
    what = ("--data", train, "--class-names", *CLASSES, "--output-folder", output, "--steps", STEPS, "--seed", seed)
    run("pretrain_glip", "drawn", *what, *COMMON, *store(folder))
    what = ("--data", val, "--teacher", output, "--name", f"{NAME}_{seed}", "--processes-count", 0, "--no-track")
    run("annotate_pseudo_boxes", "checkpoint", *what)
    metrics: dict[str, float] = {}
    for least in THRESHOLDS:
        right, made, true, images = counts(val, f"{NAME}_{seed}", least)
        metrics |= {f"precision/{least}": right / max(made, 1), f"recall/{least}": right / true}
        metrics[f"boxes/{least}"] = made / images
    return metrics


def stamps(folder: Path, split: str, samples: int) -> Path:
    """The snapshot of scenes of a split, with the noun phrases of their captions; made once."""
    from pipeline.shards.sample import Sample
    from pipeline.shards.tar import TarWriter
    from pipeline.sources.source import Slice
    from pipeline.sources.stamp_scenes import StampScenes

    tar, output = folder / f"{split}-tar" / "00000.tar", folder / split
    if not tar.exists():
        tar.parent.mkdir(parents=True, exist_ok=True)
        source = StampScenes(split=split, samples=samples, size=SIZE, most_things=3, only=CLASSES)
        unfinished = tar.with_suffix(".part")
        with unfinished.open("wb") as file:
            writer = TarWriter(file)
            for number, row in enumerate(source.rows(Slice(count=samples, digest="", where={"start": 0}))):
                record = json.loads(row.members["boxes.json"])
                record |= {"caption": row.caption, "phrases": phrases(row.caption, record["objects"])}
                fields = {"jpg": row.image, "txt": row.caption.encode(), "boxes.json": json.dumps(record).encode()}
                writer.write(Sample(f"{number:06d}", fields))
            writer.close()
        unfinished.rename(tar)
    run("refresh_dataset", "webdataset", "--tars", tar, "--output-folder", output,
        "--number-sample-per-shard", samples, "--processes-count", 0)  # fmt: skip
    return output


def phrases(caption: str, objects: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The noun phrases of ``caption`` that name a class, with the ids of its objects."""
    from pipeline.stages.annotate.caption_phrases import noun_phrases

    known = [(start, end, class_of(caption[start:end])) for start, end in noun_phrases(caption, "rules")]
    ids = {name: [one["id"] for one in objects if one["label"] == name] for name in CLASSES}
    return [{"start": start, "end": end, "objects": ids[name]} for start, end, name in known if name]


def class_of(phrase: str) -> str:
    """The class that a phrase such as "two fish" names; empty for none."""
    from pipeline.sources.drawn.world import plural
    from pipeline.sources.stamp_classes import PLURALS

    ends = {name: (name, PLURALS.get(name) or plural(name)) for name in CLASSES}
    return next((name for name, words in ends.items() if phrase.endswith(words)), "")


def counts(data: Path, sidecar: str, least: float) -> tuple[int, int, int, int]:
    """The pseudo boxes that are right, all of them, all true boxes, and images."""
    from pipeline.loaders.samples import Samples
    from pipeline.shards.objects import overlaps, read_objects
    from pipeline.shards.sidecar import Wanted
    from pipeline.shards.snapshot import read_snapshot
    from pipeline.stages.annotate.pseudo_boxes import JOB, objects_of_row

    samples = Samples(read_snapshot(str(data)), open_shards=1, sidecars=(Wanted(name=sidecar, job=JOB),))
    right = made = true = 0
    for sample in (samples[number] for number in range(len(samples))):
        truth, found = read_objects(sample), objects_of_row(sample.rows[sidecar], least)
        free = set(range(len(truth)))
        for place in sorted(range(len(found)), key=lambda n: -found.scores[n]):
            name = class_of(found.labels[place])
            same = [n for n in free if truth.labels[n] == name]
            near = overlaps(found.boxes[[place]], truth.boxes[same])[0] if same else []
            if len(near) and near.max() >= 0.5:
                free.remove(same[int(near.argmax())])
                right += 1
        made, true = made + len(found), true + len(truth)
    return right, made, true, len(samples)


CLAIMS = (
    Claim("real: a higher threshold makes pseudo boxes more precise", *map(named, ("precision/0.25", "precision/0.5"))),
    Claim("real: and finds fewer objects", named("recall/0.5"), named("recall/0.25")),
)
