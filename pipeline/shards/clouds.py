"""Point clouds and meshes as files: ``.npy`` arrays, PLY (ASCII and binary, both byte orders) and OFF.

Bodies are hostile: headers are read within a fixed length, counts are compared with the length of the body before
anything is allocated, and arrays of Python objects are refused, so nothing is unpickled. Texts and polygons are read
piece by piece, since their Python objects take up to a hundred times their bytes. Colours, normals and other values of
a point are not read. Coordinates keep the units of their file.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SampleError

MOST_POINTS = 4_000_000
"""Points and faces of a file, at most."""
LONGEST_HEADER = 1 << 16
LONGEST_LINE = 1 << 18
"""Bytes of a line of an OFF file."""
LONGEST_NUMBER = 40  # characters
LONGEST_ROW = 1 << 20
"""Bytes of a row of a PLY file, where rows are read together."""
PIECE = 1 << 14
"""Bytes of a text that are split into words at once."""
ROWS = 1 << 8
"""Rows of a file that are Python objects at once."""
LARGEST_ROUNDING = 1 / 256
"""Error of a coordinate in float32, as a part of the longest side of the cloud: half a pixel of a view or less."""
NPY = b"\x93NUMPY"
SURFACE = 2_048
"""Points on the faces of a mesh; the number of ModelNet40's published clouds."""

Points = NDArray[np.float32]
Faces = NDArray[np.int64]
_OFF = re.compile(rb"(ST)?C?N?OFF")
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_PLY_COUNTS = {name: kind for name, kind in _PLY_TYPES.items() if kind[0] != "f"}
_CORNERS = ("vertex_indices", "vertex_index")
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class Cloud(NamedTuple):
    """``points``: float32 [N, 3], N at least 1, all finite; ``faces``: triangles as point numbers, int64 [F, 3]."""

    points: Points
    faces: Faces


def kind_of(start: bytes) -> str:
    """The kind by the first bytes (16 or more): npy, ply, off; "" for others.

    >>> kind_of(b"ply\\nformat ascii 1"), kind_of(b"OFF490 518 0\\n12"), kind_of(b"<html>")
    ('ply', 'off', '')
    """
    if start.startswith(NPY):
        return "npy"
    if start.startswith((b"ply\n", b"ply\r")):
        return "ply"
    return "off" if _OFF.match(start) else ""


def read_cloud(body: bytes) -> Cloud:
    """Decode a file.

    Raises:
        SampleError: error classes empty, not_a_cloud, bad_header, truncated, too_many, bad_faces, not_finite, too_far.
    """
    if not body:
        bad_cloud("empty", "empty body")
    kind = kind_of(body[:16])
    if not kind:
        bad_cloud("not_a_cloud", "not a point cloud of a known kind")
    with np.errstate(all="ignore"):  # what does not fit float32 becomes infinite, and is refused below
        wide, faces = {"npy": _read_npy, "ply": _read_ply, "off": _read_off}[kind](body)
        points = np.ascontiguousarray(wide, np.float32)
    if not len(points):
        bad_cloud("empty", "no points")
    if not np.isfinite(points).all():
        bad_cloud("not_finite", "coordinates that are not finite")
    check_rounding(wide, points)
    if len(faces) and not (0 <= faces.min() and faces.max() < len(points)):
        bad_cloud("bad_faces", "faces with corners that do not exist")
    return Cloud(points, faces)


def cloud_points(body: bytes, surface: int = SURFACE, bits: np.random.Philox | None = None) -> Points:
    """The points of a cloud; of a mesh ``surface`` points on its faces, chosen by the content. float32 [N, 3].

    ``bits`` are those of :func:`random_of`, for a caller that takes more of them; ``None`` makes them.

    Raises:
        SampleError: as :func:`read_cloud`; no_extent.
    """
    cloud = read_cloud(body)
    check_extent(cloud.points)
    if not len(cloud.faces):
        return cloud.points
    return on_surface(cloud, surface, bits or random_of(body))


def extent_of(points: Points) -> float:
    """The largest distance of a point from the mean of all, in their units."""
    wide = points.astype(np.float64)
    return float(np.sqrt(np.square(wide - wide.mean(axis=0)).sum(axis=1).max()))


def check_extent(points: Points) -> None:
    """Raise ``SampleError`` with the class no_extent for one point, or points that are all in one place: within a
    millionth of their coordinates."""
    size = float(np.abs(points.astype(np.float64)).max())
    if not extent_of(points) > 1e-6 * size:  # less than float32 resolves
        bad_cloud("no_extent", "one point, or all points in one place or within a millionth of their coordinates")


def check_rounding(wide: NDArray[Any], points: Points) -> None:
    """Raise ``SampleError`` with the class too_far where ``points``, the finite coordinates ``wide`` as float32, differ
    from them by more than ``LARGEST_ROUNDING`` of the longest side of their box."""
    if np.can_cast(wide.dtype, np.float32):
        return
    low, high = wide.min(axis=0).astype(np.float64), wide.max(axis=0).astype(np.float64)
    side, size = float((high - low).max()), float(np.abs([low, high]).max())
    limit = LARGEST_ROUNDING * side
    if not side > 1e-12 * size or np.spacing(np.float32(size)) <= limit:
        return
    if float(np.abs(wide - points.astype(np.float64)).max()) > limit:
        bad_cloud("too_far", "so far from the origin that float32 cannot resolve it; subtract its mean first")


def random_of(body: bytes) -> np.random.Philox:
    """Random bits that are a pure function of the content.

    Choices about one body take them from one generator, in turn: two generators give the same bits twice.
    """
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(body).digest()[:16], "little"))


def on_surface(cloud: Cloud, count: int, bits: np.random.Philox) -> Points:
    """``count`` random points on the faces of a mesh, uniform by area: float32 [count, 3].

    Raises:
        SampleError: no_extent: the faces have no area.
    """
    corners = cloud.points.astype(np.float64)[cloud.faces]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.linalg.norm(np.cross(first, second), axis=1)
    ends = np.cumsum(areas)
    if not ends[-1] > 0:
        bad_cloud("no_extent", "faces without an area")
    # Only the raw bits are the same in every version of numpy.
    raw = (bits.random_raw(3 * count) >> np.uint64(11)).reshape(3, count).astype(np.float64) * 2.0**-53
    chosen = np.minimum(np.searchsorted(ends, raw[0] * ends[-1], side="right"), len(ends) - 1)
    inside = raw[1] + raw[2] > 1
    along = np.where(inside, 1 - raw[1], raw[1])[:, None]
    across = np.where(inside, 1 - raw[2], raw[2])[:, None]
    found: Points = (corners[chosen, 0] + along * first[chosen] + across * second[chosen]).astype(np.float32)
    return found


def subset(points: Points, count: int, bits: np.random.Philox) -> Points:
    """``count`` random ones of the points in their order; all of them where there are no more."""
    if count >= len(points):
        return points
    chosen = np.argsort(bits.random_raw(len(points)), kind="stable")[:count]
    return points[np.sort(chosen)]


def write_npy(points: Points) -> bytes:
    """float32 [N, 3] as a ``.npy`` file."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(points, "<f4"), allow_pickle=False)
    return content.getvalue()


def bad_cloud(error_class: str, message: str) -> NoReturn:
    """Raise ``SampleError`` for a body that is no cloud."""
    raise SampleError("failed_to_resize", error_class, message)


def _check_count(count: int, least_bytes: int, length: int) -> None:
    if count > MOST_POINTS:
        bad_cloud("too_many", f"more than {MOST_POINTS:,} points or faces")
    if count < 0:
        bad_cloud("bad_header", "a negative count")
    if least_bytes > length:
        bad_cloud("truncated", "the file is shorter than its header states")


def _no_faces() -> Faces:
    return np.zeros((0, 3), np.int64)


def _read_npy(body: bytes) -> tuple[NDArray[Any], Faces]:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=10_000)
    except Exception as error:  # the sample boundary: numpy parses the header as Python, with any exception
        raise SampleError("failed_to_resize", "bad_header", "a damaged .npy header") from error
    if dtype.kind not in "fiu":
        bad_cloud("not_a_cloud", "an array that is not of numbers")
    if len(shape) != 2 or shape[1] < 3 or shape[1] > 64:
        bad_cloud("not_a_cloud", "an array whose shape is not [N, 3 or more]")
    count, width = shape
    _check_count(count, count * width * dtype.itemsize, len(body) - file.tell())
    values = np.frombuffer(body, dtype, count * width, file.tell())
    return values.reshape(shape, order="F" if fortran else "C")[:, :3], _no_faces()


@dataclass(frozen=True)
class _Property:
    """A value of a PLY element; a list where ``length`` is the type of its length."""

    name: str
    kind: str
    length: str = ""


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    properties: tuple[_Property, ...]

    def find(self, *names: str, listed: bool = False) -> list[int]:
        """Positions of the properties with these names, lists or single values, in the order of the names."""
        known = {one.name: place for place, one in enumerate(self.properties) if bool(one.length) == listed}
        return [known[name] for name in names if name in known]


def _read_ply(body: bytes) -> tuple[NDArray[Any], Faces]:
    end = re.search(rb"^end_header[ \t]*\r?\n", body[:LONGEST_HEADER], re.MULTILINE)
    if end is None:
        bad_cloud("bad_header", "a PLY header without an end")
    order, elements = _ply_header(body[: end.start()])
    for one in elements:
        _check_count(one.count, one.count * len(one.properties), len(body) - end.end())
    content = body[end.end() :]
    reader: _AsciiPly | _BinaryPly = _BinaryPly(content, order) if order else _AsciiPly(content)
    points: NDArray[Any] | None = None
    faces = _no_faces()
    for one in elements:
        axes, corners = one.find("x", "y", "z"), one.find(*_CORNERS, listed=True)[:1]
        if one.name == "vertex" and len(axes) == 3:
            points = _stacked(_blocks(reader, one, axes))
        elif one.name == "face" and corners:
            faces = _triangles(polygons for (polygons,) in _blocks(reader, one, corners))
        elif one.name == "face" and one.count and any(each.length for each in one.properties):
            bad_cloud("bad_faces", f"faces without a list {' or '.join(_CORNERS)}")
        else:
            for _ in _blocks(reader, one, []):
                pass
    if points is None:
        bad_cloud("not_a_cloud", "a PLY file without x, y and z of a vertex")
    return points, faces


def _blocks(reader: "_AsciiPly | _BinaryPly", one: _Element, wanted: list[int]) -> Iterator[list[NDArray[Any]]]:
    """The ``wanted`` properties of some rows of an element at a time: arrays [rows], of a list [rows, length]."""
    rows = reader.alike(one) if one.count else None
    if rows is not None:
        yield [rows[place] for place in wanted]
        return
    for _ in range(one.count):
        row = reader.row(one)
        yield [row[place] for place in wanted]


def _stacked(blocks: Iterable[list[NDArray[Any]]]) -> NDArray[Any]:
    """Blocks of three arrays [rows] as one array [N, 3]."""
    parts, rest = [], iter(blocks)
    while some := list(islice(rest, ROWS)):
        parts.append(np.concatenate([np.stack(block, axis=1) for block in some]))
    return np.concatenate(parts or [np.zeros((0, 3))])


def _ply_header(head: bytes) -> tuple[str, list[_Element]]:
    """The byte order ("" for ASCII) and the elements."""
    order: str | None = None
    elements: list[_Element] = []
    try:
        for line in head.decode("ascii", errors="replace").splitlines()[1:]:
            words = line.split()
            if not words or words[0] in ("comment", "obj_info"):
                continue
            if words[0] == "format":
                order = _ORDERS[words[1]]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2]), ()))
            elif words[0] == "property":
                last = elements.pop()
                listed = words[1] == "list"
                kind, length = (words[3], words[2]) if listed else (words[1], "")
                made = _Property(words[-1], _PLY_TYPES[kind], _PLY_COUNTS[length] if listed else "")
                elements.append(_Element(last.name, last.count, (*last.properties, made)))
    except (LookupError, ValueError) as error:
        raise SampleError("failed_to_resize", "bad_header", "a damaged PLY header") from error
    if order is None or not elements:
        bad_cloud("bad_header", "a PLY header without a format or elements")
    return order, elements


class _BinaryPly:
    """Reads the elements of a binary file in turn."""

    def __init__(self, content: bytes, order: str) -> None:
        self._content, self._order, self._at = content, order, 0

    def alike(self, one: _Element) -> list[NDArray[Any]] | None:
        """All rows, an array for each property, where their lists are as long as those of the first row; else None."""
        fields: list[tuple[str, str, tuple[int, ...]]] = []
        at = self._at
        for place, each in enumerate(one.properties):
            length = 1
            if each.length:
                size = np.dtype(each.length).itemsize
                if at + size > len(self._content):
                    return None
                length = int(np.frombuffer(self._content, self._order + each.length, 1, at)[0])
                fields.append((f"length {place}", self._order + each.length, ()))
                at += size
            at += length * np.dtype(each.kind).itemsize
            if length < 0 or at - self._at > LONGEST_ROW:
                return None
            fields.append((str(place), self._order + each.kind, (length,) if each.length else ()))
        row = np.dtype(fields)
        lists = [place for place, each in enumerate(one.properties) if each.length]
        if lists and self._at + row.itemsize * one.count > len(self._content):
            return None
        rows = np.frombuffer(self._content, row, self._room(row.itemsize, one.count), self._at) if fields else None
        if rows is not None and any((rows[f"length {place}"] != rows[str(place)].shape[1]).any() for place in lists):
            return None
        self._at += row.itemsize * one.count
        return [] if rows is None else [rows[str(place)] for place in range(len(one.properties))]

    def row(self, one: _Element) -> list[NDArray[Any]]:
        """The next row, an array [1] for each property, of a list [1, length]."""
        found = []
        for each in one.properties:
            length = int(self._take(each.length, 1)[0]) if each.length else 1
            values = self._take(each.kind, length)
            found.append(values[None] if each.length else values)
        return found

    def _take(self, kind: str, count: int) -> NDArray[Any]:
        size = np.dtype(kind).itemsize
        values = np.frombuffer(self._content, self._order + kind, self._room(size, count), self._at)
        self._at += size * count
        return values

    def _room(self, size: int, count: int) -> int:
        """``count``, if as many values of ``size`` bytes are left."""
        _check_count(count, size * count, len(self._content) - self._at)
        return count


class _AsciiPly:
    """Reads the elements of an ASCII file in turn, as :class:`_BinaryPly`."""

    def __init__(self, content: bytes) -> None:
        self._values, self._at = _numbers_of_text(content), 0

    def alike(self, one: _Element) -> list[NDArray[Any]] | None:
        places: list[tuple[int, int | None]] = []
        """Where a property begins in a row, and its length if it is a list."""
        width = 0
        for each in one.properties:
            length = None
            if each.length:
                if self._at + width >= len(self._values):
                    return None
                length = _whole(self._values[self._at + width])
                width += 1
            places.append((width, length))
            width += 1 if length is None else length
        lists = [(start, length) for start, length in places if length is not None]
        if lists and self._at + width * one.count > len(self._values):
            return None
        _check_count(one.count, width * one.count, len(self._values) - self._at)
        rows = self._values[self._at : self._at + width * one.count].reshape(one.count, width)
        if any((rows[:, start - 1] != length).any() for start, length in lists):
            return None
        self._at += rows.size
        return [rows[:, start] if length is None else rows[:, start : start + length] for start, length in places]

    def row(self, one: _Element) -> list[NDArray[Any]]:
        found = []
        for each in one.properties:
            length = _whole(self._take(1)[0]) if each.length else 1
            values = self._take(length)
            found.append(values[None] if each.length else values)
        return found

    def _take(self, count: int) -> NDArray[np.float64]:
        _check_count(count, count, len(self._values) - self._at)
        self._at += count
        return self._values[self._at - count : self._at]


def _triangles(polygons: Iterable[NDArray[Any]]) -> Faces:
    """Fans of triangles, int64 [F, 3]; an array is a polygon [corners], or several [N, corners]."""
    parts, count, rows = [_no_faces()], 0, iter(polygons)
    while some := list(islice(rows, ROWS)):
        parts.append(np.concatenate([_fan(polygon) for polygon in some]))
        count += len(parts[-1])
        _check_count(count, 0, 0)
    return np.concatenate(parts)


def _fan(polygons: NDArray[Any]) -> Faces:
    corners = np.atleast_2d(np.asarray(polygons, np.float64))
    if not np.isfinite(corners).all() or (np.abs(corners) > MOST_POINTS).any():
        bad_cloud("bad_faces", "faces with corners that do not exist")
    whole = corners.astype(np.int64)
    if (whole != corners).any():
        bad_cloud("bad_faces", "corners that are no whole numbers")
    second, third = whole[:, 1:-1], whole[:, 2:]
    return np.stack([np.broadcast_to(whole[:, :1], second.shape), second, third], axis=-1).reshape(-1, 3)


def _read_off(body: bytes) -> tuple[NDArray[Any], Faces]:
    """Comments begin with ``#``; the counts may follow the word OFF without a space, as in files of ModelNet40."""
    head = _OFF.match(body)
    assert head is not None
    rows = _rows(body[head.end() :])
    counts = next(rows, [])
    if len(counts) < 2:
        bad_cloud("bad_header", "an OFF file without counts")
    count, faces = (_whole(value) for value in _numbers(counts[:2]))
    _check_count(count, count, len(body))
    _check_count(faces, count + faces, len(body))
    points = [np.zeros((0, 3))]
    for some in _taken(rows, count):
        if any(len(row) < 3 for row in some):
            bad_cloud("truncated", "a point with fewer than three coordinates")
        points.append(_numbers([word for row in some for word in row[:3]]).reshape(-1, 3))
    return np.concatenate(points), _triangles(polygon for some in _taken(rows, faces) for polygon in _polygons(some))


def _rows(text: bytes) -> Iterator[list[bytes]]:
    """The words of each line that has some before a comment."""
    for piece in _pieces(text, rb"\r\n"):
        for line in piece.splitlines():
            if len(line) > LONGEST_LINE:
                bad_cloud("too_many", f"a line of more than {LONGEST_LINE:,} bytes")
            if words := line.partition(b"#")[0].split():
                yield words


def _taken(rows: Iterator[list[bytes]], count: int) -> Iterator[list[list[bytes]]]:
    """The next ``count`` rows, some at a time."""
    while count:
        some = list(islice(rows, min(count, ROWS)))
        if not some:
            bad_cloud("truncated", "the file is shorter than its header states")
        count -= len(some)
        yield some


def _polygons(rows: list[list[bytes]]) -> Iterator[NDArray[Any]]:
    """The corners of an OFF file's faces, an array for each row, or one array [N, corners] for all."""
    polygons = []
    for row, length in zip(rows, _numbers([row[0] for row in rows]), strict=True):
        if _whole(length) > len(row) - 1:
            bad_cloud("truncated", "a face with fewer corners than it states")
        polygons.append(row[1 : 1 + int(length)])
    if all(len(polygon) == len(polygons[0]) for polygon in polygons):
        yield _numbers([word for polygon in polygons for word in polygon]).reshape(len(polygons), -1)
    else:
        yield from map(_numbers, polygons)


def _pieces(text: bytes, ends: bytes) -> Iterator[bytes]:
    """Pieces of about ``PIECE`` bytes that end behind one of the bytes ``ends``."""
    start, border = 0, re.compile(b"[" + ends + b"]")
    while start < len(text):
        found = border.search(text, start + PIECE)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


def _numbers_of_text(text: bytes) -> NDArray[np.float64]:
    """All numbers of a text, float64 [N]."""
    return np.concatenate([np.zeros(0), *(_numbers(piece.split()) for piece in _pieces(text, rb"\s"))])


def _numbers(words: list[bytes]) -> NDArray[np.float64]:
    """Numbers as text to float64."""
    if not words:
        return np.zeros(0)
    if max(map(len, words)) > LONGEST_NUMBER:  # numpy's array of texts has rows of the longest one
        bad_cloud("bad_number", "text that is no number")
    try:
        return np.array(words, dtype=np.bytes_).astype(np.float64)
    except ValueError as error:
        raise SampleError("failed_to_resize", "bad_number", "text that is no number") from error


def _whole(value: float) -> int:
    if not np.isfinite(value) or value != int(value) or value < 0:
        bad_cloud("bad_number", "a count that is no whole number")
    return int(value)
