"""Captions of moving scenes: which object moves how, event by event, in the words of the images' captions.

Some captions leave the motion out, as people do; 5 % of those in ``train`` and ``val`` name another motion or object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.motion import MOTIONS, OPPOSITES, PAIRED, Event, MovingScene
from pipeline.sources.drawn.scenes import Look
from pipeline.sources.drawn.words import CLAUSES, UNRELATED, article, describe, dressed

# Each motion as said after an opening, "a video of a star ...", and in a sentence, "a star ...".
WORDS = {
    "moving to the right": (
        ("moving to the right", "moving from left to right", "sliding right"),
        ("moves to the right", "moves from left to right", "goes right"),
    ),
    "moving to the left": (
        ("moving to the left", "moving from right to left", "sliding left"),
        ("moves to the left", "moves from right to left", "goes left"),
    ),
    "moving up": (("moving up", "moving upwards", "rising"), ("moves up", "moves upwards", "rises")),
    "moving down": (("moving down", "moving downwards", "falling"), ("moves down", "moves downwards", "falls")),
    "turning clockwise": (("turning clockwise", "rotating clockwise"), ("turns clockwise", "rotates clockwise")),
    "turning anticlockwise": (
        ("turning anticlockwise", "rotating anticlockwise"),
        ("turns anticlockwise", "rotates anticlockwise"),
    ),
    "growing": (("growing", "getting bigger"), ("grows", "gets bigger")),
    "shrinking": (("shrinking", "getting smaller"), ("shrinks", "gets smaller")),
    "colliding": (("colliding", "bumping into each other"), ("collide", "bump into each other")),
    "parting": (("parting", "moving apart"), ("part", "move apart")),
    "blinking": (("blinking", "flashing"), ("blinks", "flashes")),
    "standing still": (("standing still", "not moving"), ("stands still", "does not move")),
}
OPENINGS = ("a video of", "a clip of", "this video shows", "footage of", "watch")
JOINTS = (", then", " and then", ". Then")
SINGLE = tuple(motion for motion in MOTIONS if motion not in PAIRED)
_UNTOLD = 0.12  # part of the captions without a motion


@dataclass(frozen=True, slots=True)
class Story:
    """A caption of a clip, whether it is true, and a caption of each event: the name of its motion, or a sentence."""

    text: str
    truthful: bool
    events: tuple[str, ...]


def tell(moving: MovingScene, draws: Draws, wrong: float, plain: bool) -> Story:
    """The story of a scene; with probability ``wrong`` the caption is false. ``plain``: events are named by motion."""
    motions = [event.motion for event in moving.events]
    looks = [_looks(moving, event) for event in moving.events]
    if plain:
        events = tuple(motions)
    else:
        events = tuple(_sentence(some, motion, draws) for some, motion in zip(looks, motions, strict=True))
    if not draws.chance(wrong):
        return Story(dressed(_told(moving, looks[0], motions, draws), draws), True, events)
    if draws.chance(0.4):
        text = draws.pick(UNRELATED)
    elif draws.chance(0.5):
        text = _told(moving, [_elsewhere(moving, draws)], [draws.pick(SINGLE)], draws)
    else:
        text = _told(moving, looks[0], _other(motions, draws), draws, always=True)
    return Story(dressed(text, draws), False, events)


def _looks(moving: MovingScene, event: Event) -> list[Look]:
    return [moving.actors[number].look for number in event.actors]


def _told(
    moving: MovingScene, looks: Sequence[Look], motions: Sequence[str], draws: Draws, always: bool = False
) -> str:
    """The caption in lower case; with ``always`` it names the motions."""
    opened = draws.chance(0.55)
    text = f"{draws.pick(OPENINGS)} {_who(looks, draws)}" if opened else _who(looks, draws)
    if always or not draws.chance(_UNTOLD):
        text = f"{text} {draws.pick(WORDS[motions[0]][0 if opened else 1])}"
        for before, motion in zip(motions, motions[1:], strict=False):
            text += _next(before, motion, looks, draws)
    if draws.chance(0.35):
        text += " " + draws.pick(next(ground.words for ground in world.GROUNDS if ground.name == moving.ground))
    return f"{text}, {draws.pick(CLAUSES)}" if draws.chance(0.12) else text


def _next(before: str, motion: str, looks: Sequence[Look], draws: Draws) -> str:
    """ ", then it grows": another event after one of the same objects, or of the main one of two."""
    if motion in PAIRED:
        who = "they"
    else:
        who = _who(looks[:1], draws) if before in PAIRED else "it"
    return f"{draws.pick(JOINTS)} {who} {draws.pick(WORDS[motion][1])}"


def _sentence(looks: Sequence[Look], motion: str, draws: Draws) -> str:
    return f"{_who(looks, draws)} {draws.pick(WORDS[motion][1])}"


def _who(looks: Sequence[Look], draws: Draws) -> str:
    """ "a red disc and a star" """
    said = []
    for look in looks:
        words = describe(look, draws, named=True).words()
        said.append(f"{article(words)} {words}")
    return " and ".join(said)


def _other(motions: Sequence[str], draws: Draws) -> list[str]:
    """False motions of as many objects: the opposite of each where there is one."""
    return [OPPOSITES.get(motion) or draws.pick([one for one in SINGLE if one != motion]) for motion in motions]


def _elsewhere(moving: MovingScene, draws: Draws) -> Look:
    """A look whose shape and colour are not in the scene."""
    shown = {actor.look.shape for actor in moving.actors}
    colours = {actor.look.colour for actor in moving.actors}
    main = moving.actors[moving.main].look
    pairs = [(shape, colour) for shape, colour in world.seen_pairs() if shape not in shown and colour not in colours]
    shape, colour = draws.pick(pairs)
    variants = world.noun(shape).variants
    return Look(shape, draws.pick(variants) if variants else None, colour, main.texture, main.size, main.rgb)
