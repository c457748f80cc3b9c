"""Files of point clouds: each format against numpy, meshes by area, and hostile bodies."""

import io
import struct
import tracemalloc

import numpy as np
import pytest

from pipeline.errors import SampleError
from pipeline.shards.clouds import (
    Cloud,
    cloud_points,
    extent_of,
    kind_of,
    on_surface,
    random_of,
    read_cloud,
    subset,
    write_npy,
)

POINTS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.5]], np.float32)
FACES = np.array([[0, 1, 2], [0, 1, 3]])


FAR = np.array([500_000.3, 5_300_000.3, 400.3])
"""An origin in UTM coordinates, in metres."""


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def ply(order: str, points: np.ndarray = POINTS, faces: np.ndarray | None = None, kind: str = "float") -> bytes:
    """A PLY with a colour of each point, and faces as triangles."""
    words = {"": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[order]
    head = f"ply\nformat {words} 1.0\ncomment made here\nelement vertex {len(points)}\n"
    head += "".join(f"property {kind} {axis}\n" for axis in "xyz") + "property uchar red\n"
    if faces is not None:
        head += f"element face {len(faces)}\nproperty list uchar int vertex_indices\n"
    body = (head + "end_header\n").encode()
    letter = {"float": "f", "double": "d"}[kind]
    for row in points.tolist():
        body += b"%r %r %r 7\n" % tuple(row) if not order else struct.pack(f"{order}3{letter}B", *row, 7)
    for row in [] if faces is None else faces.tolist():
        line = (" ".join(map(str, [len(row), *row])) + "\n").encode()
        body += line if not order else struct.pack(f"{order}B{len(row)}i", len(row), *row)
    return body


@pytest.mark.parametrize("order", ["", "<", ">"])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_ply_in_both_byte_orders_and_as_text(order: str, kind: str) -> None:
    cloud = read_cloud(ply(order, kind=kind))
    assert cloud.points.dtype == np.float32 and not len(cloud.faces)
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(read_cloud(ply(order, kind=kind, faces=FACES)).faces, FACES)


@pytest.mark.parametrize("order", ["", "<", ">"])
def test_polygons_become_fans(order: str) -> None:
    head = ply(order).replace(b"end_header\n", b"element face 2\nproperty list uchar short vertex_index\nend_header\n")
    square, triangle = ([4, 0, 1, 2, 3], [3, 1, 2, 3])
    if order:
        tail = struct.pack(f"{order}B4h", *square) + struct.pack(f"{order}B3h", *triangle)
    else:
        tail = b"4 0 1 2 3\n3 1 2 3\n"
    assert read_cloud(head + tail).faces.tolist() == [[0, 1, 2], [0, 2, 3], [1, 2, 3]]


def test_elements_before_the_points_are_skipped() -> None:
    body = b"ply\nformat ascii 1.0\nelement camera 1\nproperty list uchar float view\nproperty float far\n"
    body += (
        b"element vertex 2\nproperty float z\nproperty float y\nproperty float x\nend_header\n2 9 9 1\n3 2 1 6 5 4\n"
    )
    assert read_cloud(body).points.tolist() == [[1, 2, 3], [4, 5, 6]]


LETTERS = {"uchar": "B", "int": "i", "float": "f"}


def elements(order: str, *parts: tuple[str, list[str], list[list[object]]]) -> bytes:
    """A PLY of elements: name, properties, and rows whose lists are Python lists."""
    head = "ply\nformat " + {"": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[order] + " 1.0\n"
    body = b""
    for name, properties, rows in parts:
        head += f"element {name} {len(rows)}\n" + "".join(f"property {one}\n" for one in properties)
        for row in rows:
            for each, value in zip(properties, row, strict=True):
                letter = LETTERS[each.split()[-2]]
                values = value if isinstance(value, list) else [value]
                length = [len(value)] if isinstance(value, list) else []
                if order:
                    body += struct.pack(f"{order}{'B' * len(length)}{len(values)}{letter}", *length, *values)
                else:
                    body += " ".join(map(str, [*length, *values, ""])).encode()
    return (head + "end_header\n").encode() + body + (b"" if order else b"\n")


AXES = ["float x", "float y", "float z"]
VERTICES: list[list[object]] = POINTS.tolist()
CORNERS = "list uchar int vertex_indices"


@pytest.mark.parametrize("order", ["", "<", ">"])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_faces_are_the_corners_and_nothing_else(order: str, even: bool) -> None:
    """Texture coordinates before the corners, as many of each row or not; and lists of another element."""
    rows: list[list[object]] = [[[0.5] * 6, 9, [0, 1, 2]], [[0.5] * (6 if even else 4), 9, [0, 1, 3]]]
    face = ("face", ["list uchar float texcoord", "uchar red", CORNERS], rows)
    strips = ("tristrips", ["list uchar int vertex_indices"], [[[0, 1, 2, 3]], [[7] * (4 if even else 9)]])
    cloud = read_cloud(elements(order, strips, ("vertex", AXES, VERTICES), face, strips))
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.faces.tolist() == FACES.tolist()


@pytest.mark.parametrize("order", ["", "<", ">"])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_points_may_have_a_list(order: str, even: bool) -> None:
    rows: list[list[object]] = [[x, [5] * (2 if even else place), y, z] for place, (x, y, z) in enumerate(VERTICES)]
    vertex = ("vertex", ["float x", "list uchar int seen_by", "float y", "float z"], rows)
    cloud = read_cloud(elements(order, vertex, ("face", [CORNERS], [[[0, 1, 2]]])))
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("order", ["", "<", ">"])
def test_elements_may_be_without_rows_or_properties(order: str) -> None:
    empty: list[list[object]] = []
    parts = (("face", ["list uchar float texcoord"], empty), ("face", [CORNERS], empty), ("material", [], [[], []]))
    cloud = read_cloud(elements(order, *parts, ("vertex", AXES, VERTICES)))
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert not len(cloud.faces)
    with pytest.raises(SampleError, match="no points"):
        read_cloud(elements(order, ("vertex", AXES, empty), parts[1]))


@pytest.mark.parametrize("order", ["", "<", ">"])
def test_a_header_ends_at_the_start_of_a_line(order: str) -> None:
    body = ply(order).replace(b"comment made here", b"comment see end_header\ncomment end_header")
    np.testing.assert_array_equal(read_cloud(body).points, POINTS)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "<i4", "u1"])
def test_arrays_of_any_number(dtype: str) -> None:
    whole = np.arange(24).reshape(4, 6).astype(dtype)
    for array in (whole, np.asfortranarray(whole)):
        np.testing.assert_array_equal(read_cloud(npy(array)).points, np.arange(24).reshape(4, 6)[:, :3])
    assert read_cloud(write_npy(POINTS)).points.tobytes() == POINTS.tobytes()


@pytest.mark.parametrize("head", [b"OFF\n4 2 0\n", b"OFF4 2 0\n", b"OFF # words\n\n4 2 0 # counts\n", b"COFF\n4 2 0\n"])
def test_off_with_its_quirks(head: bytes) -> None:
    rows = b"".join(b"%r %r %r\n" % tuple(row) for row in POINTS.tolist())
    if head.startswith(b"C"):
        rows = rows.replace(b"\n", b" 255 0 0 255\n")
    cloud = read_cloud(head + rows + b"3 0 1 2 255 0 0\n3 0 1 3\n")
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.faces.tolist() == FACES.tolist()


def test_points_on_a_mesh_are_uniform_by_area_and_the_same_for_the_same_file() -> None:
    body = ply("<", faces=FACES)
    points = cloud_points(body, surface=8_000)
    np.testing.assert_array_equal(points, cloud_points(body, surface=8_000))
    # The triangles have areas 1 and 1.75: one in z = 0, one in y = 0.
    share = float((points[:, 2] == 0).mean())
    assert share == pytest.approx(1 / 2.75, abs=0.02)
    flat = points[points[:, 2] == 0]
    assert (flat[:, 0] + flat[:, 1] / 2 <= 1 + 1e-6).all() and (flat >= 0).all()
    np.testing.assert_allclose(flat[:, :2].mean(axis=0), [1 / 3, 2 / 3], atol=0.03)
    assert not np.array_equal(points, cloud_points(ply(">", faces=FACES), surface=8_000))


def test_faces_without_area_are_never_chosen() -> None:
    faces = np.array([[0, 1, 1], [0, 1, 2], [3, 3, 3]])
    found = on_surface(Cloud(POINTS, faces), 500, random_of(b"x"))
    assert (found[:, 2] == 0).all()
    with pytest.raises(SampleError, match="without an area"):
        on_surface(Cloud(POINTS, faces[:1]), 5, random_of(b"x"))


def test_a_subset_keeps_the_order() -> None:
    points = np.arange(300, dtype=np.float32).reshape(100, 3)
    few = subset(points, 10, random_of(b"a"))
    assert len(few) == 10 and (np.diff(few[:, 0]) > 0).all() and set(few[:, 0]) <= set(points[:, 0])
    np.testing.assert_array_equal(few, subset(points, 10, random_of(b"a")))
    assert subset(points, 200, random_of(b"a")) is points


def test_extent_is_the_largest_distance_from_the_mean() -> None:
    assert extent_of(np.array([[0, 0, 0], [0, 0, 2], [0, 0, 4]], np.float32)) == 2


def test_large_coordinates_that_float32_resolves_are_kept() -> None:
    """A town in UTM; and whole numbers, which float32 has exactly up to 2 ** 24."""
    town = FAR + 1_000 * POINTS.astype(np.float64)
    np.testing.assert_allclose(read_cloud(npy(town)).points, town, atol=0.25)
    cells = (POINTS * 2).astype(np.int32) + 10**6
    np.testing.assert_array_equal(read_cloud(npy(cells)).points, cells)


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


HOSTILE = {
    "empty": (b"", "empty"),
    "html": (b"<html><body></body></html>", "not_a_cloud"),
    "a pickle": (npy(np.array([{"a": 1}] * 3, dtype=object)), "not_a_cloud"),
    "a bare pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94", "not_a_cloud"),
    "texts": (npy(np.array([["a", "b", "c"]])), "not_a_cloud"),
    "complex": (npy(np.ones((3, 3), np.complex64)), "not_a_cloud"),
    "fields": (npy(np.zeros((2, 3), [("x", "f4")])), "not_a_cloud"),
    "one axis": (npy(np.zeros(9, np.float32)), "not_a_cloud"),
    "two coordinates": (npy(np.zeros((9, 2), np.float32)), "not_a_cloud"),
    "wide": (npy(np.zeros((2, 100), np.float32)), "not_a_cloud"),
    "no points": (npy(np.zeros((0, 3), np.float32)), "empty"),
    "a huge array": (header("(99999999999, 3)") + bytes(64), "too_many"),
    "a negative array": (header("(-1, 3)") + bytes(64), "bad_header"),
    "a truncated array": (npy(POINTS)[:-1], "truncated"),
    "a truncated header": (npy(POINTS)[:20], "bad_header"),
    "a header of code": (header("(__import__('os'), 3)"), "bad_header"),
    "a deep header": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9_000) + b"(" * 9_000, "bad_header"),
    "a long header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), "bad_header"),
    "version 9": (b"\x93NUMPY\x09\x00" + bytes(64), "bad_header"),
    "NaN": (npy(np.array([[np.nan, 0, 0], [1, 1, 1]], np.float32)), "not_finite"),
    "beyond float32": (npy(np.array([[1e300, 0, 0], [1, 1, 1]])), "not_finite"),
    "PLY without an end": (b"ply\nformat ascii 1.0\n" + b"comment x\n" * 20_000, "bad_header"),
    "PLY without a format": (b"ply\nelement vertex 1\nproperty float x\nend_header\n1\n", "bad_header"),
    "PLY of another format": (b"ply\nformat zip 1.0\nelement vertex 1\nend_header\n", "bad_header"),
    "PLY of unknown type": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty text x\nend_header\n1\n", "bad_header"),
    "PLY with a length that is no whole number": (
        ply("<", faces=FACES).replace(b"list uchar", b"list float"),
        "bad_header",
    ),
    "PLY without an element": (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "bad_header"),
    "PLY with a huge count": (ply("<").replace(b"vertex 4", b"vertex 99999999999"), "too_many"),
    "PLY with a count beyond its end": (ply("<").replace(b"vertex 4", b"vertex 400"), "truncated"),
    "PLY with a negative count": (ply("<").replace(b"vertex 4", b"vertex -4"), "bad_header"),
    "PLY with a broken count": (ply("<").replace(b"vertex 4", b"vertex x"), "bad_header"),
    "a truncated PLY": (ply(">")[:-1], "truncated"),
    "a truncated PLY of text": (ply("")[:-4], "truncated"),
    "a truncated face": (ply("<", faces=FACES)[:-1], "truncated"),
    "PLY with words": (ply("").replace(b"3.5", b"far"), "bad_number"),
    "PLY with a long number": (ply("").replace(b"3.5", b"1" * 10_000), "bad_number"),
    "PLY without z": (ply("").replace(b"property float z", b"property float w"), "not_a_cloud"),
    "a face without its corner": (ply("<", faces=np.array([[0, 1, 9]])), "bad_faces"),
    "a face with a negative corner": (ply("", faces=np.array([[0, 1, -1]])), "bad_faces"),
    "corners that are fractions": (
        elements("<", ("vertex", AXES, VERTICES), ("face", ["list uchar float vertex_index"], [[[0, 1, 1.5]]])),
        "bad_faces",
    ),
    "corners that are fractions, as text": (
        ply("", faces=FACES).replace(b"3 0 1 3", b"3 0 1 2.5"),
        "bad_faces",
    ),
    "corners of another name": (
        ply("", faces=FACES).replace(b"vertex_indices", b"texcoord"),
        "bad_faces",
    ),
    "OFF with corners that are fractions": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 1.5\n", "bad_faces"),
    "OFF without counts": (b"OFF\n", "bad_header"),
    "OFF with huge counts": (b"OFF\n99999999999 1 0\n0 0 0\n", "too_many"),
    "OFF with fractions": (b"OFF\n1.5 0 0\n0 0 0\n0 0 0\n", "bad_number"),
    "a truncated OFF": (b"OFF\n4 1 0\n0 0 0\n1 0 0\n", "truncated"),
    "OFF with a short row": (b"OFF\n2 0 0\n0 0\n1 0 0\n", "truncated"),
    "OFF with a short face": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n4 0 1 2\n", "truncated"),
    "OFF with an endless line": (b"OFF\n1 1 0\n0 0 0\n200000" + b" 0" * 200_000, "too_many"),
    "an object of 3 m in UTM": (npy(FAR + 3 * POINTS.astype(np.float64)), "too_far"),
    "an object of 3 m in UTM, as PLY": (ply("<", FAR + POINTS.astype(np.float64), kind="double"), "too_far"),
    "an object of 3 m in UTM, as text": (ply("", FAR + POINTS.astype(np.float64)), "too_far"),
    "whole numbers beyond float32": (npy((POINTS * 10).astype(np.int64) + 10**12), "too_far"),
    "one place, not a number of float32": (npy(np.full((50, 3), 0.1)), "no_extent"),
    "one point": (npy(np.ones((1, 3), np.float32)), "no_extent"),
    "one place": (npy(np.full((50, 3), 3e5, np.float32)), "no_extent"),
    "a flat mesh of no area": (ply("<", faces=np.array([[0, 0, 1]])), "no_extent"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_fail_with_a_reason(name: str) -> None:
    body, error_class = HOSTILE[name]
    with pytest.raises(SampleError) as caught:
        cloud_points(body)
    assert caught.value.error_class == error_class, caught.value.message


MESHES = 8_000


def mesh(kind: str, corners: list[int]) -> bytes:
    """A mesh of points of short numbers, and as many faces with these numbers of corners in turn."""
    lengths = [corners[number % len(corners)] for number in range(MESHES)]
    polygons = [[length, *range(length)] for length in lengths]
    head = b"OFF\n%d %d 0\n" % (MESHES, MESHES)
    points = b"".join(b"%d %d 1 7\n" % (number % 9, number % 7) for number in range(MESHES))
    if kind != "off":
        head = ply(kind)[: ply(kind).index(b"end_header")].replace(b"vertex 4", b"vertex %d" % MESHES)
        head += b"element face %d\nproperty list uchar uchar vertex_indices\nend_header\n" % MESHES
    if kind == "<":
        return head + bytes(13 * MESHES) + b"".join(map(bytes, polygons))
    return head + points + b"".join(b" ".join(b"%d" % value for value in one) + b"\n" for one in polygons)


@pytest.mark.parametrize("kind", ["off", "", "<"])
@pytest.mark.parametrize("corners", [[3], [4], [3, 4], [0], [0, 1]])
def test_polygons_are_fans_in_every_file(kind: str, corners: list[int]) -> None:
    triangles = [[0, end - 1, end] for number in range(MESHES) for end in range(2, corners[number % len(corners)])]
    assert read_cloud(mesh(kind, corners)).faces.tolist() == triangles


@pytest.mark.parametrize("kind", ["off", "", "<"])
def test_memory_is_a_small_multiple_of_the_file(kind: str) -> None:
    """Words and polygons are Python objects of 50 bytes and more; a training process reads meshes without a limit."""
    body = mesh(kind, [0, 1])
    read_cloud(body)
    tracemalloc.start()
    read_cloud(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(body)


def test_damage_anywhere_gives_an_error_of_a_sample_or_a_cloud() -> None:
    random = np.random.default_rng(0)
    off = b"OFF\n4 2 0\n" + b"".join(b"%r %r %r\n" % tuple(row) for row in POINTS.tolist()) + b"3 0 1 2\n3 0 1 3\n"
    for whole in (npy(POINTS), ply("", faces=FACES), ply("<", faces=FACES), ply(">", faces=FACES), off):
        for _ in range(300):
            body = bytearray(whole)
            for place in random.integers(0, len(body), 3):
                body[place] = random.integers(256)
            try:
                points = cloud_points(bytes(body[: random.integers(1, len(body) + 1)]))
            except SampleError:
                continue
            assert points.dtype == np.float32 and points.shape[1] == 3 and np.isfinite(points).all()


def test_kinds() -> None:
    assert [kind_of(body[:16]) for body in (npy(POINTS), ply("<"), b"NOFF\n1 0 0\n0 0 0")] == ["npy", "ply", "off"]
    assert kind_of(b"OF") == kind_of(b"plywood is wood.") == ""
