"""Vectors of whole numbers in files of MATLAB 5 that other people wrote.

scipy's ``loadmat`` crashes the process on a wrong type of an element and allocates what a header states, so the little
that is needed is read here, by "MAT-File Format" (MathWorks): a header of 128 bytes, then elements of a type, a length
and content; an element may be compressed. An array is an element that holds its class, its shape, its name and its
numbers as elements.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER = 128
LARGEST = 1 << 18
"""Bytes of a file, at most; a compressed one has up to ``UNPACKED``."""
UNPACKED = 1 << 24
ARRAY, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
NUMERIC_CLASSES = range(6, 16)  # double, single, int8 to uint64
COMPLEX = 0x0800


def whole_numbers(content: bytes, name: str) -> list[int]:
    """The numbers of the array ``name``, in their order in the file.

    Raises:
        ValueError: no file of MATLAB 5, a damaged or a large one, or no real array of whole numbers of this name.
    """
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:HEADER])
    if order is None:
        raise ValueError("no header of MATLAB 5")
    for kind, body in _elements(content[HEADER:], order):
        packed = kind == COMPRESSED
        for inner, part in _elements(_unpacked(body), order) if packed else ((kind, body),):
            values = _array(part, order, name) if inner == ARRAY else None
            if values is not None:
                return _whole(values)
    raise ValueError(f"no array of numbers {name}")


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element; up to four bytes may be within the tag."""
    at = 0
    while at < len(content):
        if len(content) - at < 8:
            raise ValueError("a truncated element")
        kind, length = struct.unpack_from(f"{order}2I", content, at)
        begin, end = at + 8, at + 8 + length
        at = end if kind == COMPRESSED else end + -length % 8
        if kind >> 16:
            kind, length = kind & 0xFFFF, kind >> 16
            begin, end, at = begin - 4, begin - 4 + min(length, 4), begin
        if end > len(content):
            raise ValueError("a truncated element")
        yield kind, content[begin:end]


def _unpacked(body: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(body, UNPACKED)
    except zlib.error as error:
        raise ValueError(f"a damaged element ({error})") from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {UNPACKED:,} bytes, unpacked")
    return content


def _array(body: bytes, order: str, name: str) -> NDArray[Any] | None:
    """The numbers of an array; None for one of another name."""
    parts = list(_elements(body, order))
    if len(parts) < 4 or parts[2][1] != name.encode():
        return None
    (_, flags), _, _, (kind, numbers) = parts[:4]
    if len(flags) < 4 or kind not in NUMBERS:
        raise ValueError(f"{name} is no array of numbers")
    (about,) = struct.unpack_from(f"{order}I", flags)
    if about & 0xFF not in NUMERIC_CLASSES or about & COMPLEX:
        raise ValueError(f"{name} is no array of real numbers")
    dtype = np.dtype(order + NUMBERS[kind])
    return np.frombuffer(numbers[: len(numbers) // dtype.itemsize * dtype.itemsize], dtype)


def _whole(values: NDArray[Any]) -> list[int]:
    if not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise ValueError("numbers that are not whole")
    return [int(value) for value in values]
