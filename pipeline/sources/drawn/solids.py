"""Point clouds of solids: points on the surface of a body that is turned about the vertical, scaled and measured badly.

A body stands upright with y up. Its height and width vary by a third, it is turned by any angle about the vertical and
inclined by a few degrees. Its size is arbitrary, as the units of real scans are, and points have noise of up to 2 % of
it. The novel solids are in no training split, and no caption names them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.clouds import Cloud, on_surface, write_npy
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.words import article, dressed
from pipeline.sources.source import Cell

SOLID_COLUMNS: Mapping[str, type] = {"index": int, "split": str, "label": str, "captions": list}
STEPS = 32
"""Corners of a round solid."""
NOISE = 0.02
TILT = math.radians(8)

Mesh = tuple[NDArray[np.float64], NDArray[np.int64]]
Outline = Sequence[tuple[float, float]]

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "sphere": ("ball", "globe"),
    "cube": ("box", "block"),
    "cylinder": ("drum", "can"),
    "cone": ("pointed cone",),
    "torus": ("ring", "doughnut"),
    "pyramid": ("square pyramid",),
    "star prism": ("thick star",),
    "cross prism": ("thick cross",),
    "hourglass": ("sand timer",),
    "capsule": ("pill",),
    "bowl": ("open hemisphere",),
    "table": ("desk", "small table"),
    "triangular prism": ("wedge", "tent"),
    "octahedron": ("double pyramid", "diamond"),
    "vase": ("jar", "pot"),
    "stairs": ("steps", "staircase"),
}
NOVEL_SOLIDS = ("triangular prism", "octahedron", "vase", "stairs")
SOLIDS = tuple(SYNONYMS)
BASE_SOLIDS = tuple(name for name in SOLIDS if name not in NOVEL_SOLIDS)
SOLID_SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": BASE_SOLIDS,
    "val": BASE_SOLIDS,
    "solids_train": SOLIDS,
    "solids": SOLIDS,
    "novel_solids": NOVEL_SOLIDS,
}
"""The solids of each split, in turn."""
_OPENINGS = ("a point cloud of", "a depth map of", "the points of", "a scan of", "a view of", "this is")


@dataclass(frozen=True, slots=True)
class DrawnSolid:
    """``points`` is a cloud as a ``.npy`` file, float32 [N, 3]."""

    points: bytes
    caption: str
    columns: dict[str, Cell]


def solid_class(split: str, index: int) -> str:
    """The solid that sample ``index`` of a split shows."""
    names = SOLID_SPLITS[split]
    return names[index % len(names)]


def draw_solid(split: str, seed: int, index: int, count: int, captions: int = 1) -> DrawnSolid:
    """Sample ``index`` of ``split`` with ``count`` points: a pure function of its arguments."""
    name, draws = solid_class(split, index), Draws(seed, split, index, "solid")
    corners, faces = MESHES[name]()
    stretch = np.array([draws.uniform(0.75, 1.3), draws.uniform(0.75, 1.3), draws.uniform(0.75, 1.3)])
    if name in _ROUND:
        stretch[2] = stretch[0]
    corners = (corners - (corners.min(axis=0) + corners.max(axis=0)) / 2) * stretch
    corners = corners @ _tilted(draws).T
    body = Cloud(corners.astype(np.float32), faces)
    points = on_surface(body, count, np.random.Philox(key=draws.integer(2**53))).astype(np.float64)
    noise = draws.normals(3 * count).reshape(count, 3)
    points += draws.uniform(0, NOISE) * np.abs(points).max() * noise
    points = points * 10 ** draws.uniform(-1, 2) + [draws.uniform(-5, 5) for _ in range(3)]
    pen = Draws(seed, split, index, "words")
    texts = [_caption(name, pen) for _ in range(captions)]
    columns: dict[str, Cell] = {"index": index, "split": split, "label": name, "captions": texts}
    return DrawnSolid(write_npy(points.astype(np.float32)), texts[0], columns)


def _caption(name: str, pen: Draws) -> str:
    words = name if pen.chance(0.75) else pen.pick(SYNONYMS[name])
    text = f"{article(words)} {words}"
    return dressed(f"{pen.pick(_OPENINGS)} {text}" if pen.chance(0.7) else text, pen)


def _tilted(draws: Draws) -> NDArray[np.float64]:
    """A turn by any angle about the vertical, after an inclination of some degrees."""
    turn, tilt = draws.uniform(0, 2 * math.pi), draws.uniform(-TILT, TILT)
    about_y = [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]]
    about_x = [[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]]
    turned: NDArray[np.float64] = np.array(about_y) @ np.array(about_x)
    return turned


def _revolved(profile: Outline, closed: bool = False) -> Mesh:
    """The surface of a profile of (radius, height) that turns about the vertical."""
    radii, heights = np.array(profile, np.float64).T
    angles = np.arange(STEPS) * 2 * math.pi / STEPS
    x, z = radii[:, None] * np.cos(angles), radii[:, None] * np.sin(angles)
    corners = np.stack([x, np.broadcast_to(heights[:, None], x.shape), z], axis=-1).reshape(-1, 3)
    faces = []
    for row in range(len(profile) - (not closed)):
        below = (row + 1) % len(profile)
        for step in range(STEPS):
            beside = (step + 1) % STEPS
            a, b = row * STEPS + step, row * STEPS + beside
            c, d = below * STEPS + step, below * STEPS + beside
            faces += [(a, b, c), (b, d, c)]
    return corners, np.array(faces, np.int64)


def _arc(radius: float, middle: float, begin: float, end: float, steps: int = 16) -> list[tuple[float, float]]:
    """(radius, height) of an arc around the axis; angles in degrees from the top."""
    angles = np.radians(np.linspace(begin, end, steps))
    return [(radius * math.sin(angle), middle + radius * math.cos(angle)) for angle in angles]


def _prism(outline: Outline, depth: float) -> Mesh:
    """A body with the outline (x, y), seen from its middle, as its front and back."""
    count = len(outline)
    flat = np.array(outline, np.float64)
    front = np.column_stack([flat, np.full(count, depth / 2)])
    back = np.column_stack([flat, np.full(count, -depth / 2)])
    middle = flat.mean(axis=0)
    ends = [[*middle, depth / 2], [*middle, -depth / 2]]
    faces = []
    for at in range(count):
        beside = (at + 1) % count
        faces += [(at, beside, 2 * count), (count + at, count + beside, 2 * count + 1)]
        faces += [(at, beside, count + at), (beside, count + beside, count + at)]
    return np.concatenate([front, back, np.array(ends)]), np.array(faces, np.int64)


def _box(x: float, y: float, z: float, at: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    corners, faces = _prism([(-x / 2, -y / 2), (x / 2, -y / 2), (x / 2, y / 2), (-x / 2, y / 2)], z)
    return corners + np.array(at), faces


def _joined(meshes: Sequence[Mesh]) -> Mesh:
    starts = np.cumsum([0, *(len(corners) for corners, _ in meshes)])
    faces = [part + start for (_, part), start in zip(meshes, starts, strict=False)]
    return np.concatenate([corners for corners, _ in meshes]), np.concatenate(faces)


def _spire(base: float, top: float) -> Mesh:
    """Four triangles from a square at the height ``base`` to a point at ``top``."""
    corners = [(-1.0, base, -1.0), (1.0, base, -1.0), (1.0, base, 1.0), (-1.0, base, 1.0), (0.0, top, 0.0)]
    return np.array(corners), np.array([(at, (at + 1) % 4, 4) for at in range(4)], np.int64)


def _star() -> Outline:
    lengths = [1.0 if at % 2 == 0 else 0.42 for at in range(10)]
    angles = [math.pi / 2 + at * math.pi / 5 for at in range(10)]
    return [(far * math.cos(angle), far * math.sin(angle)) for far, angle in zip(lengths, angles, strict=True)]


def _cross() -> Outline:
    near, far = 0.32, 1.0
    quarter = [(far, near), (near, near), (near, far)]
    turned = [*quarter, *((-x, y) for x, y in reversed(quarter))]
    return [*turned, *((-x, -y) for x, y in turned)]


def _table() -> Mesh:
    legs = [_box(0.18, 1.3, 0.18, (0.8 * x, -0.7, 0.6 * z)) for x in (-1, 1) for z in (-1, 1)]
    return _joined([_box(2.0, 0.16, 1.5), *legs])


def _stairs() -> Mesh:
    steps = [_box(1.4, 0.5 * (at + 1), 0.5, (0, 0.25 * (at + 1), 0.5 * at)) for at in range(4)]
    return _joined(steps)


def _torus() -> Mesh:
    angles = [2 * math.pi * at / 16 for at in range(16)]
    return _revolved([(1 + 0.35 * math.cos(angle), 0.35 * math.sin(angle)) for angle in angles], closed=True)


MESHES: Mapping[str, Callable[[], Mesh]] = {
    "sphere": lambda: _revolved(_arc(1, 0, 0, 180)),
    "cube": lambda: _box(1.6, 1.6, 1.6),
    "cylinder": lambda: _revolved([(0, 1), (0.8, 1), (0.8, -1), (0, -1)]),
    "cone": lambda: _revolved([(0, 1), (0.95, -1), (0, -1)]),
    "torus": _torus,
    "pyramid": lambda: _joined([_spire(-0.8, 1.0), _box(2.0, 0.02, 2.0, (0, -0.8, 0))]),
    "star prism": lambda: _prism(_star(), 0.5),
    "cross prism": lambda: _prism(_cross(), 0.5),
    "hourglass": lambda: _revolved([(0, 1), (0.85, 1), (0.12, 0), (0.85, -1), (0, -1)]),
    "capsule": lambda: _revolved([*_arc(0.45, 0.7, 0, 90), *_arc(0.45, -0.7, 90, 180)]),
    "bowl": lambda: _revolved([*_arc(1, 0, 90, 180), *reversed(_arc(0.9, 0, 90, 180))]),
    "table": _table,
    "triangular prism": lambda: _prism([(-1, -0.7), (1, -0.7), (0, 0.9)], 2.0),
    "octahedron": lambda: _joined([_spire(0.0, 1.3), _spire(0.0, -1.3)]),
    "vase": lambda: _revolved([(0, -1), (0.45, -1), (0.8, -0.4), (0.6, 0.3), (0.25, 0.6), (0.45, 1)]),
    "stairs": _stairs,
}
"""The surface of each solid as corners [K, 3] and triangles [F, 3]."""
_ROUND = ("sphere", "cylinder", "cone", "torus", "hourglass", "capsule", "bowl", "vase")
