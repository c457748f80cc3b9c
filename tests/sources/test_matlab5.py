"""Files of MATLAB 5 against scipy's writer, by hand, and hostile ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.sources.matlab5 import HEADER, LARGEST, whole_numbers

VALUES = np.array([[5], [1], [300]])


def saved(values: Any, packed: bool = False) -> bytes:
    content = io.BytesIO()
    savemat(content, {"first": np.array(["text"]), "wanted": values, "more": np.eye(2)}, do_compression=packed)
    return content.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_arrays_that_scipy_writes(kind: str, packed: bool) -> None:
    values = (VALUES % 200).astype(kind)
    for shaped in (values, values.T, values[:1]):  # one small number is within its tag
        assert whole_numbers(saved(shaped, packed), "wanted") == shaped.ravel().tolist()
    assert whole_numbers(saved(np.zeros((0, 1)), packed), "wanted") == []


def element(kind: int, body: bytes, order: str = "<", claimed: int | None = None) -> bytes:
    length = len(body) if claimed is None else claimed
    return struct.pack(f"{order}2I", kind, length) + body + bytes(-len(body) % 8)


def array(kind: int = 9, numbers: bytes = struct.pack("<d", 7), cls: int = 6, order: str = "<", **more: Any) -> bytes:
    """The element of an array of one number called wanted."""
    head = element(6, struct.pack(f"{order}2I", cls, 0), order) + element(5, struct.pack(f"{order}2i", 1, 1), order)
    return element(14, head + element(1, b"wanted", order) + element(kind, numbers, order, **more), order)


def file(body: bytes, order: str = "<") -> bytes:
    return b"MATLAB 5.0".ljust(124) + struct.pack(f"{order}2H", 0x0100, 0x4D49) + body


def test_both_byte_orders_by_hand() -> None:
    assert whole_numbers(file(array()), "wanted") == [7]
    assert whole_numbers(file(array(numbers=struct.pack(">d", 7), order=">"), ">"), "wanted") == [7]


HOSTILE = {
    "empty": b"",
    "a text": b"no file" * 40,
    "a short header": file(b"")[:100],
    "no arrays": file(b""),
    "another name": file(array().replace(b"wanted", b"unseen")),
    "a type that does not exist": file(array(kind=200)),
    "a cell array of 2,000,000,000": file(array(cls=1)),
    "letters": saved(np.array(["abc"])),
    "complex numbers": saved(np.array([1 + 2j])),
    "a sparse array": file(array(cls=5)),
    "NaN": saved(np.array([np.nan])),
    "infinity": saved(np.array([np.inf])),
    "fractions": saved(np.array([1.5])),
    "a length beyond the end": file(array(claimed=1 << 31)),
    "a truncated file": saved(np.arange(900.0))[:500],
    "a damaged compressed element": file(element(15, b"no zlib")),
    "a bomb": file(element(15, zlib.compress(bytes(1 << 26)))),
    "a large file": saved(np.zeros(LARGEST)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_a_value_error(name: str) -> None:
    with pytest.raises(ValueError):
        whole_numbers(HOSTILE[name], "wanted")


def test_damage_anywhere_is_a_value_error_or_numbers() -> None:
    random = np.random.default_rng(0)
    for packed in (False, True):
        good = saved(np.arange(20.0), packed)
        for _ in range(2_000):
            body = bytearray(good)
            for place in random.integers(HEADER - 2, len(body), 3):
                body[place] = random.integers(256)
            try:
                found = whole_numbers(bytes(body), "wanted")
            except ValueError:
                continue
            assert all(isinstance(value, int) for value in found)
