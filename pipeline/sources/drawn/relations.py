"""Spatial relations between two objects, computed from their boxes and masks."""

import cv2
import numpy as np

from pipeline.sources.drawn.scenes import Scene, SceneObject

RELATIONS = ("left of", "right of", "above", "below", "inside", "behind", "in front of")
PHRASES = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher up than"),
    "below": ("below", "underneath"),
    "inside": ("inside", "within"),
    "behind": ("behind", "partly hidden by"),
    "in front of": ("in front of", "partly covering"),
}
HIDING = 0.06
"""An object is behind another one that hides at least this fraction of it."""


def relation_between(scene: Scene, first: int, second: int) -> str | None:
    """The relation of the object ``first`` to the object ``second`` (indices), or None.

    - left, right, above, below: the boxes do not overlap along the axis on which the centres are farther apart.
    - ``inside``: all of the first is within the outer contour of the second, and in front of it.
    - ``behind``: the second hides part of the first (:data:`HIDING`); ``in front of`` is the reverse.
    """
    one, other = scene.objects[first], scene.objects[second]
    beside = _side(one, other)
    if beside is not None:
        return beside
    if one.depth > other.depth:
        if _within(one, other):
            return "inside"
        return "in front of" if _hides(one, other) else None
    return "behind" if _hides(other, one) and not _within(other, one) else None


def _side(one: SceneObject, other: SceneObject) -> str | None:
    x, y, width, height = one.box
    other_x, other_y, other_width, other_height = other.box
    across = (other_x + other_width / 2) - (x + width / 2)
    down = (other_y + other_height / 2) - (y + height / 2)
    if abs(across) >= abs(down):
        if x + width <= other_x:
            return "left of"
        return "right of" if other_x + other_width <= x else None
    if y + height <= other_y:
        return "above"
    return "below" if other_y + other_height <= y else None


def _within(inner: SceneObject, outer: SceneObject) -> bool:
    filled = np.zeros_like(inner.coverage)
    cv2.fillPoly(filled, outer.outline.subpixels()[:1], 255, cv2.LINE_AA, 4)
    return not bool((inner.whole & (filled < 128)).any())


def _hides(front: SceneObject, back: SceneObject) -> bool:
    covered = np.count_nonzero(front.visible & back.whole)
    return bool(covered >= HIDING * np.count_nonzero(back.whole))
