"""Rendering: ground, clutter strokes, objects, then the style's effect on the whole image.

OpenCV and numpy do all work on pixels; no Python loop runs over them. Images are uint8 [size, size, 3], RGB.
"""

import math
from functools import cache

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.outlines import Outline, Pixels, trace
from pipeline.sources.drawn.scenes import Scene, SceneObject

Field = NDArray[np.float32]
Rgb = tuple[int, int, int]

_BANK = 512
_NOISE = 768
_WHITE = (255, 255, 255)


def render(scene: Scene, draws: Draws) -> Pixels:
    """Paint the scene: uint8 [size, size, 3], RGB."""
    image = paint_ground(scene.ground, scene.style, scene.size, draws)
    for obj in scene.objects:
        paint_object(image, obj, scene, draws)
    return finish(image, scene.style, draws)


def encode(image: Pixels, draws: Draws) -> tuple[bytes, int]:
    """The image as a JPEG, and its quality: 35 to 95, skewed to high; 4:2:0 chroma subsampling below 88."""
    quality = 35 + round(60 * math.sqrt(draws.random()))
    subsampling = "444" if quality >= 88 else "420"
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling=subsampling), quality


def paint_ground(ground: str, style: str, size: int, draws: Draws) -> Pixels:
    """The ground with its clutter strokes."""
    bank = _ground_bank(ground)[draws.integer(3)]
    window = draws.uniform(0.35, 0.7) * _BANK
    left, top = (draws.integer(_BANK - int(window)) for _ in range(2))
    crop = bank[top : top + int(window), left : left + int(window)]
    pattern = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if window > size else cv2.INTER_LINEAR)
    light, dark = _ground_colours(style, draws)
    image = _tinted(pattern, dark, light)
    for _ in range(draws.integer(5)):
        _stroke(image, draws, style)
    return cv2.bitwise_not(image) if style == "inverted" else image  # type: ignore[return-value]


def finish(image: Pixels, style: str, draws: Draws) -> Pixels:
    """Apply the style's effect on the whole image."""
    if style == "photo":
        return _photographed(image, draws)
    if style == "low contrast":
        keep, grey = draws.uniform(0.18, 0.38), draws.uniform(110, 190)
        faded = cv2.addWeighted(image, keep, image, 0.0, grey * (1.0 - keep))
        return _noisy(faded, draws.uniform(0.02, 0.06), draws)  # type: ignore[arg-type]
    if style == "sketch":
        return _noisy(image, draws.uniform(0.04, 0.12), draws)
    return image


def paint_object(image: Pixels, obj: SceneObject, scene: Scene, draws: Draws, rim: bool | None = None) -> None:
    """Paint one object over the image; ``rim`` says whether it has an edge line, by default the ground decides."""
    points = obj.outline.points
    left, top = (max(0, int(low) - 1) for low in points.min(axis=0))
    right, bottom = (min(scene.size, int(high) + 3) for high in points.max(axis=0))
    area = (slice(top, bottom), slice(left, right))
    if scene.style == "photo":
        _shadow(image, obj, draws)
    if scene.style == "sketch":
        _sketch_object(image, obj, area, draws)
        return
    _lay(image, area, _fill(obj, obj.look.rgb, _mark_colour(obj.look.rgb), area, draws), obj.coverage)
    if rim is None:
        close = _distance(obj.look.rgb, tuple(int(value) for value in image[top, left])) < 110
        rim = scene.style == "inverted" or close or draws.chance(0.15 if scene.style == "photo" else 0.5)
    if scene.style == "inverted":
        trace(image, obj.outline, (235, 235, 235), _line(scene.size))
    elif rim:
        dark = tuple(round(0.35 * value) for value in obj.look.rgb)
        trace(image, obj.outline, dark if max(obj.look.rgb) > 60 else (150, 150, 150), _line(scene.size))


def _sketch_object(image: Pixels, obj: SceneObject, area: tuple[slice, slice], draws: Draws) -> None:
    """Paper first (it hides objects behind), then the marks in a pale colour, then two unsteady outlines."""
    rgb = obj.look.rgb
    pale = _mixed(rgb, _WHITE, 0.72)
    _lay(image, area, _fill(obj, pale, _mixed(rgb, _WHITE, 0.15), area, draws), obj.coverage)
    ink = _mixed(rgb, (40, 40, 40), 0.35) if min(rgb) < 200 else (120, 120, 120)
    for _ in range(2):
        shaky = obj.outline.points + _wobble(len(obj.outline.points), _scale(image), draws)
        trace(image, Outline(shaky, obj.outline.starts), ink, _line(image.shape[0]))


def _scale(image: Pixels) -> float:
    """Pixels per 1/128 of the side: the unit of line widths and jitter."""
    return int(image.shape[0]) / 128


def _fill(obj: SceneObject, base: Rgb, mark: Rgb, area: tuple[slice, slice], draws: Draws) -> Pixels:
    """The object's colour with its texture's marks, for the pixels of ``area``."""
    rows, columns = area
    height, width = rows.stop - rows.start, columns.stop - columns.start
    texture = obj.look.texture
    if texture == "plain":
        patch = np.empty((height, width, 3), np.uint8)
        patch[:] = base
        return patch
    x = np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(obj.box[0] + obj.box[2] / 2)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(obj.box[1] + obj.box[3] / 2)
    return _tinted(_marks(texture, x, y, obj, draws), base, mark)


def _marks(texture: str, x: Field, y: Field, obj: SceneObject, draws: Draws) -> Pixels:
    """Where the texture's marks are: uint8 [len(y), len(x)], 255 on a mark."""
    radius = obj.pose.radius
    angle = obj.pose.angle + draws.pick((0.0, 0.25 * math.pi, 0.5 * math.pi))
    across = np.add.outer(np.float32(math.sin(angle)) * y, np.float32(math.cos(angle)) * x)
    if texture == "shaded":
        return _pixels(110.0 + across * np.float32(150.0 / radius))
    if texture == "speckled":
        grain = _noise_crop(len(y), len(x), draws)[:, :, 0]
        return cv2.threshold(cv2.GaussianBlur(grain, (3, 3), 0.8), 142, 255, cv2.THRESH_BINARY)[1]  # type: ignore[return-value]
    period = max(radius * draws.uniform(0.36, 0.5), 4.5)
    wave = np.float32(2 * math.pi / period)
    first = np.cos(across * wave + np.float32(draws.uniform(0, 6.28)))
    if texture == "striped":
        return _pixels(128.0 + 300.0 * first)
    along = np.add.outer(np.float32(math.cos(angle)) * y, np.float32(-math.sin(angle)) * x)
    second = np.cos(along * wave)
    if texture == "dotted":
        return _pixels((first + second - np.float32(0.55)) * 400.0)
    return _pixels(128.0 + 500.0 * first * second)


def _pixels(values: NDArray[np.floating]) -> Pixels:
    pixels: Pixels = np.clip(values, 0, 255).astype(np.uint8)
    return pixels


def _lay(image: Pixels, area: tuple[slice, slice], patch: Pixels, covered: Pixels) -> None:
    """Blend ``patch`` over ``image`` in ``area`` with the weights ``covered`` / 255."""
    weight = covered[area].astype(np.float32) * np.float32(1 / 255)
    image[area] = cv2.blendLinear(patch, np.ascontiguousarray(image[area]), weight, np.float32(1) - weight)


def _shadow(image: Pixels, obj: SceneObject, draws: Draws) -> None:
    """A soft dark copy of the object, down and to one side."""
    if not draws.chance(0.7):
        return
    size = image.shape[0]
    reach = obj.pose.radius * draws.uniform(0.08, 0.2)
    move = np.array([[1, 0, draws.uniform(-1, 1) * reach], [0, 1, reach]], np.float32)
    moved = cv2.warpAffine(obj.coverage, move, (size, size))
    weight = cv2.blur(moved, (_odd(reach), _odd(reach))).astype(np.float32) * np.float32(draws.uniform(0.2, 0.5) / 255)
    image[:] = cv2.blendLinear(np.zeros_like(image), image, weight, np.float32(1) - weight)


def _photographed(image: Pixels, draws: Draws) -> Pixels:
    """Uneven light, a colour cast, lens blur and sensor noise."""
    size = image.shape[0]
    coarse = np.array([draws.uniform(0.55, 1.05) for _ in range(9)], np.float32).reshape(3, 3)
    light: Field = np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0.4, 1.0)
    lit = cv2.blendLinear(image, np.zeros_like(image), light, np.float32(1) - light)
    gain = [draws.uniform(0.78, 1.2) for _ in range(3)]
    cast = cv2.transform(lit, np.diag(gain))
    blurred = cv2.GaussianBlur(cast, (0, 0), draws.uniform(0.3, 0.9) * _scale(image))
    return _noisy(blurred, draws.uniform(0.05, 0.3), draws)  # type: ignore[arg-type]


def _noisy(image: Pixels, amount: float, draws: Draws) -> Pixels:
    noise = _noise_crop(image.shape[0], image.shape[1], draws)
    return cv2.addWeighted(image, 1.0, noise, amount, -128.0 * amount)  # type: ignore[return-value]


def _noise_crop(height: int, width: int, draws: Draws) -> Pixels:
    top, left = draws.integer(_NOISE - height), draws.integer(_NOISE - width)
    return _noise_bank()[top : top + height, left : left + width]


@cache
def _noise_bank() -> Pixels:
    generator = np.random.Generator(np.random.Philox(key=0))
    return _pixels(generator.standard_normal((_NOISE, _NOISE, 3), dtype=np.float32) * 40 + 128)


def _stroke(image: Pixels, draws: Draws, style: str) -> None:
    """One clutter stroke: a bent line in a dull colour."""
    size = image.shape[0]
    ends = [(draws.uniform(-0.1, 1.1) * size, draws.uniform(-0.1, 1.1) * size) for _ in range(3)]
    t = np.linspace(0, 1, 9)[:, None]
    curve = (1 - t) ** 2 * np.array(ends[0]) + 2 * t * (1 - t) * np.array(ends[1]) + t**2 * np.array(ends[2])
    value, spread = draws.uniform(90, 215), 24.0
    colour = tuple(round(value + draws.uniform(-spread, spread)) for _ in range(3))
    if style == "sketch":
        colour = (round(value),) * 3
    thickness = max(1, round(draws.uniform(0.6, 2.0) * _scale(image)))
    cv2.polylines(image, [np.rint(curve * 16).astype(np.int32)], False, colour, thickness, cv2.LINE_AA, 4)


def _ground_colours(style: str, draws: Draws) -> tuple[Rgb, Rgb]:
    """A light and a darker tone of one dull colour."""
    if style == "sketch":
        value, depth = draws.uniform(235, 252), draws.uniform(0.9, 0.97)
    elif style != "inverted" and draws.chance(0.22):
        value, depth = draws.uniform(85, 150), draws.uniform(0.7, 0.9)
    else:
        value, depth = draws.uniform(175, 250), draws.uniform(0.72, 0.93)
    spread = 0.02 if style == "sketch" else 0.07
    light = tuple(min(255, round(value * draws.uniform(0.97 - spread, 0.97 + spread))) for _ in range(3))
    red, green, blue = light
    return (red, green, blue), (round(red * depth), round(green * depth), round(blue * depth))


def _tinted(pattern: Pixels, low: Rgb, high: Rgb) -> Pixels:
    """Grey 0..255 becomes ``low``..``high``: uint8 [H, W] -> uint8 [H, W, 3]."""
    rows = [[(end - start) / 255, start] for start, end in zip(low, high, strict=True)]
    return cv2.transform(pattern, np.array(rows))  # type: ignore[return-value]


def _mark_colour(rgb: Rgb) -> Rgb:
    """Darker marks on light colours and lighter marks on dark ones, so that the colour keeps its name."""
    luminance = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    return _mixed(rgb, (0, 0, 0), 0.4) if luminance > 110 else _mixed(rgb, _WHITE, 0.4)


def _mixed(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _distance(one: Rgb, other: tuple[int, ...]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def _line(size: int) -> int:
    return max(1, round(1.3 * size / 128))


def _odd(width: float) -> int:
    return 2 * int(width / 2) + 3


def _wobble(count: int, scale: float, draws: Draws) -> NDArray[np.float64]:
    """A slow unsteady shift along an outline: float64 [count, 2], about one pixel at 128."""
    t = np.arange(count)
    parts = [
        np.sin(t * draws.uniform(0.15, 0.6) + draws.uniform(0, 6.28)) * draws.uniform(0.4, 1.2) * scale
        for _ in range(2)
    ]
    return np.stack(parts, axis=1)


@cache
def _ground_bank(ground: str) -> NDArray[np.uint8]:
    """Three grey patterns of a ground: uint8 [3, _BANK, _BANK]."""
    key = world.GROUND_NAMES.index(ground)
    return np.stack([_pattern(ground, np.random.Generator(np.random.Philox(key=[key, i]))) for i in range(3)])


def _pattern(ground: str, generator: np.random.Generator) -> Pixels:
    y, x = np.mgrid[0:_BANK, 0:_BANK].astype(np.float32)
    noise = generator.standard_normal((_BANK, _BANK), dtype=np.float32)
    step = float(generator.uniform(24, 40))
    if ground == "clear":
        return np.full((_BANK, _BANK), 255, np.uint8)
    if ground == "haze":
        coarse = generator.uniform(0, 255, (5, 5)).astype(np.float32)
        return _pixels(cv2.resize(coarse, (_BANK, _BANK), interpolation=cv2.INTER_CUBIC))  # type: ignore[arg-type]
    if ground == "paper":
        grain = cv2.GaussianBlur(noise, (0, 0), 2.5)
        return _pixels(150 + 60 * grain / grain.std())
    if ground in ("grid", "lined"):
        lines = (y % step) < 3.0
        lines = lines | ((x % step) < 3.0) if ground == "grid" else lines
        return _pixels(np.where(lines, 0, 255))
    if ground == "horizon":
        edge = _BANK * generator.uniform(0.4, 0.6) + 16 * np.sin(x / 60 + generator.uniform(0, 6))
        return _pixels(np.where(y < edge, 255 - 60 * y / _BANK, 40 + 60 * y / _BANK))
    if ground == "brick":
        row = np.floor(y / step)
        joint = ((y % step) < 4) | (((x + (row % 2) * step) % (2 * step)) < 4)
        return _pixels(
            np.where(joint, 255, 90 + 40 * np.sin(row * 2.1 + np.floor((x + (row % 2) * step) / (2 * step))))
        )
    grain = cv2.GaussianBlur(noise, (0, 0), sigmaX=40, sigmaY=1.5)
    board = ((y % (3 * step)) < 4).astype(np.float32)
    return _pixels(150 + 45 * grain / grain.std() - 150 * board)
