"""The outlines of the shapes and their pixels.

An outline is a list of closed contours in a unit frame (radius about 1, y downwards), filled by the even-odd rule, so
a contour inside another is a hole. Outlines are formulas and independent of resolution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.sources.drawn.world import POLYGON_SIDES, STAR_POINTS

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]

_SUBPIXEL_BITS = 4


@dataclass(frozen=True, slots=True)
class Outline:
    """``points`` float64 [N, 2]; contour i is ``points[starts[i]:starts[i + 1]]``; the first is the outer one."""

    points: Points
    starts: tuple[int, ...]

    def placed(self, matrix: Points, centre: tuple[float, float]) -> "Outline":
        """The outline after ``matrix`` (2 x 2) and a move to ``centre`` (x, y)."""
        return Outline(self.points @ matrix.T + np.array(centre), self.starts)

    def subpixels(self) -> list[NDArray[np.int32]]:
        """The contours as int32 [n, 2] in sixteenths of a pixel, for OpenCV's ``shift=4``."""
        fixed = np.rint(self.points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        return [fixed[start:end] for start, end in zip(self.starts[:-1], self.starts[1:], strict=True)]


def coverage(outline: Outline, size: int) -> Pixels:
    """How much of each pixel the outline covers: uint8 [size, size], 255 inside."""
    canvas = np.zeros((size, size), np.uint8)
    cv2.fillPoly(canvas, outline.subpixels(), 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return canvas


def trace(image: Pixels, outline: Outline, colour: tuple[float, ...], thickness: int) -> None:
    """Draw the contours as antialiased lines on ``image`` (uint8 [H, W, 3]) in place."""
    cv2.polylines(image, outline.subpixels(), True, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


@cache
def outline_of(shape: str, variant: str | None = None) -> Outline:
    """The unit outline of a shape; ``variant`` is the fine-grained name of a star or polygon."""
    contours = _FORMULAS[shape](variant) if shape in ("star", "polygon") else _FORMULAS[shape](None)
    starts = np.cumsum([0, *(len(contour) for contour in contours)])
    return Outline(np.concatenate(contours), tuple(int(start) for start in starts))


def _arc(x: float, y: float, radius: float, begin: float, end: float, steps: int = 24, squeeze: float = 1.0) -> Points:
    """Points on an ellipse's arc; angles in degrees, clockwise on the screen, 0 = right; ``squeeze`` scales y."""
    angles = np.radians(np.linspace(begin, end, steps))
    return np.stack([x + radius * np.cos(angles), y + radius * squeeze * np.sin(angles)], axis=1)


def _circle(x: float, y: float, radius: float, steps: int = 40) -> Points:
    return _arc(x, y, radius, 0.0, 360.0, steps + 1)[:-1]


def _polar(radius: Callable[[Points], Points], steps: int) -> Points:
    angles = np.linspace(-math.pi / 2, 1.5 * math.pi, steps, endpoint=False)
    lengths = radius(angles)
    return np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)


def _path(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _regular(sides: int, radius: float = 1.0) -> Points:
    return _polar(lambda angles: np.full_like(angles, radius), sides)


def _disc(_: str | None) -> list[Points]:
    return [_circle(0, 0, 1, 48)]


def _ring(_: str | None) -> list[Points]:
    return [_circle(0, 0, 1, 48), _circle(0, 0, 0.58)]


def _crescent(_: str | None) -> list[Points]:
    # Unit circle less a circle of radius 0.82 at x = 0.5: they cross where x = (1 + 0.25 - 0.6724) / 1.
    cross = math.degrees(math.acos((1 + 0.25 - 0.82**2) / 1.0))
    inner = math.degrees(math.atan2(math.sin(math.radians(cross)), math.cos(math.radians(cross)) - 0.5))
    outer = _arc(0.25, 0, 1.05, cross, 360 - cross, 40)
    return [np.concatenate([outer, _arc(0.25 + 0.525, 0, 0.861, 360 - inner, inner, 30)])]


def _semicircle(_: str | None) -> list[Points]:
    return [_arc(0, 0.5, 1.1, 180, 360, 30)]


def _square(_: str | None) -> list[Points]:
    return [_path((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))]


def _bar(_: str | None) -> list[Points]:
    return [_path((-1.15, -0.2), (1.15, -0.2), (1.15, 0.2), (-1.15, 0.2))]


def _triangle(_: str | None) -> list[Points]:
    return [_regular(3, 1.1)]


def _polygon(variant: str | None) -> list[Points]:
    return [_regular(POLYGON_SIDES[variant or "hexagon"])]


def _star(variant: str | None) -> list[Points]:
    points = STAR_POINTS[variant or "five-pointed star"]
    inner = {4: 0.4, 5: 0.45, 6: 0.54, 7: 0.56, 8: 0.6}[points]
    corners = _regular(2 * points, 1.12)
    corners[1::2] *= inner / 1.12
    return [corners]


def _cross(_: str | None) -> list[Points]:
    a, b = 0.3, 1.0
    quarter = [(-a, -b), (a, -b), (a, -a)]
    return [_path(*[_turned(point, turn) for turn in range(4) for point in quarter])]


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y


def _arrow(_: str | None) -> list[Points]:
    return [_path((-1.1, -0.22), (0.15, -0.22), (0.15, -0.7), (1.1, 0), (0.15, 0.7), (0.15, 0.22), (-1.1, 0.22))]


def _heart(_: str | None) -> list[Points]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x / 16.0, -(y + 2.5) / 15.0], axis=1)]


def _drop(_: str | None) -> list[Points]:
    t = np.linspace(0, 2 * math.pi, 44, endpoint=False)
    return [np.stack([0.95 * np.sin(t) * np.sin(t / 2) ** 1.6, -1.1 * np.cos(t)], axis=1)]


def _cloud(_: str | None) -> list[Points]:
    puffs = ((-0.62, 0.16, 0.42), (-0.18, -0.22, 0.5), (0.42, -0.06, 0.44), (0.72, 0.24, 0.34), (0.05, 0.2, 0.5))

    def radius(angles: Points) -> Points:
        x, y = np.cos(angles), np.sin(angles)
        reach = np.full_like(angles, 0.3)
        for centre_x, centre_y, size in puffs:
            along = x * centre_x + y * centre_y
            inside = along**2 - (centre_x**2 + centre_y**2 - size**2)
            reach = np.where(inside > 0, np.maximum(reach, along + np.sqrt(np.maximum(inside, 0))), reach)
        return reach

    cloud = _polar(radius, 90)
    cloud[:, 1] = np.minimum(cloud[:, 1], 0.5)
    return [cloud]


def _leaf(_: str | None) -> list[Points]:
    half = np.linspace(-1, 1, 20)
    edge = 0.52 * (1 - half**2) * (1 - 0.25 * half)
    blade = np.concatenate([np.stack([half, -edge], 1), np.stack([half, edge], 1)[::-1][1:-1]])
    stalk = _path((-1.35, -0.05), (-0.97, -0.05), (-0.97, 0.05), (-1.35, 0.05))
    veins = [_path((-0.75, -0.03), (0.7, -0.03), (0.7, 0.03), (-0.75, 0.03))]
    for x in (-0.45, 0.0):
        for side in (-1, 1):
            veins.append(
                _path((x, side * 0.05), (x + 0.1, side * 0.05), (x + 0.36, side * 0.3), (x + 0.28, side * 0.3))
            )
    return [blade, stalk, *veins]


def _flower(_: str | None) -> list[Points]:
    petals = _polar(lambda angles: 0.42 + 0.63 * np.abs(np.cos(2.5 * (angles + math.pi / 2))) ** 0.7, 100)
    return [petals, _circle(0, 0, 0.24, 20)]


def _gear(_: str | None) -> list[Points]:
    corners = [
        (radius * math.cos(angle), radius * math.sin(angle))
        for tooth in range(8)
        for radius, turn in ((0.76, -0.3), (1.05, -0.17), (1.05, 0.17), (0.76, 0.3))
        for angle in ((tooth + turn) * math.pi / 4,)
    ]
    return [_path(*corners), _circle(0, 0, 0.34, 24)]


def _key(_: str | None) -> list[Points]:
    bit = ((1.15, -0.12), (1.15, 0.5), (0.93, 0.5), (0.93, 0.12), (0.8, 0.12), (0.8, 0.42), (0.58, 0.42), (0.58, 0.12))
    bow = _arc(-0.68, 0, 0.5, 14, 346, 36)
    return [np.concatenate([bow, _path(*bit)]), _circle(-0.74, 0, 0.23, 20)]


def _fish(_: str | None) -> list[Points]:
    body = _arc(0.22, 0, 0.85, -160, 160, 36, squeeze=0.6)
    tail = _path((-1.1, 0.5), (-0.9, 0.0), (-1.1, -0.5))
    return [np.concatenate([body, tail]), _circle(0.66, -0.14, 0.11, 14)]


def _house(_: str | None) -> list[Points]:
    walls = _path(
        (0, -1.05), (0.4, -0.66), (0.4, -0.95), (0.62, -0.95), (0.62, -0.45), (1.0, -0.08), (0.75, -0.08),
        (0.75, 0.85), (-0.75, 0.85), (-0.75, -0.08), (-1.0, -0.08),
    )  # fmt: skip
    door = _path((-0.5, 0.85), (-0.5, 0.2), (-0.14, 0.2), (-0.14, 0.85))
    window = _path((0.15, 0.1), (0.52, 0.1), (0.52, 0.46), (0.15, 0.46))
    return [walls, door, window]


def _bolt(_: str | None) -> list[Points]:
    return [_path((0.15, -1.1), (-0.6, 0.18), (-0.08, 0.18), (-0.3, 1.1), (0.62, -0.3), (0.08, -0.3), (0.55, -1.1))]


def _mushroom(_: str | None) -> list[Points]:
    cap = _arc(0, 0.05, 1.05, 180, 360, 30, squeeze=0.95)
    stem = _path((0.98, 0.2), (0.26, 0.2), (0.38, 0.95), (-0.38, 0.95), (-0.26, 0.2), (-0.98, 0.2))
    return [np.concatenate([cap, stem])]


def _hourglass(_: str | None) -> list[Points]:
    return [_path((-0.8, -1.0), (0.8, -1.0), (0.11, 0.0), (0.8, 1.0), (-0.8, 1.0), (-0.11, 0.0))]


def _spiral(_: str | None) -> list[Points]:
    turn = np.linspace(0.35, 5.0 * math.pi, 90)
    middle = 0.08 + 0.92 * turn / turn[-1]
    sides = [np.stack([r * np.cos(turn), r * np.sin(turn)], 1) for r in (middle + 0.085, middle - 0.085)]
    return [np.concatenate([sides[0], sides[1][::-1]])]


_FORMULAS: dict[str, Callable[[str | None], list[Points]]] = {
    "disc": _disc,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
    "polygon": _polygon,
    "heart": _heart,
    "ring": _ring,
    "arrow": _arrow,
    "cross": _cross,
    "flower": _flower,
    "cloud": _cloud,
    "house": _house,
    "fish": _fish,
    "leaf": _leaf,
    "drop": _drop,
    "crescent": _crescent,
    "semicircle": _semicircle,
    "bar": _bar,
    "gear": _gear,
    "bolt": _bolt,
    "mushroom": _mushroom,
    "hourglass": _hourglass,
    "key": _key,
    "spiral": _spiral,
}
