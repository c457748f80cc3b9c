"""One sample of a split: image, caption, columns and annotations."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.sources.drawn import digits, sets, truth, words
from pipeline.sources.drawn.annotators import answers_of
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.questions import ask
from pipeline.sources.drawn.render import encode, render
from pipeline.sources.drawn.scenes import Scene
from pipeline.sources.drawn.truth import Record
from pipeline.sources.drawn.world import WRONG_CAPTIONS

SCENE_COLUMNS: Mapping[str, type] = {
    "index": int,
    "split": str,
    "label": str,
    "shape": str,
    "variant": str,
    "colour": str,
    "texture": str,
    "size": str,
    "style": str,
    "ground": str,
    "objects": int,
    "caption_true": bool,
}
RELATION_COLUMNS: Mapping[str, type] = {**SCENE_COLUMNS, "relation": str, "negative": str, "swap": str}
DIGIT_COLUMNS: Mapping[str, type] = {"index": int, "split": str, "label": str, "font": str}

Value = str | int | bool | None


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """``record`` is the content of ``boxes.json`` (None for digits, which have no objects)."""

    image: bytes
    caption: str
    columns: dict[str, Value]
    record: Record | None


def columns_of(split: str) -> Mapping[str, type]:
    """Names and types of the columns of a split's samples."""
    name = sets.recipe_name(split)
    if name in sets.IMAGE_SETS:
        return DIGIT_COLUMNS
    return RELATION_COLUMNS if name == "relations" else SCENE_COLUMNS


def draw_sample(
    split: str, seed: int, index: int, size: int, captions: int = 1, questions: int = 4, annotators: int = 1
) -> DrawnSample:
    """Sample ``index`` of ``split``: a pure function of its arguments."""
    if sets.recipe_name(split) in sets.IMAGE_SETS:
        return _draw_digit(split, seed, index, size)
    scene = sets.scene_of(split, Draws(seed, split, index, "scene"), index, size)
    brush = Draws(seed, split, index, "render")
    image, _ = encode(render(scene, brush), brush)
    record, columns = describe_scene(split, seed, index, scene, captions, questions, annotators)
    return DrawnSample(image, record["caption"], columns, record)


def describe_scene(
    split: str, seed: int, index: int, scene: Scene, captions: int = 1, questions: int = 4, annotators: int = 1
) -> tuple[Record, dict[str, Value]]:
    """The record and the columns of a scene: everything but pixels."""
    pen = Draws(seed, split, index, "words")
    columns = _scene_columns(split, index, scene)
    if sets.recipe_name(split) == "relations":
        first, relation_columns = _say_relation(scene, index, pen)
        columns |= relation_columns
    elif sets.recipe_name(split) == "aerial":
        first = words.Caption(f"an aerial view of many tiny {columns['label']}s")
    else:
        first = words.write_caption(scene, pen, _wrong(split))
    columns["caption_true"] = first.truthful
    more = [words.write_caption(scene, pen, _wrong(split)).record() for _ in range(captions - 1)]
    record = truth.scene_record(scene) | first.record()
    asked = asked_of(split, seed, index, scene, questions, annotators)
    return record | {"more_captions": more, "questions": asked}, columns


def asked_of(split: str, seed: int, index: int, scene: Scene, questions: int, annotators: int) -> list[Record]:
    """So many questions about a scene, each with the answers of several annotators if there are more than one."""
    asked = ask(scene, Draws(seed, split, index, "questions"), questions) if questions else ()
    if annotators == 1:
        return [question.record() for question in asked]
    people = Draws(seed, split, index, "annotators")
    return [{**one.record(), "answers": answers_of(one, people, annotators)} for one in asked]


def _wrong(split: str) -> float:
    """Only the pre-training splits have false captions: in a test set they would penalise the better model."""
    return WRONG_CAPTIONS if split in sets.CAPTIONED else 0.0


def _scene_columns(split: str, index: int, scene: Scene) -> dict[str, Value]:
    look = scene.objects[scene.main].look
    return {
        "index": index,
        "split": split,
        "label": sets.label_of(split, scene, index),
        "shape": look.shape,
        "variant": look.variant,
        "colour": look.colour,
        "texture": look.texture,
        "size": look.size,
        "style": scene.style,
        "ground": scene.ground,
        "objects": len(scene.objects),
    }


def _say_relation(scene: Scene, index: int, pen: Draws) -> tuple[words.Caption, dict[str, Value]]:
    """The true sentence, and the columns with the false one; the kinds of swap alternate."""
    relation = str(sets.wanted_class("relations", index))
    first, second = sets.ordered_pair(scene, relation)
    swap = words.SWAPS[index // len(sets.RELATION_CLASSES) % len(words.SWAPS)]
    negative = words.swap_words(scene, first, second, relation, swap, pen)
    return words.say_relation(scene, first, second, relation), {
        "relation": relation,
        "negative": negative,
        "swap": swap,
    }


def _draw_digit(split: str, seed: int, index: int, size: int) -> DrawnSample:
    brush = Draws(seed, split, index, "render")
    if sets.recipe_name(split) == "digits_real":
        number = digits.scans(split.endswith("_train"))[index]
        (pixels, label), font = digits.real_digit(number, size), "scan"
    else:
        label = str(sets.wanted_class(split, index))
        pixels, font = digits.render_digit(label, size, brush)
    image, _ = encode(pixels, brush)
    columns: dict[str, Value] = {"index": index, "split": split, "label": label, "font": font}
    return DrawnSample(image, f"the digit {label}", columns, None)
