"""A small world for methods of grounding: two to four of six shapes in four colours, so names are pairs: "red star".

The embedded world has 24 shapes in many styles, from which a small detector learns next to nothing in the few minutes
of a core that a claim may take. These scenes have its outlines and colours, and its flat style on a clear ground. A
sixth of the 24 pairs are unseen: detection data have no boxes of them, captions name them.

A phrase names one object: by its pair ("red star"), by its shape or colour where that is enough ("star", "red thing"),
or by its side where an image has two of a shape ("left star").
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from claim import run

SHAPES = ("disc", "square", "star", "triangle", "heart", "cross")
COLOURS = ("red", "blue", "green", "yellow")
PAIRS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
UNSEEN = ("red disc", "blue square", "green star", "yellow triangle")
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
SIZE = 64
RADII = (0.13, 0.2)  # of an object, relative to the image's side


@dataclass(frozen=True)
class Part:
    """A part of the data: its images, and which annotations they have.

    ``labels``: ``seen`` has boxes of these pairs alone, ``all`` of all, ``none`` neither boxes nor phrases. With
    ``captions`` boxes belong to phrases of a caption instead of to classes. ``plain`` images are flat drawings on a
    clear ground, others photographs on any ground. ``named_by_shape`` makes the shape the name of a class.
    """

    samples: int
    labels: str = "all"
    captions: bool = False
    plain: bool = True
    named_by_shape: bool = False


def make(folder: Path, name: str, part: Part) -> Path:
    """The snapshot of a part in ``folder/name``; made once."""
    tar, output = folder / f"{name}-tar" / "00000.tar", folder / name
    if not tar.exists():
        _write(tar, name, part)
    caption = "txt" if part.captions else "None"
    run("refresh_dataset", "webdataset", "--tars", tar, "--caption-field", caption, "--output-folder", output,
        "--number-sample-per-shard", part.samples, "--processes-count", 0)  # fmt: skip
    return output


def words_file(folder: Path) -> Path:
    """All pairs as an annotation file, in which the unseen ones are rare."""
    file = folder / "pairs.json"
    names = [{"id": n, "name": pair, "frequency": "r" if pair in UNSEEN else "f"} for n, pair in enumerate(PAIRS)]
    file.write_text(json.dumps({"categories": names}))
    return file


def _write(tar: Path, name: str, part: Part) -> None:
    from pipeline.shards.sample import Sample
    from pipeline.shards.tar import TarWriter

    tar.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tar.with_suffix(".part")
    with unfinished.open("wb") as file:
        writer = TarWriter(file)
        for index in range(part.samples):
            writer.write(Sample(f"{index:06d}", sample_fields(name, index, part)))
        writer.close()
    unfinished.rename(tar)


def sample_fields(name: str, index: int, part: Part) -> dict[str, bytes]:
    """The members of sample ``index``, a pure function of the arguments."""
    from pipeline.sources.drawn.draws import Draws
    from pipeline.sources.drawn.questions import ask
    from pipeline.sources.drawn.render import encode, render
    from pipeline.sources.drawn.truth import scene_record, to_bytes

    stream = f"coloured shapes {name}"
    scene = _scene(Draws(0, stream, index, "scene"), part.plain)
    brush, pen = Draws(0, stream, index, "render"), Draws(0, stream, index, "words")
    record: dict[str, Any] = scene_record(scene)
    for one in record["objects"]:
        one["label"] = one["label"] if part.named_by_shape else f"{one['colour']} {one['label']}"
    members = {"jpg": encode(render(scene, brush), brush)[0]}
    if part.captions:
        caption, phrases = _caption(record["objects"], pen)
        record |= {"caption": caption, "phrases": phrases, "open": True}
        members["txt"] = caption.encode()
    if part.labels == "seen":
        record["objects"] = [one for one in record["objects"] if one["label"] not in UNSEEN]
    if part.labels != "none":
        record["questions"] = [one.record() for one in ask(scene, Draws(0, stream, index, "questions"), 4)]
        members["boxes.json"] = to_bytes(record)
    return members


def _scene(draws: Any, plain: bool) -> Any:
    """Two to four objects with different pairs that do not touch; the first two often have the same shape."""
    from pipeline.sources.drawn import world
    from pipeline.sources.drawn.scenes import Look, Scene, finished, make_object, sample_pose, sample_rgb

    pairs = [(draws.pick(SHAPES), draws.pick(COLOURS))]
    if draws.chance(0.5):
        pairs.append((pairs[0][0], draws.pick(COLOURS)))
    pairs += [(draws.pick(SHAPES), draws.pick(COLOURS)) for _ in range(1 + draws.integer(2))]
    stack: list[Any] = []
    for shape, colour in dict.fromkeys(pairs):
        texture = "plain" if plain else draws.pick(world.TEXTURE_NAMES)
        variant = "five-pointed star" if shape == "star" else None
        look = Look(shape, variant, colour, texture, "medium", sample_rgb(draws, colour))
        for _ in range(20):
            pose = sample_pose(draws, shape, SIZE * draws.uniform(*RADII))
            pose = replace(pose, angle=0.3 * draws.normal())
            reach = 1.2 * pose.radius
            centre = tuple(draws.uniform(reach, SIZE - reach) for _ in range(2))
            if all(math.dist(centre, other) > reach + room for other, room in ((o[1], o[2]) for o in stack)):
                stack.append((make_object(look, pose, centre, SIZE), centre, reach))
                break
    style, ground = ("flat", "clear") if plain else ("photo", draws.pick(world.GROUND_NAMES))
    return Scene(SIZE, style, ground, finished([one for one, _, _ in stack]), 0)


def _caption(objects: Sequence[dict[str, Any]], pen: Any) -> tuple[str, list[dict[str, Any]]]:
    """ "a red star, the left disc and a green thing": every object once, with the phrase of each."""
    named = [(one["id"], *_name(one, objects, pen)) for one in pen.shuffled(objects)]
    text, phrases = "", []
    for place, (number, kind, words) in enumerate(named):
        joint = "" if not place else " and " if place == len(named) - 1 else ", "
        text += f"{joint}{'the' if kind == 'side' else 'a'} "
        phrases.append({"start": len(text), "end": len(text) + len(words), "objects": [number], "kind": kind})
        text += words
    return text, phrases


def _name(one: dict[str, Any], objects: Sequence[dict[str, Any]], pen: Any) -> tuple[str, str]:
    """The kind of a phrase for this object alone, and the phrase."""
    shape, colour = _shape(one), one["colour"]
    like = [other for other in objects if _shape(other) == shape]
    if len(like) == 2 and pen.chance(0.5):
        (x, _), (other, _) = (_centre(box["bbox"]) for box in sorted(like, key=lambda box: box["id"] != one["id"]))
        if abs(x - other) > SIZE / 5:
            return "side", f"{'left' if x < other else 'right'} {shape}"
    if len(like) == 1 and pen.chance(0.25):
        return "shape", shape
    if Counter(other["colour"] for other in objects)[colour] == 1 and pen.chance(0.15):
        return "colour", f"{colour} thing"
    return "pair", f"{colour} {shape}"


def _shape(one: dict[str, Any]) -> str:
    return str(one["label"]).split(" ")[-1]


def _centre(box: Sequence[float]) -> tuple[float, float]:
    return box[0] + box[2] / 2, box[1] + box[3] / 2
