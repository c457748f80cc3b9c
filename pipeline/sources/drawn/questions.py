"""Questions about a scene, each with one right answer that follows from the list of objects.

colour    what colour is the star?                 red           (asked of a shape that occurs once)
texture   what is the texture of the star?         striped       (likewise)
shape     what shape is the red thing?             star          (asked of a colour that occurs once)
count     how many stars are there?                two           (none where there is none)
side      which is further left, the star or the disc?   star    (both occur once, centres well apart)
presence  is there a red star?                     yes           (as often no: another colour, or another shape)
style     what kind of picture is this?            sketch
"""

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


def ask(scene: Scene, draws: Draws, count: int = 4) -> tuple[Question, ...]:
    """Up to ``count`` questions of different kinds, in a random order; kinds that do not apply are passed over."""
    asked: list[Question] = []
    for kind in draws.shuffled(tuple(_KINDS)):
        question = _KINDS[kind](scene, draws)
        if question is not None:
            asked.append(question)
        if len(asked) == count:
            break
    return tuple(asked)


def _colour(scene: Scene, draws: Draws) -> Question | None:
    thing = _lone(scene, draws, lambda thing: thing.look.shape)
    return Question("colour", f"what colour is the {thing.look.shape}?", thing.look.colour) if thing else None


def _texture(scene: Scene, draws: Draws) -> Question | None:
    thing = _lone(scene, draws, lambda thing: thing.look.shape)
    return Question("texture", f"what is the texture of the {thing.look.shape}?", thing.look.texture) if thing else None


def _shape(scene: Scene, draws: Draws) -> Question | None:
    thing = _lone(scene, draws, lambda thing: thing.look.colour)
    return Question("shape", f"what shape is the {thing.look.colour} thing?", thing.look.shape) if thing else None


def _count(scene: Scene, draws: Draws) -> Question | None:
    shown = [thing.look.shape for thing in scene.things]
    shape = draws.pick(shown) if draws.chance(0.8) else draws.pick(world.SHAPE_NAMES)
    number = shown.count(shape)
    if number >= len(world.NUMBER_WORDS):
        return None
    return Question("count", f"how many {world.plural(shape)} are there?", world.NUMBER_WORDS[number])


def _side(scene: Scene, draws: Draws) -> Question | None:
    numbers = Counter(thing.look.shape for thing in scene.things)
    alone = draws.shuffled([thing for thing in scene.things if numbers[thing.look.shape] == 1])
    if len(alone) < 2:
        return None
    axis, (low, high) = draws.pick(((0, ("further left", "further right")), (1, ("higher up", "lower down"))))
    one, other = alone[:2]
    apart = _centre(one, axis) - _centre(other, axis)
    if abs(apart) < 0.1 * scene.size:
        return None
    wants_low = draws.chance(0.5)
    answer = one if (apart < 0) == wants_low else other
    words = f"which is {low if wants_low else high}, the {one.look.shape} or the {other.look.shape}?"
    return Question("side", words, answer.look.shape)


def _presence(scene: Scene, draws: Draws) -> Question:
    """Yes and no alike often; a "no" keeps half of the truth, so that neither word alone gives it away.

    A "no" never asks for a held-out pair: training would learn that there is no such thing.
    """
    look = draws.pick(scene.things).look
    colour, shape = look.colour, look.shape
    if draws.chance(0.5):
        if draws.chance(0.5):
            colour = draws.pick([name for name in world.COLOUR_NAMES if not world.is_held_out(shape, name)])
        else:
            shape = draws.pick([name for name in world.SHAPE_NAMES if not world.is_held_out(name, colour)])
    there = any(thing.look.colour == colour and thing.look.shape == shape for thing in scene.things)
    return Question("presence", f"is there {article(colour)} {colour} {shape}?", "yes" if there else "no")


def _style(scene: Scene, draws: Draws) -> Question:
    return Question("style", "what kind of picture is this?", world.STYLE_CLASSES[scene.style])


def _lone(scene: Scene, draws: Draws, key: Callable[[SceneObject], str]) -> SceneObject | None:
    """A thing that shares its ``key`` with no other."""
    numbers = Counter(map(key, scene.things))
    alone = [thing for thing in scene.things if numbers[key(thing)] == 1]
    return draws.pick(alone) if alone else None


def _centre(thing: SceneObject, axis: int) -> float:
    return thing.box[axis] + thing.box[axis + 2] / 2


_KINDS: dict[str, Callable[[Scene, Draws], Question | None]] = {
    "colour": _colour,
    "texture": _texture,
    "shape": _shape,
    "count": _count,
    "side": _side,
    "presence": _presence,
    "style": _style,
}
