"""The headers of an uncompressed tar, read directly: POSIX.1-1988 (USTAR), POSIX.1-2001 (pax) and GNU's.

Accepted archives give the same result as tarfile, in a tenth of the time. Headers that no shard needs are rejected:
links, devices, sparse files, signed numbers, two extended headers for one member, and a header with a wrong checksum,
which tarfile treats as the end of the archive.
"""

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

RECORD = 512
END = bytes(RECORD)
LARGEST_EXTENSION = 1 << 20  # largest extended header in bytes; it holds a name and a few numbers
CHECKED_AT_ONCE = 8192  # headers, 4 MB
FILES, OLD_FILE, FOLDER, LONG_NAME, GLOBAL, EXTENSIONS = b"0\x007", 0, ord("5"), ord("L"), ord("g"), b"LxXg"
NO_PLAIN_FILE = "a link, a device or a sparse file; a shard holds plain files only"

Member = tuple[str, int, int]


def read_headers(archive: mmap.mmap, name: str) -> Iterator[Member]:
    """``(path, start, size)`` of every file in ``archive``, in order, without folders.

    A file's content is ``archive[start : start + size]``, always within the archive. Checksums are verified in batches:
    an iteration that reaches its end has verified all of them.

    Raises:
        DataError: not a tar, truncated, a wrong checksum, or a member other than a file or folder.
    """
    offset = 0
    headers: list[int] = []
    while (header := archive[offset : offset + RECORD]) != END:
        start, path, size = offset + RECORD, None, None
        headers.append(offset)
        if len(header) == RECORD and header[156] in EXTENSIONS:
            header, start, path, size = _extended(archive, offset, headers, name)
        if len(header) < RECORD:
            raise DataError(f"{name}: not a whole tar (cut off before its end mark)")
        stated, offset = _number(header[124:136], name), start
        if _is_folder(header):
            continue
        path = _path(header) if path is None else path
        if header[156] not in FILES:
            raise DataError(f"{name}: {path!r} is {NO_PLAIN_FILE}")
        size = stated if size is None else size
        offset += _padded(size)
        if start + size > len(archive):
            raise DataError(f"{name}: cut off in the middle of {path}")
        yield path, start, size
        if len(headers) >= CHECKED_AT_ONCE:
            _check(archive, headers, name)
            headers.clear()
    _check(archive, headers, name)


def _extended(
    archive: mmap.mmap, offset: int, headers: list[int], name: str
) -> tuple[bytes, int, str | None, int | None]:
    """The header after extended ones, the start of its member's content, and the path and size they set."""
    path: str | None = None
    size: int | None = None
    named = False
    while len(header := archive[offset : offset + RECORD]) == RECORD and header[156] in EXTENSIONS:
        start, length = offset + RECORD, _number(header[124:136], name)
        content = archive[start : start + min(_padded(length), LARGEST_EXTENSION)]
        if len(content) < length:
            raise DataError(f"{name}: not a whole tar (an extended header of {length} bytes)")
        if header[156] == GLOBAL:
            if _pax(content[:length], name) != (None, None):
                raise DataError(f"{name}: one extended header gives all members the same path or size")
        elif named:
            raise DataError(f"{name}: two extended headers for one member")
        else:
            named = True
            path, size = (_text(content), None) if header[156] == LONG_NAME else _pax(content[:length], name)
        offset = start + _padded(length)
        headers.append(offset)
    if len(header) < RECORD or header == END:
        raise DataError(f"{name}: not a whole tar (an extended header without its member)")
    return header, offset + RECORD, path, size


def _pax(content: bytes, name: str) -> tuple[str | None, int | None]:
    """Path and size from the records ``"{length} {key}={value}\\n"`` of a pax header."""
    values: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        digits, _, _ = content[at : at + 20].partition(b" ")
        stop = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : stop].partition(b"=")
        if not equals or not key or value[-1:] != b"\n" or stop > len(content) or key.startswith(b"GNU.sparse"):
            raise DataError(f"{name}: not a whole tar (a damaged pax header, or a sparse file)")
        values[key], at = value[:-1], stop
    path, size = values.get(b"path"), values.get(b"size")
    if size is not None and not (size.isdigit() and len(size) < 20):
        raise DataError(f"{name}: not a whole tar (a size of {size[:20]!r})")
    return None if path is None else _decoded(path).rstrip("/"), None if size is None else int(size)


def _check(archive: mmap.mmap, headers: list[int], name: str) -> None:
    """Verify checksums: the sum of a header's bytes, with the checksum's own eight bytes as spaces."""
    found = _bytes_of(archive, headers)
    stated = np.array([_number(field.tobytes(), name) & 0xFFFFFF for field in found[:, 148:156]])
    found[:, 148:156] = ord(" ")
    # Some old programs sum signed bytes.
    right = (found.sum(axis=1, dtype=np.int64) == stated) | (found.view(np.int8).sum(axis=1, dtype=np.int64) == stated)
    if not right.all():
        raise DataError(f"{name}: not a whole tar (a wrong checksum at byte {headers[int(right.argmin())]})")


def _bytes_of(archive: mmap.mmap, headers: list[int]) -> NDArray[np.uint8]:
    """A copy of the headers, [N, 512]. A view would prevent closing the memory map."""
    blocks = np.frombuffer(archive, np.uint8, len(archive) // RECORD * RECORD).reshape(-1, RECORD)
    return np.asarray(blocks[np.array(headers, np.int64) // RECORD])


def _is_folder(header: bytes) -> bool:
    # Before USTAR a folder was a file whose name ends in a slash.
    return header[156] == FOLDER or (header[156] == OLD_FILE and _text(header[:100]).endswith("/"))


def _path(header: bytes) -> str:
    path = _text(header[:100])
    return f"{_text(header[345:500])}/{path}" if header[345] else path


def _number(field: bytes, name: str) -> int:
    """A number in octal digits, or in base 256 after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"{name}: not a whole tar (a number {field!r})")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return _decoded(field.partition(b"\0")[0])


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // RECORD) * RECORD
