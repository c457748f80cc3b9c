"""Captions of what is heard in a scene, for samples without an image: shapes and colours, no textures or places.

The words of objects are those of :mod:`~pipeline.sources.drawn.words`, so captions of images and of sounds share them.
"""

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.scenes import Look, Scene
from pipeline.sources.drawn.sound import DrawnSound
from pipeline.sources.drawn.words import CLAUSES, UNRELATED, article, dressed

OPENINGS = (
    "the sound of",
    "a recording of",
    "this is the sound of",
    "you can hear",
    "sounds of",
    "listen to",
    "audio of",
)
JOINTS = ("and", "with", "together with", "and then", "followed by", "over")
NOISES = ("in a noisy room", "with a loud hiss", "over background noise", "with wind in the microphone")
SILENCES = ("silence", "complete silence", "nothing can be heard", "a silent recording", "no sound at all")


def write_heard(scene: Scene, sound: DrawnSound, draws: Draws, wrong: float) -> tuple[str, bool]:
    """A caption of the scene's sound, and whether it is true; with probability ``wrong`` it describes another sound."""
    if draws.chance(wrong):
        return dressed(
            draws.pick(UNRELATED) if draws.chance(0.4) else _told(_others(scene, draws), draws), draws
        ), False
    if sound.silent:
        return dressed(draws.pick(SILENCES), draws), True
    main = scene.objects[scene.main].look
    others = [obj.look for number, obj in enumerate(scene.objects) if number != scene.main]
    named = draws.shuffled(others)[: draws.weighted((0.45, 0.8, 0.95, 1.0))]
    text = _told([main, *named], draws)
    if sound.noisy and draws.chance(0.6):
        text = f"{text} {draws.pick(NOISES)}"
    if draws.chance(0.15):
        text = f"{text}, {draws.pick(CLAUSES)}"
    return dressed(text, draws), True


def _told(looks: list[Look], draws: Draws) -> str:
    parts = [draws.pick(OPENINGS)] if draws.chance(0.7) else []
    for number, look in enumerate(looks):
        if number:
            parts.append(draws.pick(JOINTS))
        words = _named(look, draws)
        parts += [article(words), words]
    return " ".join(parts)


def _named(look: Look, draws: Draws) -> str:
    noun = world.noun(look.shape)
    words = noun.name if draws.chance(0.8) else draws.pick(noun.synonyms)
    if not draws.chance(0.65):
        return words
    colour = look.colour if draws.chance(0.8) else draws.pick(world.colour(look.colour).synonyms)
    return f"{colour} {words}"


def _others(scene: Scene, draws: Draws) -> list[Look]:
    """A look whose shape is not in the scene."""
    shown = {obj.look.shape for obj in scene.objects}
    shape = draws.pick([name for name in world.SHAPE_NAMES if name not in shown])
    names, odds = world.allowed_colours(shape, held_out=False)
    look = scene.objects[scene.main].look
    return [Look(shape, None, names[draws.weighted(odds)], look.texture, look.size, look.rgb)]
