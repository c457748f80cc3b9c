"""Scene sampling: object attributes, placement and exact masks, before anything is rendered."""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.outlines import Outline, Pixels, coverage, outline_of

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]
Arrangement = Literal["beside", "stacked", "nested", "overlapping"]

ARRANGEMENTS: tuple[Arrangement, ...] = ("beside", "stacked", "nested", "overlapping")
NESTS = ("disc", "square", "polygon", "heart", "ring", "cloud", "house", "semicircle", "triangle")
"""Shapes that a small object fits inside."""

_TRIES = 6
_OFF_CENTRE = 0.05
_FEWEST_PIXELS = 8
_SHAPE_ODDS = world.cumulate(world.SHAPE_FREQUENCIES.values())
_TEXTURE_ODDS = world.cumulate(world.TEXTURE_FREQUENCIES.values())
_SEEN_STYLE_ODDS = world.cumulate(world.STYLE_FREQUENCIES[style] for style in world.seen_styles())
_VARIANT_ODDS = {count: world.cumulate(odds) for count, odds in world.VARIANT_FREQUENCIES.items()}
# Odds of (small, medium, large) for the main object by how many objects there are, and for the others.
_MAIN_SIZES = {1: (0.03, 0.15, 1.0), 2: (0.05, 0.3, 1.0), 3: (0.08, 0.45, 1.0), 4: (0.2, 0.8, 1.0)}
_OTHER_SIZES = (0.5, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Look:
    """An object's class and attributes, names of :mod:`~pipeline.sources.drawn.world`; ``rgb`` is 0..255 each."""

    shape: str
    variant: str | None
    colour: str
    texture: str
    size: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Pose:
    """``radius`` in pixels, ``angle`` in radians, and the rest of the unit frame's affine map."""

    radius: float
    angle: float
    shear: float
    stretch: float
    mirrored: bool

    def matrix(self) -> NDArray[np.float64]:
        """2 x 2 matrix: mirror, stretch and shear the unit outline, rotate it, scale it to pixels."""
        turn = np.array([[math.cos(self.angle), -math.sin(self.angle)], [math.sin(self.angle), math.cos(self.angle)]])
        across = -self.stretch if self.mirrored else self.stretch
        shape: NDArray[np.float64] = turn @ np.array([[across, self.shear], [0.0, 1.0 / self.stretch]])
        return shape * self.radius


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene.

    ``coverage`` is its antialiased mask before occlusion (uint8 [size, size]), ``whole`` its pixels (coverage of at
    least one half) and ``visible`` the pixels that no nearer object hides. ``box`` is (x, y, width, height) around
    ``visible``, in pixels, as in COCO; ``occlusion`` is the hidden fraction of ``whole``. ``depth`` counts from the
    back.
    """

    look: Look
    pose: Pose
    outline: Outline
    coverage: Pixels
    whole: Mask
    visible: Mask
    box: Box = (0, 0, 0, 0)
    area: int = 0
    occlusion: float = 0.0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """``objects`` from the farthest to the nearest; ``main`` is the index of the main object."""

    size: int
    style: str
    ground: str
    objects: tuple[SceneObject, ...]
    main: int


@dataclass(frozen=True, kw_only=True)
class SceneRecipe:
    """The distribution of the scenes of a split.

    With ``varies`` sample i shows class i mod n of ``classes``, so every class has the same number of samples.
    ``counts`` are cumulative probabilities of 1, 2, ... objects. ``alike`` is the probability that all objects have the
    main object's shape; ``arranged`` is the probability that the first two are in one of the arrangements.
    """

    label: Literal["shape", "variant", "colour", "texture", "style", "pair", "count", "relation"] = "shape"
    varies: bool = False
    classes: tuple[str, ...] = ()
    counts: tuple[float, ...] = (0.48, 0.7, 0.82, 0.9, 0.96, 1.0)
    styles: tuple[str, ...] = ()
    alike: float = 0.28
    arranged: float = 0.5
    main_sizes: tuple[float, float, float] | None = None
    cap: float = world.OCCLUSION_CAP


@dataclass(frozen=True, slots=True)
class Wish:
    """What a sample's class requires of its scene or object; None = sampled."""

    shape: str | None = None
    variant: str | None = None
    colour: str | None = None
    texture: str | None = None
    style: str | None = None
    count: int | None = None
    arrangement: Arrangement | None = None


def sample_scene(
    recipe: SceneRecipe,
    draws: Draws,
    wanted: str | None,
    size: int,
    accept: Callable[[Scene], bool] | None = None,
) -> Scene:
    """A scene of ``recipe`` that shows the class ``wanted`` (None = any), ``size`` pixels wide and high.

    Scenes that ``accept`` rejects are sampled again from the same stream.
    """
    wish = _wish(recipe, wanted)
    while True:
        scene = _attempt(recipe, draws, wish, size)
        if scene is not None and wish.count in (None, len(scene.objects)) and (accept is None or accept(scene)):
            return scene


def sample_look(draws: Draws, wish: Wish, size: str) -> Look:
    """Attributes from the wish; the others are sampled by the world's frequencies.

    The pair of shape and colour is never a held-out one unless the wish names both."""
    shape = wish.shape or world.SHAPE_NAMES[draws.weighted(_SHAPE_ODDS)]
    while wish.shape is None and wish.colour is not None and world.is_held_out(shape, wish.colour):
        shape = world.SHAPE_NAMES[draws.weighted(_SHAPE_ODDS)]
    colour = wish.colour or _sample_colour(draws, shape)
    texture = wish.texture or world.TEXTURE_NAMES[draws.weighted(_TEXTURE_ODDS)]
    variant = wish.variant
    names = world.noun(shape).variants
    if names and variant is None:
        variant = names[draws.weighted(_VARIANT_ODDS[len(names)])]
    return Look(shape, variant, colour, texture, size, sample_rgb(draws, colour))


def sample_rgb(draws: Draws, name: str) -> tuple[int, int, int]:
    """A random value of the colour ``name``: three integers in 0..255."""
    region = world.colour(name)
    hue = draws.uniform(*region.hue) % 360 / 360
    red, green, blue = colorsys.hsv_to_rgb(hue, draws.uniform(*region.saturation), draws.uniform(*region.value))
    return round(red * 255), round(green * 255), round(blue * 255)


def sample_pose(draws: Draws, shape: str, radius: float) -> Pose:
    """A random pose; upright shapes are mostly within some 20 degrees of upright, others rotate more freely."""
    steady, spread = (0.9, 0.1) if world.noun(shape).upright else (0.85, 0.12)
    angle = draws.normal() * spread if draws.chance(steady) else draws.uniform(0.0, 2 * math.pi)
    return Pose(radius, angle, draws.uniform(-0.15, 0.15), draws.uniform(0.92, 1.09), draws.chance(0.5))


def make_object(look: Look, pose: Pose, centre: tuple[float, float], size: int) -> SceneObject:
    """The object at ``centre`` (x, y in pixels), not occluded yet."""
    outline = outline_of(look.shape, look.variant).placed(pose.matrix(), centre)
    covered = coverage(outline, size)
    whole: Mask = covered >= 128
    return SceneObject(look, pose, outline, covered, whole, whole)


def finished(stack: list[SceneObject]) -> tuple[SceneObject, ...]:
    """The stack (back to front) with boxes, areas, occlusion and depth filled in."""
    return tuple(_measured(obj, depth) for depth, obj in enumerate(stack))


def _wish(recipe: SceneRecipe, wanted: str | None) -> Wish:
    if wanted is None:
        return Wish()
    if recipe.label == "pair":
        colour, shape = wanted.split(" ", 1)
        return Wish(colour=colour, shape=shape)
    if recipe.label == "variant":
        return Wish(shape="star" if wanted in world.STAR_POINTS else "polygon", variant=wanted)
    if recipe.label == "count":
        return Wish(count=world.NUMBER_WORDS.index(wanted.split(" ")[0]))
    if recipe.label == "style":
        return Wish(style=next(style for style, name in world.STYLE_CLASSES.items() if name == wanted))
    if recipe.label == "relation":
        return Wish(arrangement=_ARRANGEMENT_OF[wanted], count=2)
    if recipe.label == "colour":
        return Wish(colour=wanted)
    return Wish(texture=wanted) if recipe.label == "texture" else Wish(shape=wanted)


_ARRANGEMENT_OF: dict[str, Arrangement] = {
    "left of": "beside",
    "right of": "beside",
    "above": "stacked",
    "below": "stacked",
    "inside": "nested",
    "behind": "overlapping",
}


def _attempt(recipe: SceneRecipe, draws: Draws, wish: Wish, size: int) -> Scene | None:
    count = wish.count or draws.weighted(recipe.counts) + 1
    styles = recipe.styles or world.seen_styles()
    odds = _SEEN_STYLE_ODDS if not recipe.styles else world.cumulate([1.0] * len(styles))
    style = wish.style or styles[draws.weighted(odds)]
    ground = draws.pick(world.GROUND_NAMES)
    arrangement = wish.arrangement
    if arrangement is None and count > 1 and draws.chance(recipe.arranged):
        arrangement = draws.pick(ARRANGEMENTS)
    looks = _sample_looks(recipe, draws, wish, count, arrangement)
    stack, main = _place(recipe, draws, looks, arrangement, size)
    return Scene(size, style, ground, finished(stack), main) if main is not None else None


def _sample_looks(
    recipe: SceneRecipe, draws: Draws, wish: Wish, count: int, arrangement: Arrangement | None
) -> list[Look]:
    """The main object first; the others are no larger, and sometimes have its shape."""
    main_size = draws.weighted(recipe.main_sizes or _MAIN_SIZES[min(count, 4)])
    if arrangement == "nested":
        main_size = 2
        if wish.shape is None and wish.colour is None:
            wish = replace(wish, shape=draws.pick(NESTS))
    main = sample_look(draws, wish, world.SIZE_NAMES[main_size])
    alike = count > 1 and draws.chance(recipe.alike)
    looks = [main]
    for position in range(1, count):
        size = min(draws.weighted(_OTHER_SIZES), main_size)
        if arrangement == "nested" and position == 1:
            size = 0
        wanted = Wish()
        if alike:
            same_colour = draws.chance(0.5) and not world.is_held_out(main.shape, main.colour)
            wanted = Wish(shape=main.shape, variant=main.variant, colour=main.colour if same_colour else None)
        elif wish.arrangement is not None:
            wanted = _unlike(draws, main)
        looks.append(sample_look(draws, wanted, world.SIZE_NAMES[size]))
    return looks


def _unlike(draws: Draws, main: Look) -> Wish:
    """Another shape in another colour; swapping the two colours gives no held-out pair either."""
    while True:
        look = sample_look(draws, Wish(), "small")
        swapped = world.is_held_out(look.shape, main.colour) or world.is_held_out(main.shape, look.colour)
        if look.shape != main.shape and look.colour != main.colour and not swapped:
            return Wish(shape=look.shape, variant=look.variant, colour=look.colour)


def _place(
    recipe: SceneRecipe, draws: Draws, looks: list[Look], arrangement: Arrangement | None, size: int
) -> tuple[list[SceneObject], int | None]:
    """Place the objects one by one, in front of or behind the others; an object that fits nowhere is left out.

    Returns the stack, back to front, and the index of the first look in it (None: it was left out).
    """
    stack: list[SceneObject] = []
    main: int | None = None
    first: tuple[float, float] | None = None
    for position, look in enumerate(looks):
        pose = _fitting_pose(draws, look, size)
        reach = np.abs(outline_of(look.shape, look.variant).points @ pose.matrix().T).max(axis=0) + 1.0
        arranged = arrangement if position < 2 else None
        on_top = arranged in ("nested", "overlapping") or draws.chance(0.7)
        for _ in range(_TRIES):
            centre = _spot(draws, arranged, first, (float(reach[0]), float(reach[1])), pose.radius, stack, size)
            grown = inserted(stack, make_object(look, pose, centre, size), on_top, recipe.cap)
            if grown is not None:
                stack = grown
                if position == 0:
                    main = 0
                elif main is not None and not on_top:
                    main += 1
                first = first or centre
                break
    return stack, main


def _fitting_pose(draws: Draws, look: Look, size: int) -> Pose:
    """A pose of the look's size whose outline fits the image with a margin of one pixel."""
    pose = sample_pose(draws, look.shape, draws.uniform(*world.RADII[look.size]) * size)
    reach = float(np.abs(outline_of(look.shape, look.variant).points @ pose.matrix().T).max()) + 2.0
    return pose if reach <= size / 2 else replace(pose, radius=pose.radius * (size / 2 - 2.0) / reach)


def _spot(
    draws: Draws,
    arrangement: Arrangement | None,
    first: tuple[float, float] | None,
    reach: tuple[float, float],
    radius: float,
    stack: list[SceneObject],
    size: int,
) -> tuple[float, float]:
    """A candidate centre for an object; ``first`` is the centre of the object that it is arranged with."""
    if first is None:
        # The main object of a photograph is mostly near the middle.
        spot = [size * (0.5 + _OFF_CENTRE * draws.normal()) for _ in range(2)]
    else:
        spot = [_between(draws, reach[axis], size - reach[axis]) for axis in (0, 1)]
    if arrangement in ("beside", "stacked"):
        along = 0 if arrangement == "beside" else 1
        low_side = draws.chance(0.5) if first is None else first[along] >= size / 2
        inner = size / 2 - reach[along] * 0.9
        near, far = (reach[along], inner) if low_side else (size - inner, size - reach[along])
        spot[along] = _between(draws, near, far)
        if first is not None:
            spot[1 - along] = first[1 - along] + draws.uniform(-0.1, 0.1) * size
    elif arrangement == "nested" and first is not None:
        spot = [first[axis] + draws.uniform(-0.12, 0.12) * stack[0].pose.radius for axis in (0, 1)]
    elif arrangement == "overlapping" and first is not None:
        away = draws.uniform(0.55, 0.9) * (stack[0].pose.radius + radius)
        angle = draws.uniform(0.0, 2 * math.pi)
        spot = [first[0] + away * math.cos(angle), first[1] + away * math.sin(angle)]
    x, y = (min(max(spot[axis], reach[axis]), size - reach[axis]) for axis in (0, 1))
    return x, y


def _between(draws: Draws, low: float, high: float) -> float:
    return draws.uniform(low, high) if low < high else (low + high) / 2


def inserted(stack: list[SceneObject], obj: SceneObject, on_top: bool, cap: float) -> list[SceneObject] | None:
    """The stack with the object added in front or behind, or None where an object would be hidden beyond ``cap``."""
    if on_top or not stack:
        below = [replace(other, visible=other.visible & ~obj.whole) for other in stack]
        grown = [*below, obj]
    else:
        hiding = np.logical_or.reduce([other.whole for other in stack])
        grown = [replace(obj, visible=obj.whole & ~hiding), *stack]
    seen = np.count_nonzero(obj.whole) >= _FEWEST_PIXELS
    return grown if seen and all(_hidden(other) <= cap for other in grown) else None


def _hidden(obj: SceneObject) -> float:
    if obj.visible is obj.whole:
        return 0.0
    return 1.0 - int(np.count_nonzero(obj.visible)) / max(1, int(np.count_nonzero(obj.whole)))


def _measured(obj: SceneObject, depth: int) -> SceneObject:
    rows = np.flatnonzero(obj.visible.any(axis=1))
    columns = np.flatnonzero(obj.visible.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
    area = int(np.count_nonzero(obj.visible))
    return replace(obj, box=box, area=area, occlusion=_hidden(obj), depth=depth)


def _sample_colour(draws: Draws, shape: str) -> str:
    names, odds = world.allowed_colours(shape, held_out=False)
    return names[draws.weighted(odds)]
