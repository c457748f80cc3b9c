"""One sample of a scene with distances: image, depth map, caption, columns and annotations.

Captions say how far objects and walls are, so that a CLIP trained on them knows such words. A distance has the words of
the nearest row of ``DISTANCES``; the first word of each row is that of DepthCLIP for the same distance.
"""

from dataclasses import dataclass

from pipeline.shards.depth_values import encode_depth
from pipeline.sources.drawn import truth, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.render import encode
from pipeline.sources.drawn.rooms import Room, render_room, sample_room
from pipeline.sources.drawn.sample import SCENE_COLUMNS, Value, asked_of
from pipeline.sources.drawn.scenes import Look
from pipeline.sources.drawn.truth import Record
from pipeline.sources.drawn.words import UNRELATED, article, dressed

ROOM_SPLITS = ("train", "val")
ROOM_COLUMNS = {**SCENE_COLUMNS, "scene": str, "distance": float, "wall": float}
DISTANCES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (1.0, ("giant", "right in front of the camera")),
    (1.5, ("extremely close", "very near")),
    (2.0, ("close", "near")),
    (2.25, ("not in distance", "at a middle distance")),
    (2.5, ("a little remote", "some way off")),
    (2.75, ("far", "far away")),
    (3.0, ("unseen", "hardly to be seen, it is so far away")),
)
FORMS = ("{a} that is {d}", "the {o} is {d}", "this {o} is {d}", "{a}, {d}")


@dataclass(frozen=True, slots=True)
class DrawnRoom:
    """A sample; ``depth`` is the content of ``depth.png``, ``record`` that of ``boxes.json``."""

    image: bytes
    depth: bytes
    caption: str
    columns: dict[str, Value | float]
    record: Record


def draw_room(
    split: str, seed: int, index: int, size: int, captions: int = 1, questions: int = 4, annotators: int = 1
) -> DrawnRoom:
    """Sample ``index`` of ``split``: a pure function of its arguments."""
    room = sample_room(Draws(seed, split, index, "room"), index, size)
    brush, pen = Draws(seed, split, index, "render"), Draws(seed, split, index, "words")
    image, _ = encode(render_room(room, brush), brush)
    texts = [write_distances(room, pen) for _ in range(captions)]
    record = truth.scene_record(room.scene)
    for one, distance in zip(record["objects"], room.distances, strict=True):
        one["distance"] = round(distance, 3)
    asked = asked_of(split, seed, index, room.scene, questions, annotators)
    said: list[Record] = [{"caption": text, "caption_true": true, "phrases": []} for text, true in texts]
    record |= said[0] | {"more_captions": said[1:], "questions": asked}
    columns = _columns(split, index, room, texts[0][1])
    return DrawnRoom(image, encode_depth(room.depth()), texts[0][0], columns, record)


def distance_words(metres: float) -> tuple[str, ...]:
    """The words for a distance: those of the nearest row of ``DISTANCES``."""
    return min(DISTANCES, key=lambda row: abs(row[0] - metres))[1]


def write_distances(room: Room, pen: Draws) -> tuple[str, bool]:
    """A caption that says how far one or two objects or the wall are, and whether it is true of the image."""
    if pen.chance(world.WRONG_CAPTIONS):
        return dressed(pen.pick(UNRELATED), pen), False
    order = pen.shuffled(range(len(room.distances)))
    parts = [_object_at_distance(room, number, pen) for number in order[: 2 if pen.chance(0.4) else 1]]
    if pen.chance(0.35):
        parts.append(f"the wall is {pen.pick(distance_words(room.wall))}")
    text = " and ".join(parts)
    return dressed(f"{text} {pen.pick(room.kind.phrases)}" if pen.chance(0.35) else text, pen), True


def _object_at_distance(room: Room, number: int, pen: Draws) -> str:
    named = _named(room.scene.objects[number].look, pen)
    words = pen.pick(distance_words(room.distances[number]))
    return pen.pick(FORMS).format(a=f"{article(named)} {named}", o=named, d=words)


def _named(look: Look, pen: Draws) -> str:
    noun = world.noun(look.shape)
    name = "object" if pen.chance(0.2) else noun.name if pen.chance(0.8) else pen.pick(noun.synonyms)
    return f"{look.colour} {name}" if pen.chance(0.5) else name


def _columns(split: str, index: int, room: Room, true: bool) -> dict[str, Value | float]:
    """Those of other scenes, the class of the place, and the distances of the nearest object and of the wall."""
    look = room.scene.objects[room.scene.main].look
    return {
        "index": index,
        "split": split,
        "label": look.shape,
        "shape": look.shape,
        "variant": look.variant,
        "colour": look.colour,
        "texture": look.texture,
        "size": look.size,
        "style": room.scene.style,
        "ground": room.scene.ground,
        "objects": len(room.scene.objects),
        "caption_true": true,
        "scene": room.kind.name,
        "distance": round(room.distances[-1], 3),
        "wall": round(room.wall, 3),
    }
