"""The vocabulary of the embedded world: classes and attributes, their synonyms, frequencies and splits.

This module holds data and lookups only. Changing a value changes the samples: raise :data:`WORLD_VERSION` in the same
commit.
"""

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

WORLD_VERSION = 2

OCCLUSION_CAP = 0.4
"""Largest fraction of an object's pixels that other objects may hide."""

WRONG_CAPTIONS = 0.05
"""The share of training captions that describe another image, or no image at all."""


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A class: its name, synonyms, hypernym, and fine-grained variants if it has any.

    ``upright`` objects are within 20 degrees of upright in most scenes.
    """

    name: str
    synonyms: tuple[str, ...]
    hypernym: str
    variants: tuple[str, ...] = ()
    upright: bool = False


@dataclass(frozen=True, kw_only=True)
class Colour:
    """A region of HSV space: ``hue`` in degrees (a range below 0 wraps around), saturation and value in 0..1."""

    name: str
    synonyms: tuple[str, ...]
    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Word:
    """A texture, size, style or ground: its name in columns and its wordings in captions."""

    name: str
    words: tuple[str, ...]


STAR_POINTS = {
    "four-pointed star": 4,
    "five-pointed star": 5,
    "six-pointed star": 6,
    "seven-pointed star": 7,
    "eight-pointed star": 8,
}
POLYGON_SIDES = {"pentagon": 5, "hexagon": 6, "heptagon": 7, "octagon": 8}
FINE_GRAINED = (*STAR_POINTS, *POLYGON_SIDES)

# By frequency, the most frequent first.
SHAPES: tuple[Noun, ...] = (
    Noun(name="disc", synonyms=("circle", "round spot"), hypernym="round shape"),
    Noun(name="square", synonyms=("block", "box"), hypernym="straight-sided shape"),
    Noun(name="star", synonyms=("starburst",), hypernym="symbol", variants=tuple(STAR_POINTS)),
    Noun(name="triangle", synonyms=("three-sided shape", "wedge"), hypernym="straight-sided shape"),
    Noun(
        name="polygon",
        synonyms=("many-sided polygon", "regular polygon"),
        hypernym="straight-sided shape",
        variants=tuple(POLYGON_SIDES),
    ),
    Noun(name="heart", synonyms=("love heart", "valentine"), hypernym="symbol", upright=True),
    Noun(name="ring", synonyms=("hoop", "annulus"), hypernym="round shape"),
    Noun(name="arrow", synonyms=("pointer", "direction sign"), hypernym="symbol"),
    Noun(name="cross", synonyms=("plus sign", "plus"), hypernym="symbol", upright=True),
    Noun(name="flower", synonyms=("blossom", "bloom"), hypernym="growing thing", upright=True),
    Noun(name="cloud", synonyms=("puff", "cumulus"), hypernym="natural thing", upright=True),
    Noun(name="house", synonyms=("home", "cottage"), hypernym="made thing", upright=True),
    Noun(name="fish", synonyms=("swimming creature", "goldfish"), hypernym="natural thing", upright=True),
    Noun(name="leaf", synonyms=("frond", "foliage blade"), hypernym="growing thing"),
    Noun(name="drop", synonyms=("teardrop", "droplet"), hypernym="natural thing", upright=True),
    Noun(name="crescent", synonyms=("moon", "sickle"), hypernym="round shape"),
    Noun(name="semicircle", synonyms=("half circle", "half disc"), hypernym="round shape"),
    Noun(name="bar", synonyms=("stick", "strip"), hypernym="straight-sided shape"),
    Noun(name="gear", synonyms=("cog", "cogwheel"), hypernym="made thing"),
    Noun(name="bolt", synonyms=("lightning bolt", "flash"), hypernym="symbol", upright=True),
    Noun(name="mushroom", synonyms=("toadstool", "fungus"), hypernym="growing thing", upright=True),
    Noun(name="hourglass", synonyms=("sand timer", "egg timer"), hypernym="made thing", upright=True),
    Noun(name="key", synonyms=("door key", "latchkey"), hypernym="made thing"),
    Noun(name="spiral", synonyms=("coil", "swirl"), hypernym="symbol"),
)

# The regions almost touch: a colour cast or low contrast makes neighbours hard to distinguish, as in photographs.
COLOURS: tuple[Colour, ...] = (
    Colour(name="red", synonyms=("scarlet", "crimson"), hue=(-12, 11), saturation=(0.62, 1), value=(0.66, 0.98)),
    Colour(name="blue", synonyms=("azure", "cobalt"), hue=(195, 250), saturation=(0.45, 1), value=(0.4, 0.95)),
    Colour(name="green", synonyms=("emerald", "leafy green"), hue=(76, 170), saturation=(0.4, 0.95), value=(0.3, 0.85)),
    Colour(name="yellow", synonyms=("golden", "lemon"), hue=(46, 66), saturation=(0.5, 1), value=(0.78, 1)),
    Colour(name="black", synonyms=("jet black", "inky"), hue=(0, 360), saturation=(0, 0.45), value=(0.02, 0.2)),
    Colour(name="white", synonyms=("ivory", "snowy"), hue=(0, 360), saturation=(0, 0.09), value=(0.87, 1)),
    Colour(name="orange", synonyms=("amber", "tangerine"), hue=(18, 39), saturation=(0.65, 1), value=(0.78, 1)),
    Colour(name="purple", synonyms=("violet", "plum"), hue=(258, 298), saturation=(0.4, 0.9), value=(0.34, 0.85)),
    Colour(name="pink", synonyms=("rose", "salmon"), hue=(308, 342), saturation=(0.22, 0.62), value=(0.86, 1)),
    Colour(name="brown", synonyms=("chestnut", "chocolate"), hue=(12, 38), saturation=(0.4, 0.8), value=(0.26, 0.6)),
)

TEXTURES: tuple[Word, ...] = (
    Word(name="plain", words=("plain", "solid")),
    Word(name="striped", words=("striped", "stripy")),
    Word(name="dotted", words=("dotted", "spotted")),
    Word(name="checkered", words=("checkered", "checked")),
    Word(name="shaded", words=("shaded", "fading")),
    Word(name="speckled", words=("speckled", "grainy")),
)

SIZES: tuple[Word, ...] = (
    Word(name="small", words=("small", "little", "tiny")),
    Word(name="medium", words=("medium-sized", "middling")),
    Word(name="large", words=("large", "big", "huge")),
)
RADII = {"small": (0.09, 0.125), "medium": (0.18, 0.25), "large": (0.32, 0.4)}
"""Radius as a fraction of the image's side."""

STYLES: tuple[Word, ...] = (
    Word(name="flat", words=("a flat drawing of", "clip art of", "an icon of", "an illustration of")),
    Word(name="photo", words=("a photo of", "a photograph of", "a snapshot of")),
    Word(name="low contrast", words=("a faded picture of", "a washed out print of", "a pale image of")),
    Word(name="inverted", words=("a negative of", "an inverted picture of", "a chalkboard picture of")),
    Word(name="sketch", words=("a sketch of", "a line drawing of", "a pencil drawing of")),
)
STYLE_CLASSES = {
    "flat": "flat drawing",
    "photo": "photo",
    "low contrast": "faded picture",
    "inverted": "negative",
    "sketch": "sketch",
}

GROUNDS: tuple[Word, ...] = (
    Word(name="clear", words=("on an empty background", "against an empty backdrop")),
    Word(name="haze", words=("in front of a hazy backdrop", "in the mist")),
    Word(name="paper", words=("on rough paper", "on a sheet of paper")),
    Word(name="grid", words=("on graph paper", "on a grid")),
    Word(name="lined", words=("on lined paper", "in a notebook")),
    Word(name="horizon", words=("in front of the horizon", "out in the open")),
    Word(name="brick", words=("on a brick wall", "in front of bricks")),
    Word(name="wood", words=("on a wooden table", "on wooden boards")),
)

SHAPE_NAMES = tuple(noun.name for noun in SHAPES)
COLOUR_NAMES = tuple(colour.name for colour in COLOURS)
TEXTURE_NAMES = tuple(word.name for word in TEXTURES)
SIZE_NAMES = tuple(word.name for word in SIZES)
STYLE_NAMES = tuple(word.name for word in STYLES)
GROUND_NAMES = tuple(word.name for word in GROUNDS)
NUMBER_WORDS = ("none", "one", "two", "three", "four", "five", "six")

NOVEL_SHAPES = ("polygon", "arrow", "house", "crescent", "bolt", "key")
"""Named in captions only; boxes, masks and few-shot labels exist for the other 18. Spread over the frequencies."""

UNSEEN_STYLE = "sketch"
"""The style of no training image."""

RARE_SHAPES = SHAPE_NAMES[-3:]
"""The rarest tenth of the shapes (rounded up)."""

_NOUNS = {noun.name: noun for noun in SHAPES}
_COLOURS = {colour.name: colour for colour in COLOURS}
_SHAPE_RANKS = {name: rank for rank, name in enumerate(SHAPE_NAMES)}
_COLOUR_RANKS = {name: rank for rank, name in enumerate(COLOUR_NAMES)}


def long_tail(count: int, exponent: float) -> tuple[float, ...]:
    """Zipf's law: ``count`` probabilities that sum to 1, falling as rank ** -exponent."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    return tuple(weight / sum(weights) for weight in weights)


SHAPE_FREQUENCIES = dict(zip(SHAPE_NAMES, long_tail(24, 0.6), strict=True))
COLOUR_FREQUENCIES = dict(zip(COLOUR_NAMES, long_tail(10, 0.5), strict=True))
TEXTURE_FREQUENCIES = dict(zip(TEXTURE_NAMES, (0.5, 0.14, 0.11, 0.09, 0.09, 0.07), strict=True))
STYLE_FREQUENCIES = dict(zip(STYLE_NAMES, (0.36, 0.36, 0.12, 0.16, 0.0), strict=True))
VARIANT_FREQUENCIES = {4: (0.3, 0.3, 0.2, 0.2), 5: (0.22, 0.3, 0.2, 0.12, 0.16)}


def noun(shape: str) -> Noun:
    """The shape called ``shape``."""
    return _NOUNS[shape]


def colour(name: str) -> Colour:
    """The colour called ``name``."""
    return _COLOURS[name]


def is_held_out(shape: str, colour_name: str) -> bool:
    """Whether this pair never occurs on one object before testing.

    A fifth of the 24 x 10 pairs: every shape misses two colours and every colour four or five shapes, so the number of
    held-out pairs does not distinguish one word from another.
    """
    return (_SHAPE_RANKS[shape] + 2 * _COLOUR_RANKS[colour_name]) % 5 == 0


def held_out_pairs() -> tuple[tuple[str, str], ...]:
    """All (shape, colour) pairs that are kept for testing: 48 of 240."""
    return tuple(pair for pair in _pairs() if is_held_out(*pair))


def seen_pairs() -> tuple[tuple[str, str], ...]:
    """All (shape, colour) pairs that training may show."""
    return tuple(pair for pair in _pairs() if not is_held_out(*pair))


def base_shapes() -> tuple[str, ...]:
    """The 18 shapes that have boxes, masks and few-shot labels for training."""
    return tuple(shape for shape in SHAPE_NAMES if shape not in NOVEL_SHAPES)


def novel_shapes() -> tuple[str, ...]:
    """The 6 shapes that only captions name."""
    return NOVEL_SHAPES


def seen_styles() -> tuple[str, ...]:
    """The styles of the training images."""
    return tuple(style for style in STYLE_NAMES if style != UNSEEN_STYLE)


@cache
def allowed_colours(shape: str, held_out: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The colours of ``shape`` in training (with ``held_out``: in the held-out pairs) and cumulative probabilities."""
    names = tuple(name for name in COLOUR_NAMES if is_held_out(shape, name) == held_out)
    return names, cumulate(COLOUR_FREQUENCIES[name] for name in names)


def cumulate(weights: Iterable[float]) -> tuple[float, ...]:
    """Cumulative sums, scaled to end at 1, for :meth:`Draws.weighted`."""
    sums = list(accumulate(weights))
    return tuple(value / sums[-1] for value in sums)


def name_colour(red: int, green: int, blue: int) -> str | None:
    """The colour whose region contains the RGB value (0..255 each), or None between the regions."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    for candidate in COLOURS:
        low, high = candidate.hue
        turned = hue * 360 - 360 if low < 0 and hue > 0.5 else hue * 360
        inside = (
            low - 1.5 <= turned <= high + 1.5
            and candidate.saturation[0] - 0.02 <= saturation <= candidate.saturation[1] + 0.02
            and candidate.value[0] - 0.01 <= value <= candidate.value[1] + 0.01
        )
        # Hue and saturation of near-black are quantisation noise in 8 bits, so black is defined by value alone.
        if inside or (candidate.name == "black" and value <= candidate.value[1] + 0.01):
            return candidate.name
    return None


def plural(name: str) -> str:
    """The plural of a noun of this world ("leaf" -> "leaves", "plus sign" -> "plus signs", "fish" -> "fish")."""
    if name.endswith(("fish", "lightning")):
        return name
    if name == "leaf":
        return "leaves"
    if name == "plus":
        return "pluses"
    if name == "fungus":
        return "fungi"
    if name == "annulus":
        return "annuli"
    return name + ("es" if name.endswith(("s", "x", "sh", "ch")) else "s")


def _pairs() -> tuple[tuple[str, str], ...]:
    return tuple((shape, name) for shape in SHAPE_NAMES for name in COLOUR_NAMES)
