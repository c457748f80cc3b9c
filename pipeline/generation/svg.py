"""Strokes as SVG files, and SVG files as strokes.

Written are paths with round caps and joins, with coordinates to a thousandth of a pixel. Read are the elements path,
line, polyline, polygon and rect, in groups as well, with colours and widths as attributes or in ``style``. Differences
from other readers: caps and joins are round; curves of an arc, transforms, style sheets, clips, dashes and hidden
elements are refused; fill rules are one for the whole file. An SVG file may come from anyone: entities are refused
before it is parsed, and its depth and its size in memory are limited.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from xml.etree import ElementTree

import torch
from PIL import ImageColor

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.generation.curves import Strokes

NAMESPACE = "http://www.w3.org/2000/svg"
IGNORED = {"title", "desc", "metadata"}
INHERITED = ("stroke", "stroke-width", "stroke-opacity", "fill", "fill-opacity", "fill-rule")
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
TOKENS = re.compile(rf"[A-Za-z]|{NUMBER}")
NO_EFFECT = {
    **dict.fromkeys(("transform", "clip-path", "mask", "filter", "stroke-dasharray"), ("none",)),
    **dict.fromkeys(("rx", "ry"), ("0",)),
    "display": ("inline", "block"),
    "visibility": ("visible",),
}
"""Attributes that are not read, with their values that change nothing."""
ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "Z": 0}
LONGEST = 20_000_000
LONGEST_ATTRIBUTE = 200
"""Characters of a length, an opacity or a colour."""
DEEPEST = 100
MOST_POINTS = 20_000_000
"""Points of all paths, each with room for the longest one."""
MOST_CURVES = 1_000_000
"""Curves of all paths; while a file is read, each takes about 600 bytes."""
MOST_PIXELS = 16_384

TOO_MANY = f"more than {MOST_CURVES} curves in the file"

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class SvgScene:
    """The paths of one SVG file, B = 1, and the size and the colour of its canvas."""

    strokes: Strokes
    height: int
    width: int
    background: Colour | None
    """Colour of a first rectangle that covers the canvas, 0 to 1; none without one."""


def write_svg(strokes: Strokes, height: int, width: int, background: Colour | None = (1.0, 1.0, 1.0)) -> list[str]:
    """One SVG text for each image, on a canvas of this size; colours are clamped to 0 to 1."""
    ground = "" if background is None else f'<rect width="100%" height="100%" fill="{_written(background)}"/>\n'
    head = f'<svg xmlns="{NAMESPACE}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n{ground}'
    points, widths = strokes.points.detach().double().cpu(), strokes.widths.detach().double().cpu()
    colours, counts, fills = strokes.colours.detach().clamp(0, 1).cpu(), strokes.counts().cpu(), strokes.fills().cpu()
    rule = "evenodd" if strokes.even_odd else "nonzero"
    found = []
    for image in range(len(points)):
        lines = []
        for path in range(points.shape[1]):
            used = points[image, path, : 3 * int(counts[image, path]) + 1].tolist()
            *colour, alpha = colours[image, path].tolist()
            if fills[image, path]:
                paint = f'fill="{_written(colour)}" fill-opacity="{alpha:.4f}" fill-rule="{rule}"'
            else:
                size = max(float(widths[image, path]), 0)
                paint = f'fill="none" stroke="{_written(colour)}" stroke-opacity="{alpha:.4f}" '
                paint += f'stroke-width="{size:.3f}" stroke-linecap="round" stroke-linejoin="round"'
            lines.append(f'<path d="{_data(used)}" {paint}/>\n')
        found.append(f"{head}{''.join(lines)}</svg>\n")
    return found


def _data(points: Sequence[Sequence[float]]) -> str:
    words = [f"{x:.3f},{y:.3f}" for x, y in points]
    return f"M {words[0]} C {' '.join(words[1:])}"


def _written(colour: Sequence[float]) -> str:
    return f"rgb({', '.join(f'{100 * part:.2f}%' for part in colour)})"


def read_svg(text: str, origin: str = "svg") -> SvgScene:
    """The paths of an SVG file; a path with a line and an inside becomes two, the inside first.

    Raises:
        SettingError: not SVG, without a size, or with parts that are not read; ``origin`` names the file.
    """
    require(len(text) <= LONGEST, origin, f"{len(text)} characters", f"at most {LONGEST}")
    require("<!ENTITY" not in text and "<!DOCTYPE" not in text, origin, "a document type", "an SVG file without one")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise SettingError(origin, text[:40], f"an SVG file ({error})") from error
    require(_name(root) == "svg", origin, _name(root), "the element svg")
    height, width, scale = _canvas(root, origin)
    elements = list(islice(_elements(root, dict[str, str](), origin), MOST_CURVES + 1))
    require(len(elements) <= MOST_CURVES, origin, "too many elements", f"at most {MOST_CURVES}")
    background = None
    if elements and _covers(elements[0], height / scale, width / scale):
        background = _colour(elements.pop(0)["fill"], origin)
    del root  # of a large file, the most memory
    room = _Room(origin)
    paths = [path for one in elements for path in _paths(one, room)]
    rules = {one.get("fill-rule", "nonzero") for one in elements if one.get("fill", "black") != "none"}
    require(len(rules) <= 1, origin, sorted(rules), "one fill rule for all paths")
    return SvgScene(_strokes(paths, scale, rules == {"evenodd"}, origin), height, width, background)


@dataclass(frozen=True)
class _Path:
    curves: Sequence[Curve]
    width: float
    colour: tuple[float, float, float, float]
    filled: bool


@dataclass
class _Room:
    """Counts what is read of one file, to stop before it takes too much memory."""

    origin: str
    paths: int = 0
    curves: int = 0
    most: int = 1

    @property
    def left(self) -> int:
        """Curves that may follow."""
        return MOST_CURVES - self.curves

    def take(self, path: _Path) -> _Path:
        """The path; raises ``SettingError`` if the points need too much room with it."""
        self.paths, self.most = self.paths + 1, max(self.most, len(path.curves))
        found = f"{self.paths} paths of up to {self.most} curves"
        require(self.paths * (3 * self.most + 1) <= MOST_POINTS, self.origin, found, f"at most {MOST_POINTS} points")
        return path


def _strokes(paths: Sequence[_Path], scale: float, even_odd: bool, origin: str) -> Strokes:
    most = max((len(path.curves) for path in paths), default=1)
    points = torch.zeros(1, len(paths), 3 * most + 1, 2)
    for number, path in enumerate(paths):
        flat = [path.curves[0][0], *(point for curve in path.curves for point in curve[1:])]
        points[0, number] = torch.tensor(flat + flat[-1:] * (3 * most + 1 - len(flat)))
    widths = torch.tensor([[path.width for path in paths]]).view(1, -1)
    points, widths = points.mul_(scale), widths * scale
    finite = bool(points.isfinite().all()) and bool(widths.isfinite().all())
    require(finite, origin, "numbers that are not finite", "finite numbers")
    return Strokes(
        points=points,
        widths=widths,
        colours=torch.tensor([path.colour for path in paths]).view(1, -1, 4),
        segments=torch.tensor([len(path.curves) for path in paths], dtype=torch.long).view(1, -1),
        filled=torch.tensor([path.filled for path in paths], dtype=torch.bool).view(1, -1),
        even_odd=even_odd,
    )


def _name(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _canvas(root: ElementTree.Element, origin: str) -> tuple[int, int, float]:
    """Height and width in whole pixels, and the factor from the file's units to pixels."""
    box = _numbers(root.get("viewBox", ""), 5)
    require(len(box) in (0, 4) and box[:2] in ([], [0, 0]), origin, root.get("viewBox"), "a viewBox from 0 0")
    given = [root.get(name, "") for name in ("width", "height")]
    sides = [_length(text, origin) if text and not text.endswith("%") else 0.0 for text in given]
    width, height = (one or (box[2:] or [0, 0])[number] for number, one in enumerate(sides))
    fits = 1 <= width <= MOST_PIXELS and 1 <= height <= MOST_PIXELS
    require(fits, origin, (width, height), f"a width and a height of 1 to {MOST_PIXELS} pixels")
    scale = width / box[2] if box and box[2] > 0 else 1.0
    even = not box or abs(scale * box[3] - height) <= 0.5
    require(even, origin, root.get("viewBox"), "a viewBox with the aspect ratio of width and height")
    return round(height), round(width), scale


def _numbers(text: str, most: int) -> list[float]:
    """The first numbers of a list."""
    return [float(found[0]) for found in islice(re.finditer(NUMBER, text), most)]


def _matched(pattern: str, text: str, origin: str, allowed: str) -> re.Match[str] | None:
    """The match of a whole attribute, which is short."""
    require(len(text) <= LONGEST_ATTRIBUTE, origin, f"{text[:20]}…", f"{allowed} in {LONGEST_ATTRIBUTE} characters")
    return re.fullmatch(pattern, text.strip())


def _length(text: str, origin: str) -> float:
    """A length in pixels."""
    found = _matched(rf"({NUMBER})(px)?", text, origin, "lengths in pixels")
    if found is None:
        raise SettingError(origin, text, "lengths in pixels")
    return float(found[1])


def _elements(
    parent: ElementTree.Element, style: Mapping[str, str], origin: str, depth: int = 0
) -> Iterator[dict[str, str]]:
    """The attributes of all drawn elements, with those that they inherit; their kind is under ``kind``."""
    require(depth <= DEEPEST, origin, f"groups deeper than {DEEPEST}", f"groups {DEEPEST} deep at most")
    own = {key.strip(): value.strip() for key, _, value in _declarations(parent.get("style", ""))}
    inherited = {**style, **{key: parent.attrib[key] for key in INHERITED if key in parent.attrib}, **own}
    said = {**parent.attrib, **own}
    for name, values in NO_EFFECT.items():
        require(said.get(name, values[0]) in values, origin, f"{name} {said.get(name)}", f"a file without {name}")
    kind = _name(parent)
    if kind == "g" or not depth:
        opaque = _opacity(inherited.pop("opacity", parent.get("opacity", "1")), origin) == 1
        require(opaque, origin, "opacity of a group", "opacity of paths alone")
        for child in parent:
            yield from _elements(child, inherited, origin, depth + 1)
    elif kind not in IGNORED:
        require(kind in SHAPES, origin, kind, f"the elements g, {', '.join(SHAPES)}")
        yield {**parent.attrib, **inherited, "kind": kind}


def _declarations(style: str) -> Iterator[tuple[str, str, str]]:
    return (one.partition(":") for one in style.split(";") if ":" in one)


def _covers(element: Mapping[str, str], height: float, width: float) -> bool:
    """Whether it is an opaque rectangle over the whole canvas."""
    sides = (element.get("width"), width), (element.get("height"), height)
    whole = all(text in ("100%", f"{side:g}") for text, side in sides)
    whole = whole and all(element.get(name, "0") in ("", "0") for name in ("x", "y"))
    plain = element.get("fill", "none") != "none" and not {"stroke", "opacity", "fill-opacity"} & element.keys()
    return element["kind"] == "rect" and whole and plain


def _paths(element: Mapping[str, str], room: _Room) -> Iterator[_Path]:
    origin = room.origin
    try:
        parts = SHAPES[element["kind"]](element, room.left)
        room.curves += sum(map(len, parts))
        opacity = _opacity(element.get("opacity", "1"), origin)
        fill, line = element.get("fill", "black"), element.get("stroke", "none")
        if fill != "none":
            require(len(parts) <= 1, origin, "a filled path of several parts", "filled paths of one part")
            alpha = opacity * _opacity(element.get("fill-opacity", "1"), origin)
            yield from (room.take(_Path(part, 0.0, (*_colour(fill, origin), alpha), True)) for part in parts)
        if line != "none":
            alpha = opacity * _opacity(element.get("stroke-opacity", "1"), origin)
            width = _length(element.get("stroke-width", "1"), origin)
            yield from (room.take(_Path(part, width, (*_colour(line, origin), alpha), False)) for part in parts)
    except (ValueError, LookupError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            origin, str(dict(element))[:LONGEST_ATTRIBUTE], f"an element that can be read ({error})"
        ) from error


def _opacity(text: str, origin: str) -> float:
    """A number or a percentage, limited to 0 to 1."""
    found = _matched(rf"({NUMBER})(%?)", text, origin, "an opacity of 0 to 1")
    if found is None:
        raise SettingError(origin, text, "an opacity of 0 to 1")
    return min(max(float(found[1]) / (100 if found[2] else 1), 0.0), 1.0)


def _colour(text: str, origin: str) -> Colour:
    """A name, ``#rgb``, ``#rrggbb`` or ``rgb(…)`` of numbers to 255 or of percentages: 0 to 1 each."""
    rgb = rf"rgb\(\s*({NUMBER})(%?)[\s,]+({NUMBER})(%?)[\s,]+({NUMBER})(%?)\s*\)"
    found = _matched(rgb, text, origin, "a colour")
    if found is not None:
        parts = [min(max(float(found[n]) / (100 if found[n + 1] else 255), 0.0), 1.0) for n in (1, 3, 5)]
        return parts[0], parts[1], parts[2]
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
    except ValueError as error:
        raise SettingError(origin, text, "a colour") from error
    require(alpha in ([], [255]), origin, text, "a colour without alpha, and an opacity")
    return red / 255, green / 255, blue / 255


def _path(element: Mapping[str, str], most: int) -> list[list[Curve]]:
    return curves_of(element.get("d", ""), most)


def _line(element: Mapping[str, str], most: int) -> list[list[Curve]]:
    if most < 1:
        raise ValueError(TOO_MANY)
    ends = [(float(element.get(f"x{n}", 0)), float(element.get(f"y{n}", 0))) for n in (1, 2)]
    return [[_straight(*ends)]]


def _polyline(element: Mapping[str, str], most: int) -> list[list[Curve]]:
    numbers = _numbers(element.get("points", ""), 2 * most + 4)
    if len(numbers) > 2 * most + 2:
        raise ValueError(TOO_MANY)
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    lines = [_straight(one, other) for one, other in zip(corners, corners[1:], strict=False)]
    return [lines] if lines else []


def _polygon(element: Mapping[str, str], most: int) -> list[list[Curve]]:
    return [[*lines, _straight(lines[-1][3], lines[0][0])] for lines in _polyline(element, most - 1)]


def _rect(element: Mapping[str, str], most: int) -> list[list[Curve]]:
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    right, bottom = x + float(element["width"]), y + float(element["height"])
    return _polygon({"points": f"{x} {y} {right} {y} {right} {bottom} {x} {bottom}"}, most)


SHAPES = {"path": _path, "line": _line, "polyline": _polyline, "polygon": _polygon, "rect": _rect}


def curves_of(data: str, most: int = MOST_CURVES) -> list[list[Curve]]:
    """The parts of a path's ``d``, each a list of cubic curves; straight and quadratic ones are raised, exactly.

    Raises:
        ValueError: a command or a sign that is not read, a missing number, or more than ``most`` commands.
    """
    parts: list[list[Curve]] = []
    here, begin, command, last = (0.0, 0.0), (0.0, 0.0), "", ""
    if strange := re.sub(r"[\s,]+", "", TOKENS.sub("", data)):
        raise ValueError(f"the sign {strange[0]}")
    tokens, count = (found[0] for found in TOKENS.finditer(data)), 0
    for token in tokens:
        numbers = []
        if token.isalpha():
            command = token
        elif command in "zZ":
            raise ValueError(f"a number after {command or 'nothing'}")
        else:
            numbers = [float(token)]
        kind = command.upper()
        if kind not in ARGUMENTS:
            raise ValueError(f"the command {command}")
        count += 1
        if count > most:
            raise ValueError(TOO_MANY)
        numbers += [float(one) for one in islice(tokens, ARGUMENTS[kind] - len(numbers))]
        if len(numbers) < ARGUMENTS[kind]:
            raise ValueError(f"a missing number of {command}")
        points = _points(kind, numbers, here, command.islower())
        if kind == "M":
            here = begin = points[0]
            parts.append([])
            command = "l" if command == "m" else "L"
        else:
            if kind == "Z":
                points = [begin]
                parts.append([]) if not parts else None
            before = parts[-1][-1] if parts and parts[-1] else None
            curve = _cubic(kind, here, points, before, last)
            here = curve[3]
            if kind != "Z" or curve[0] != curve[3]:
                parts[-1].append(curve)
        last = kind
    return [part for part in parts if part]


def _points(kind: str, numbers: Sequence[float], here: Point, relative: bool) -> list[Point]:
    x, y = here if relative else (0.0, 0.0)
    if kind == "H":
        return [(numbers[0] + x, here[1])]
    if kind == "V":
        return [(here[0], numbers[0] + y)]
    return [(a + x, b + y) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]


def _cubic(kind: str, here: Point, points: Sequence[Point], before: Curve | None, last: str) -> Curve:
    if kind == "C":
        return here, points[0], points[1], points[2]
    if kind == "S":
        return here, _mirrored(here, before[2] if before and last in "CS" else here), points[0], points[1]
    if kind == "Q":
        return _quadratic(here, *points)
    if kind == "T":
        middle = here if not before or last not in "QT" else _mirrored(here, _middle(before))
        return _quadratic(here, middle, points[0])
    return _straight(here, points[0])


def _mirrored(here: Point, point: Point) -> Point:
    return 2 * here[0] - point[0], 2 * here[1] - point[1]


def _middle(curve: Curve) -> Point:
    """The middle point of the quadratic curve that became this cubic one."""
    (_, _, other, end) = curve
    return (3 * other[0] - end[0]) / 2, (3 * other[1] - end[1]) / 2


def _quadratic(start: Point, middle: Point, end: Point) -> Curve:
    one, other = (tuple(p + 2 / 3 * (m - p) for p, m in zip(point, middle, strict=True)) for point in (start, end))
    return start, (one[0], one[1]), (other[0], other[1]), end


def _straight(start: Point, end: Point) -> Curve:
    one, other = (tuple(a + part * (b - a) for a, b in zip(start, end, strict=True)) for part in (1 / 3, 2 / 3))
    return start, (one[0], one[1]), (other[0], other[1]), end
