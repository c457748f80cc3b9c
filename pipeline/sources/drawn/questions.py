"""Questions about a scene, each with one answer that follows from the list of objects.

colour    what colour is the star?                 red           (for a shape that occurs once)
texture   what is the texture of the star?         striped       (for a shape that occurs once)
shape     what shape is the red thing?             star          (for a colour that occurs once)
count     how many stars are there?                two           ("none" for zero)
side      which is further left, the star or the disc?   star    (both occur once, centres well apart)
presence  is there a red star?                     yes           (half are "no": another colour or another shape)
style     what kind of picture is this?            sketch
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.scenes import Scene, SceneObject
from pipeline.sources.drawn.words import article


@dataclass(frozen=True, slots=True)
class Question:
    """One question; ``kind`` is the first column of the table above."""

    kind: str
    question: str
    answer: str

    def record(self) -> dict[str, str]:
        """As in ``boxes.json``."""
        return asdict(self)


def question_words() -> frozenset[str]:
    """Every word of the questions and answers in lower case that is no word of captions: for tokenizers."""
    said = "what colour is the texture of shape thing how many are there which further left right higher up lower down"
    said += " or is there kind picture this yes no"
    names = [*(world.plural(name) for name in world.SHAPE_NAMES), *world.STYLE_CLASSES.values()]
    return frozenset([*said.split(), *(word for name in names for word in re.findall(r"[^\W_]+", name))])


def ask(scene: Scene, draws: Draws, count: int = 4) -> tuple[Question, ...]:
    """Up to ``count`` questions of different kinds, in random order; kinds that do not apply are skipped."""
    asked: list[Question] = []
    for kind in draws.shuffled(tuple(_KINDS)):
        question = _KINDS[kind](scene, draws)
        if question is not None:
            asked.append(question)
        if len(asked) == count:
            break
    return tuple(asked)


def _colour(scene: Scene, draws: Draws) -> Question | None:
    obj = _lone(scene, draws, lambda obj: obj.look.shape)
    return Question("colour", f"what colour is the {obj.look.shape}?", obj.look.colour) if obj else None


def _texture(scene: Scene, draws: Draws) -> Question | None:
    obj = _lone(scene, draws, lambda obj: obj.look.shape)
    return Question("texture", f"what is the texture of the {obj.look.shape}?", obj.look.texture) if obj else None


def _shape(scene: Scene, draws: Draws) -> Question | None:
    obj = _lone(scene, draws, lambda obj: obj.look.colour)
    return Question("shape", f"what shape is the {obj.look.colour} thing?", obj.look.shape) if obj else None


def _count(scene: Scene, draws: Draws) -> Question | None:
    shown = [obj.look.shape for obj in scene.objects]
    shape = draws.pick(shown) if draws.chance(0.8) else draws.pick(world.SHAPE_NAMES)
    number = shown.count(shape)
    if number >= len(world.NUMBER_WORDS):
        return None
    return Question("count", f"how many {world.plural(shape)} are there?", world.NUMBER_WORDS[number])


def _side(scene: Scene, draws: Draws) -> Question | None:
    numbers = Counter(obj.look.shape for obj in scene.objects)
    alone = draws.shuffled([obj for obj in scene.objects if numbers[obj.look.shape] == 1])
    if len(alone) < 2:
        return None
    axis, (low, high) = draws.pick(((0, ("further left", "further right")), (1, ("higher up", "lower down"))))
    one, other = alone[:2]
    apart = _centre(one, axis) - _centre(other, axis)
    if abs(apart) < 0.1 * scene.size:
        return None
    wants_low = draws.chance(0.5)
    answer = one if (apart < 0) == wants_low else other
    question = f"which is {low if wants_low else high}, the {one.look.shape} or the {other.look.shape}?"
    return Question("side", question, answer.look.shape)


def _presence(scene: Scene, draws: Draws) -> Question:
    """Yes and no with equal probability; a "no" changes either the colour or the shape, so neither alone decides.

    A "no" never asks for a held-out pair: training would learn that such pairs do not exist.
    """
    look = draws.pick(scene.objects).look
    colour, shape = look.colour, look.shape
    if draws.chance(0.5):
        if draws.chance(0.5):
            colour = draws.pick([name for name in world.COLOUR_NAMES if not world.is_held_out(shape, name)])
        else:
            shape = draws.pick([name for name in world.SHAPE_NAMES if not world.is_held_out(name, colour)])
    there = any(obj.look.colour == colour and obj.look.shape == shape for obj in scene.objects)
    return Question("presence", f"is there {article(colour)} {colour} {shape}?", "yes" if there else "no")


def _style(scene: Scene, draws: Draws) -> Question:
    return Question("style", "what kind of picture is this?", world.STYLE_CLASSES[scene.style])


def _lone(scene: Scene, draws: Draws, key: Callable[[SceneObject], str]) -> SceneObject | None:
    """An object whose ``key`` is unique in the scene."""
    numbers = Counter(map(key, scene.objects))
    alone = [obj for obj in scene.objects if numbers[key(obj)] == 1]
    return draws.pick(alone) if alone else None


def _centre(obj: SceneObject, axis: int) -> float:
    return obj.box[axis] + obj.box[axis + 2] / 2


_KINDS: dict[str, Callable[[Scene, Draws], Question | None]] = {
    "colour": _colour,
    "texture": _texture,
    "shape": _shape,
    "count": _count,
    "side": _side,
    "presence": _presence,
    "style": _style,
}
