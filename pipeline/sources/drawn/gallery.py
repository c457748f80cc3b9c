"""Pages for inspection: every shape in every style, scenes with their annotations drawn in, the test sets, motions.

A page is an image, uint8 [height, width, 3], RGB.
"""

import cv2
import numpy as np
import simplejpeg

from pipeline.shards.segmentation import mask_of
from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.film import draw_frames
from pipeline.sources.drawn.motion import MOTIONS, moving_scene
from pipeline.sources.drawn.outlines import Pixels
from pipeline.sources.drawn.render import render
from pipeline.sources.drawn.sample import describe_scene, draw_sample
from pipeline.sources.drawn.scenes import Look, Pose, Scene, finished, make_object, sample_rgb
from pipeline.sources.drawn.story import tell
from pipeline.sources.drawn.truth import Record

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (20, 20, 20)
_MARKS = ((200, 30, 30), (30, 90, 200), (20, 130, 50), (170, 90, 0), (130, 40, 160), (0, 130, 140))


def shapes_page(size: int = 96, seed: int = 0) -> Pixels:
    """One row per shape (and variant), one column per style; colours and textures alternate."""
    rows = []
    names = [(noun.name, variant) for noun in world.SHAPES for variant in noun.variants or (None,)]
    for number, (shape, variant) in enumerate(names):
        cells = [_alone(shape, variant, number + i, style, size, seed) for i, style in enumerate(world.STYLE_NAMES)]
        rows.append(np.hstack([_label(variant or shape, 170, size), *cells]))
    heading = np.hstack([_label("", 170, 24), *(_label(style, size, 24) for style in world.STYLE_NAMES)])
    half = (len(rows) + 1) // 2
    left, right = (np.vstack([heading, *part]) for part in (rows[:half], rows[half:]))
    return np.hstack([left, _padded(right, left.shape[0])])


def attributes_page(size: int = 96, seed: int = 0) -> Pixels:
    """One row per colour, one column per texture; all discs in the flat style."""
    rows = [np.hstack([_label("", 170, 24), *(_label(texture, size, 24) for texture in world.TEXTURE_NAMES)])]
    for colour in world.COLOUR_NAMES:
        looks = [
            Look("disc", None, colour, texture, "large", sample_rgb(Draws(seed, "gallery", i, "scene"), colour))
            for i, texture in enumerate(world.TEXTURE_NAMES)
        ]
        cells = [_posed(look, "flat", size, Draws(seed, "gallery", i, "render")) for i, look in enumerate(looks)]
        rows.append(np.hstack([_label(colour, 170, size), *cells]))
    return np.vstack(rows)


def scenes_page(split: str = "train", count: int = 12, size: int = 256, seed: int = 0) -> Pixels:
    """Scenes with mask outlines, boxes, ids and depth.

    Below each scene: its questions and its caption, with phrases underlined in their objects' colours."""
    cells = [_explained(split, index, size, seed) for index in range(count)]
    cells += [np.full_like(cells[0], 255)] * (count % 2)
    return np.vstack([np.hstack(cells[i : i + 2]) for i in range(0, len(cells), 2)])


def sets_page(columns: int = 10, size: int = 96, seed: int = 0) -> Pixels:
    """One row per split: its first samples with their labels."""
    rows = []
    for split in (*sets.RECIPES, *sets.IMAGE_SETS):
        cells = []
        for index in range(columns):
            sample = draw_sample(split, seed, index, size)
            image = simplejpeg.decode_jpeg(sample.image)
            cells.append(np.vstack([image, _label(str(sample.columns["label"]), size, 16, 0.3)]))
        rows.append(np.hstack([_label(split, 130, size + 16), *cells]))
    return np.vstack(rows)


def motions_page(columns: int = 8, size: int = 96, seed: int = 0) -> Pixels:
    """One row per motion: frames of a clip from the left to the right, and its caption."""
    rows = []
    for index, motion in enumerate(MOTIONS):
        moving = moving_scene("motions", Draws(seed, "motions", index, "motion"), index, size, 3.0)
        frames = draw_frames(moving, "motions", seed, index)
        places = (np.arange(columns) + 0.5) * len(frames) / columns
        story = tell(moving, Draws(seed, "motions", index, "story"), 0.0, plain=False)
        cells = np.hstack(list(frames[places.astype(int)]))
        said = np.full((20, 170 + cells.shape[1], 3), 255, np.uint8)
        _text(said, story.text, 174, 14)
        rows += [np.hstack([_label(motion, 170, size), cells]), said]
    return np.vstack(rows)


def _alone(shape: str, variant: str | None, turn: int, style: str, size: int, seed: int) -> Pixels:
    draws = Draws(seed, "gallery", turn, "scene")
    colour = world.COLOUR_NAMES[turn % len(world.COLOUR_NAMES)]
    texture = world.TEXTURE_NAMES[turn % len(world.TEXTURE_NAMES)]
    look = Look(shape, variant, colour, texture, "large", sample_rgb(draws, colour))
    return _posed(look, style, size, Draws(seed, "gallery", turn, "render"))


def _posed(look: Look, style: str, size: int, draws: Draws) -> Pixels:
    """The object, upright in the middle."""
    middle = (size - 1) / 2
    obj = make_object(look, Pose(0.33 * size, 0.0, 0.0, 1.0, False), (middle, middle), size)
    return render(Scene(size, style, draws.pick(world.GROUND_NAMES), finished([obj]), 0), draws)


def _explained(split: str, index: int, size: int, seed: int) -> Pixels:
    scene = sets.scene_of(split, Draws(seed, split, index, "scene"), index, size)
    image = render(scene, Draws(seed, split, index, "render"))
    record, _ = describe_scene(split, seed, index, scene)
    for obj in record["objects"]:
        _outline(image, obj)
    text = np.full((120, 5 * size // 2, 3), 255, np.uint8)
    _write_caption(text, record)
    wide = np.full((size, 5 * size // 2, 3), 255, np.uint8)
    wide[:, :size] = image
    _write_objects(wide, record, size)
    return np.vstack([wide, text])


def _outline(image: Pixels, obj: Record) -> None:
    """Mask edge, box and id, in the colour of the id."""
    colour = _MARKS[obj["id"] % len(_MARKS)]
    mask = mask_of(obj["segmentation"], *obj["segmentation"]["size"])
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, colour, 1)
    x, y, width, height = obj["bbox"]
    cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), colour, 1)
    cv2.putText(image, str(obj["id"]), (x + 2, y + 11), _FONT, 0.4, colour, 1, cv2.LINE_AA)


def _write_objects(wide: Pixels, record: Record, left: int) -> None:
    scene = record["scene"]
    _text(wide, f"{scene['style']}, {scene['ground']}, main {record['main']}", left + 8, 16)
    for row, obj in enumerate(record["objects"]):
        line = f"{obj['id']}: {obj['size']} {obj['texture']} {obj['colour']} {obj['variant'] or obj['label']}"
        _text(wide, line, left + 8, 36 + 28 * row, _MARKS[obj["id"] % len(_MARKS)])
        _text(wide, f"hidden {100 * obj['occlusion']:.0f} %  area {obj['area']}", left + 24, 49 + 28 * row)
    for row, question in enumerate(record["questions"]):
        _text(wide, f"{question['question']} {question['answer']}", left + 8, wide.shape[0] - 60 + 14 * row)


def _write_caption(canvas: Pixels, record: Record) -> None:
    """The caption in a fixed pitch, so that the underlines match the spans."""
    caption, pitch, per_line = record["caption"], 7, canvas.shape[1] // 7 - 2
    if not record["caption_true"]:
        _text(canvas, "(wrong on purpose)", 8, 112, (200, 30, 30))
    for place, letter in enumerate(caption):
        x, y = 6 + pitch * (place % per_line), 16 + 24 * (place // per_line)
        _text(canvas, letter, x, y)
        for phrase in record["phrases"]:
            if phrase["start"] <= place < phrase["end"]:
                mark = _MARKS[phrase["objects"][0] % len(_MARKS)] if phrase["objects"] else (150, 150, 150)
                cv2.line(canvas, (x, y + 4), (x + pitch - 1, y + 4), mark, 2)


def _label(words: str, width: int, height: int, scale: float = 0.42) -> Pixels:
    cell = np.full((height, width, 3), 255, np.uint8)
    cv2.putText(cell, words, (4, height // 2 + 4), _FONT, scale, _INK, 1, cv2.LINE_AA)
    return cell


def _text(canvas: Pixels, words: str, x: int, y: int, colour: tuple[int, int, int] = _INK) -> None:
    cv2.putText(canvas, words, (x, y), _FONT, 0.36, colour, 1, cv2.LINE_AA)


def _padded(page: Pixels, height: int) -> Pixels:
    rest = np.full((height - page.shape[0], page.shape[1], 3), 255, np.uint8)
    return np.vstack([page, rest])
