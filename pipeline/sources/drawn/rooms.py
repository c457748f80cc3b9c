"""Scenes with distances: objects that stand on a floor in front of a wall, and the distance of every pixel.

Depth can be seen in what photographs show, too: a nearer object is larger, stands lower and hides farther ones; the
tiles of the floor shrink towards the wall; haze grows with the distance. With a camera at height 1 above the floor, the
focal length f in pixels and the horizon in row h, the floor at distance d is in row h + f / d, and an object of radius
r has a radius of f r / d pixels. All of an object is at one distance.

The classes of places have walls at their own distances and with their own pattern, as kitchens are smaller than halls.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.outlines import Pixels, outline_of
from pipeline.sources.drawn.render import finish, paint_ground, paint_object
from pipeline.sources.drawn.scenes import (
    Scene,
    SceneObject,
    Wish,
    finished,
    inserted,
    make_object,
    sample_look,
    sample_pose,
)

STYLES = ("flat", "photo", "low contrast")
MOST_OBJECTS = (0.35, 0.7, 0.9, 1.0)  # cumulative probabilities of 1, 2, ... objects
RADII = {"small": (0.2, 0.26), "medium": (0.3, 0.38), "large": (0.42, 0.52)}  # of the height of the camera
APART = 1.12  # smallest ratio of the distances of two objects
CLEAR_AIR = 5.0  # metres after which haze hides 1 - 1/e of a colour
TILES = 3.0  # a side of the floor's tiles is a third of its nearest distance
TRIES = 8


@dataclass(frozen=True, slots=True)
class RoomKind:
    """A class of places: the distance of the nearest floor and the range of the wall's, in metres."""

    name: str
    phrases: tuple[str, ...]
    ground: str
    nearest: float
    wall: tuple[float, float]


ROOM_KINDS = (
    RoomKind("shelf", ("on a shelf", "on a small shelf"), "wood", 0.6, (1.4, 1.8)),
    RoomKind("room", ("in a room", "inside a room"), "brick", 1.0, (2.7, 3.5)),
    RoomKind("hall", ("in a hall", "in a large hall"), "lined", 1.5, (5.0, 7.0)),
)


@dataclass(frozen=True, slots=True)
class Room:
    """``scene`` has the objects from the farthest to the nearest; ``distances`` are theirs, in metres.

    ``horizon`` is a row in pixels from the top, ``focal`` the focal length in pixels.
    """

    kind: RoomKind
    scene: Scene
    distances: tuple[float, ...]
    wall: float
    horizon: float
    focal: float

    def depth(self) -> NDArray[np.float32]:
        """The distance of every pixel in metres, float32 [size, size]."""
        rows = np.arange(self.scene.size) + 0.5 - self.horizon
        floor = self.focal / np.maximum(rows, self.focal / self.wall)
        distances = np.repeat(floor.astype(np.float32)[:, None], self.scene.size, axis=1)
        for obj, distance in zip(self.scene.objects, self.distances, strict=True):
            distances[obj.whole] = distance
        return distances


def sample_room(draws: Draws, index: int, size: int) -> Room:
    """A room, ``size`` pixels wide and high; the classes of places take turns."""
    kind = ROOM_KINDS[index % len(ROOM_KINDS)]
    wall = draws.uniform(*kind.wall)
    horizon = draws.uniform(0.3, 0.4) * size
    focal = kind.nearest * (size - horizon)
    count = draws.weighted(MOST_OBJECTS) + 1
    stack: list[SceneObject] = []
    while not stack:
        distances: list[float] = []
        for distance in _sample_distances(draws, count, 1.15 * kind.nearest, 0.9 * wall):
            grown = _stand(draws, stack, distance, horizon, focal, size)
            if grown is not None:
                stack, distances = grown, [*distances, distance]
    objects = finished(stack)
    main = len(objects) - 1  # the nearest one
    scene = Scene(size, draws.pick(STYLES), kind.ground, objects, main)
    return Room(kind, scene, tuple(distances), wall, horizon, focal)


def render_room(room: Room, draws: Draws) -> Pixels:
    """Paint wall, floor and objects, then haze and the style's effect: uint8 [size, size, 3], RGB."""
    scene = room.scene
    image = paint_ground(scene.ground, scene.style, scene.size, draws)
    _paint_floor(image, room, draws)
    for obj in scene.objects:
        paint_object(image, obj, scene, draws)
    clear = np.exp(-room.depth() / np.float32(CLEAR_AIR))
    tone = np.full_like(image, round(draws.uniform(205, 225)))
    return finish(cv2.blendLinear(image, tone, clear, np.float32(1) - clear), scene.style, draws)  # type: ignore[arg-type]


def _sample_distances(draws: Draws, count: int, low: float, high: float) -> list[float]:
    """Up to ``count`` distances from the farthest to the nearest, uniform in their logarithm and apart."""
    some = sorted((low * (high / low) ** draws.random() for _ in range(count)), reverse=True)
    return [one for nth, one in enumerate(some) if nth == 0 or some[nth - 1] / one >= APART]


def _stand(
    draws: Draws, stack: list[SceneObject], distance: float, horizon: float, focal: float, size: int
) -> list[SceneObject] | None:
    """The stack with an object that stands on the floor at ``distance``, nearer than all others; None if none fits."""
    look = sample_look(draws, Wish(), draws.pick(world.SIZE_NAMES))
    for _ in range(TRIES):
        pose = sample_pose(draws, look.shape, focal / distance * draws.uniform(*RADII[look.size]))
        corners = outline_of(look.shape, look.variant).points @ pose.matrix().T
        left, right, below = -float(corners[:, 0].min()), float(corners[:, 0].max()), float(corners[:, 1].max())
        if left + right > 0.95 * size:
            continue
        centre = draws.uniform(left, size - right), horizon + focal / distance - below
        grown = inserted(stack, make_object(look, pose, centre, size), True, world.OCCLUSION_CAP)
        if grown is not None:
            return grown
        look = replace(look, size="small")
    return None


def _paint_floor(image: Pixels, room: Room, draws: Draws) -> None:
    """Tiles in two tones of one dull colour, from the foot of the wall to the lower edge."""
    size, foot = room.scene.size, math.ceil(room.horizon + room.focal / room.wall - 0.5)
    light = np.array([draws.uniform(120, 200) + draws.uniform(-18, 18) for _ in range(3)])
    dark = light * draws.uniform(0.6, 0.75)
    distance = room.focal / (np.arange(foot, size) + 0.5 - room.horizon)
    across = np.multiply.outer(distance, (np.arange(size) + 0.5 - size / 2) / room.focal)
    side = room.kind.nearest / TILES
    shift = draws.uniform(0, 2), draws.uniform(0, 2)
    odd = (np.floor(distance / side + shift[0])[:, None] + np.floor(across / side + shift[1])) % 2
    image[foot:] = np.where(odd[..., None] > 0, dark, light).astype(np.uint8)
