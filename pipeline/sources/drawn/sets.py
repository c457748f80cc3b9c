"""The splits: pre-training, the tests that separate methods, and small counterparts of the papers' test sets.

    train, val           long-tailed, captioned, 5 % wrong; no held-out pair, no sketch
    held_out_pairs       label "red star": all pairs that training never shows; seen_pairs: the others. Classify
                         among all 240 pairs in both, so that the two numbers are comparable
    shapes               label = shape, balanced classes; unseen_style: the same as sketches
    base, novel, rare    like shapes, of the 18 base shapes, the 6 novel ones, the rarest tenth
    colours, textures, styles    label = that attribute
    counting             "one thing" ... "six things", all of one shape, none hidden
    relations            a true caption, a false one with words swapped (column ``negative``), label = relation
    fine_grained         stars by points, polygons by sides
    aerial               dozens of tiny objects, label = the most frequent shape
    digits, digits_real  "0" ... "9" from OpenCV's stroke fonts, and scikit-learn's 8 x 8 scans

``<name>_train`` is a labelled pool for few-shot protocols: the same recipe with its own random stream, except that
``digits_real_train`` is the first 1000 of the 1797 scans. Take the first k samples of each class as shots; for another
draw, change the ``seed`` of the source.
"""

from collections.abc import Callable
from dataclasses import replace

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.relations import RELATIONS, relation_between
from pipeline.sources.drawn.scenes import (
    Look,
    Scene,
    SceneObject,
    SceneRecipe,
    Wish,
    finished,
    make_object,
    sample_look,
    sample_pose,
    sample_scene,
)

COUNT_CLASSES = ("one thing", *(f"{number} things" for number in world.NUMBER_WORDS[2:]))
PAIR_CLASSES = tuple(f"{colour} {shape}" for shape in world.SHAPE_NAMES for colour in world.COLOUR_NAMES)
RELATION_CLASSES = RELATIONS[:6]
AERIAL_CLASSES = ("disc", "square", "star", "triangle", "ring", "heart", "arrow", "gear", "bar", "crescent")
DIGIT_CLASSES = tuple("0123456789")

CAPTIONED = ("train", "val")
"""The splits with some false captions."""

_ONE = SceneRecipe(varies=True, counts=(0.75, 0.95, 1.0), main_sizes=(0.0, 0.2, 1.0), alike=0.0, arranged=0.0)
_SHAPES = replace(_ONE, classes=world.SHAPE_NAMES)
_PAIR = replace(_ONE, label="pair")

RECIPES: dict[str, SceneRecipe] = {
    "train": SceneRecipe(),
    "val": SceneRecipe(),
    "held_out_pairs": replace(_PAIR, classes=tuple(f"{c} {s}" for s, c in world.held_out_pairs())),
    "seen_pairs": replace(_PAIR, classes=tuple(f"{c} {s}" for s, c in world.seen_pairs())),
    "shapes": _SHAPES,
    "unseen_style": replace(_SHAPES, styles=(world.UNSEEN_STYLE,)),
    "base": replace(_SHAPES, classes=world.base_shapes()),
    "novel": replace(_SHAPES, classes=world.novel_shapes()),
    "rare": replace(_SHAPES, classes=world.RARE_SHAPES),
    "colours": replace(_ONE, label="colour", classes=world.COLOUR_NAMES, counts=(1.0,)),
    "textures": replace(_ONE, label="texture", classes=world.TEXTURE_NAMES, counts=(1.0,)),
    "styles": replace(_ONE, label="style", classes=tuple(world.STYLE_CLASSES[style] for style in world.seen_styles())),
    "counting": replace(_ONE, label="count", classes=COUNT_CLASSES, main_sizes=(0.75, 1.0, 1.0), alike=1.0, cap=0.0),
    "relations": replace(_ONE, label="relation", classes=RELATION_CLASSES, main_sizes=(0.0, 0.6, 1.0)),
    "fine_grained": replace(
        _ONE, label="variant", classes=world.FINE_GRAINED, counts=(1.0,), main_sizes=(0.0, 0.0, 1.0)
    ),
    "aerial": replace(_ONE, classes=AERIAL_CLASSES),
}
IMAGE_SETS = {"digits": DIGIT_CLASSES, "digits_real": DIGIT_CLASSES}
"""Sets without scenes: images with a class label only."""

SMALL_SETS = (
    "shapes", "colours", "textures", "counting", "relations", "fine_grained", "aerial", "styles",
    "digits", "digits_real",
)  # fmt: skip
SPLITS = (
    *RECIPES,
    *IMAGE_SETS,
    *(f"{name}_train" for name in (*SMALL_SETS, "base")),
)


def recipe_name(split: str) -> str:
    """The recipe of a split; a few-shot pool ``<name>_train`` has the recipe of its test set."""
    return split.removesuffix("_train")


def classes_of(split: str) -> tuple[str, ...]:
    """The class names to classify a split's samples among; for train, val and rare, all shapes."""
    name = recipe_name(split)
    if name in IMAGE_SETS:
        return IMAGE_SETS[name]
    if name in ("held_out_pairs", "seen_pairs"):
        return PAIR_CLASSES
    if name == "rare":
        return world.SHAPE_NAMES
    return RECIPES[name].classes or world.SHAPE_NAMES


def wanted_class(split: str, index: int) -> str | None:
    """The class that sample ``index`` of a split shows; None where classes are sampled by frequency."""
    name = recipe_name(split)
    classes = IMAGE_SETS[name] if name in IMAGE_SETS else RECIPES[name].classes
    return classes[index % len(classes)] if classes else None


def scene_of(split: str, draws: Draws, index: int, size: int) -> Scene:
    """The scene of one sample of a split that has scenes."""
    name = recipe_name(split)
    wanted = wanted_class(split, index)
    if name == "aerial":
        return _aerial(draws, str(wanted), size)
    return sample_scene(RECIPES[name], draws, wanted, size, _acceptance(name, wanted))


def label_of(split: str, scene: Scene, index: int) -> str:
    """The value of a sample's column ``label``."""
    return wanted_class(split, index) or scene.objects[scene.main].look.shape


def ordered_pair(scene: Scene, relation: str) -> tuple[int, int]:
    """The indices (subject, object) of a scene of two objects, such that the relation holds."""
    return (0, 1) if relation_between(scene, 0, 1) == relation else (1, 0)


def _acceptance(name: str, wanted: str | None) -> Callable[[Scene], bool] | None:
    if name != "relations":
        return None
    return lambda scene: wanted in (relation_between(scene, 0, 1), relation_between(scene, 1, 0))


def _aerial(draws: Draws, wanted: str, size: int) -> Scene:
    """Some 15 to 40 tiny objects on a jittered grid, most of the shape ``wanted``; no two touch."""
    side = 4 + draws.integer(3)
    cell = size / side
    stack: list[SceneObject] = []
    for row in range(side):
        for column in range(side):
            if draws.chance(0.1):
                continue
            look = _tiny_look(draws, wanted)
            pose = sample_pose(draws, look.shape, cell * draws.uniform(0.25, 0.3))
            shake = [draws.uniform(-0.08, 0.08) * cell for _ in range(2)]
            centre = ((column + 0.5) * cell - 0.5 + shake[0], (row + 0.5) * cell - 0.5 + shake[1])
            stack.append(make_object(look, pose, centre, size))
    objects = finished(stack)
    main = next((i for i, obj in enumerate(objects) if obj.look.shape == wanted), 0)
    return Scene(size, world.seen_styles()[draws.integer(4)], draws.pick(world.GROUND_NAMES), objects, main)


def _tiny_look(draws: Draws, wanted: str) -> Look:
    shape = wanted if draws.chance(0.85) else draws.pick([name for name in AERIAL_CLASSES if name != wanted])
    return replace(sample_look(draws, Wish(shape=shape), "small"), texture="plain")
