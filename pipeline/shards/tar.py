"""Tar shards: deterministic writing, defensive reading.

The layout is webdataset's: a sample is a run of members ``{key}.{field}``; the key is the path up to the first dot of
its last component. Bytes of a name that are no UTF-8 are read as ``%E9``. Members are written as USTAR with fixed
owner, mode and time, so that equal samples give equal bytes. Archives to read are not trusted: a member that is not a
plain file with a plain relative name is rejected.
"""

import functools
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import DataError
from pipeline.shards.sample import Sample
from pipeline.shards.tar_headers import NO_PLAIN_FILE, RECORD, read_headers
from pipeline.shards.text import escaped

METADATA = re.compile(r"__[^/]*__($|/)")
PLAIN = re.compile(r"([0-9A-Za-z-][0-9A-Za-z_-]*)\.([0-9a-z_.]+)")  # nearly all names; a fast path only


class _WholeTar(tarfile.TarInfo):
    """Make tarfile reject an archive with a damaged header or no end mark, which it would read as a shorter one."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut off before its end mark") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a spoilt header: {error}") from error


class TarWriter:
    """Writes samples to a binary file as a tar; :meth:`close` adds the end mark and leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def write(self, sample: Sample) -> None:
        """Append ``sample``; its members are sorted by field name."""
        for field in sorted(sample.fields):
            content = sample.fields[field]
            self._append(_header(f"{sample.key}.{field}", len(content)), content, bytes(-len(content) % RECORD))

    def close(self) -> None:
        """Write the end-of-archive mark: two empty records, then padding to whole blocks of 20."""
        self._append(bytes(2 * RECORD))
        self._append(bytes(-self._size % tarfile.RECORDSIZE))

    def _append(self, *parts: bytes) -> None:
        # One write each: joining them would copy the image.
        for part in parts:
            self._file.write(part)
            self._size += len(part)


def _header(name: str, size: int) -> bytes:
    """The USTAR header (POSIX.1-1988) of a member. tarfile takes 50 us for each, and keeps all of them in memory."""
    encoded, digits = name.encode("utf-8", "surrogateescape"), b"%011o" % size
    if len(encoded) > 100 or len(digits) > 11:
        return _tarfile_header(name, size)
    owner, time, rest, total = _constant_header()
    # The sum of all bytes, with the checksum's own eight bytes as spaces.
    checksum = b"%06o\0 " % (total + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(100, b"\0"), owner, digits, b"\0", time, checksum, rest))


@functools.cache
def _constant_header() -> tuple[bytes, bytes, bytes, int]:
    """Mode and owners, the time, and the part after the checksum; the sum of these and of eight spaces."""
    header = _tarfile_header("", 0)
    owner, time, rest = header[100:124], header[136:148], header[156:]
    return owner, time, rest, sum(owner) + sum(time) + sum(rest) + 8 * ord(" ")


def _tarfile_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o444, 0
    member.uname = member.gname = "clipmill"
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def iterate_tar(file: BinaryIO, name: str = "tar") -> Iterator[Sample]:
    """The samples of a tar, read sequentially from a binary file (gzip, bz2 and xz are supported).

    Raises:
        DataError: truncated, not a tar, a hostile member, or members of one key that are not adjacent.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_WholeTar) as tar:
            for member in tar:
                split = split_member(member, name)
                if split is None:
                    continue
                key, field = split
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    _check_new(key, seen, name)
                    sample = Sample(key, {})
                if field in sample.fields:
                    raise DataError(f"{name}: {key} has two members .{field}")
                content = tar.extractfile(member)
                sample.fields[field] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{name}: not a whole tar ({error})") from error
    if sample is not None:
        yield sample


class TarShard:
    """A local, uncompressed tar with random access to its samples.

    The headers are read once, without tarfile, which would take ten times as long. The contents stay on disk behind a
    memory map, so an open shard needs memory for its index only. Safe to read from several threads.

    Raises:
        DataError: as :func:`iterate_tar`; also for sparse files and for some headers that tarfile accepts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length < RECORD:
                raise DataError(f"{path}: not a tar ({length} bytes)")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.keys: list[str] = []
        self._fields: list[dict[str, tuple[int, int]]] = []
        self._index()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        places = self._fields[index]
        fields = {field: self._map[start:stop] for field, (start, stop) in places.items()}
        return Sample(self.keys[index], fields)

    def field_names(self, index: int) -> tuple[str, ...]:
        """The names of the fields of sample ``index``, without reading them."""
        return tuple(self._fields[index])

    def close(self) -> None:
        """Release the memory map; reading afterwards raises ``ValueError``."""
        self._map.close()

    def _index(self) -> None:
        name, last = str(self.path), None
        seen: set[str] = set()
        fields: dict[str, tuple[int, int]] = {}
        for path, start, size in read_headers(self._map, name):
            split = split_path(path, name)
            if split is None:
                continue
            key, field = split
            if key != last:
                _check_new(key, seen, name)
                last, fields = key, {}
                self.keys.append(key)
                self._fields.append(fields)
            if field in fields:
                raise DataError(f"{name}: {key} has two members .{field}")
            fields[field] = (start, start + size)


def split_member(member: tarfile.TarInfo, name: str) -> tuple[str, str] | None:
    """``(key, field)`` of a tar member; ``None`` for folders, and for names that webdataset skips.

    Raises:
        DataError: an absolute name, a name with ``..``, a link, a device or a sparse file.
    """
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise DataError(f"{name}: {member.name!r} is {NO_PLAIN_FILE}")
    return split_path(member.name, name)


def split_path(path: str, name: str) -> tuple[str, str] | None:
    """``(key, field)`` of a file's path in a tar; ``None`` for names that webdataset skips.

    Raises:
        DataError: an absolute name, or a name with ``..``.
    """
    plain = PLAIN.fullmatch(path)
    if plain is not None:
        return plain[1], plain[2]
    if path.startswith("/") or ".." in path.split("/") or "\0" in path or "\\" in path:
        raise DataError(f"{name}: {path!r} is not a plain relative name")
    folder, _, last = path.rpartition("/")
    stem, dot, field = last.partition(".")
    if not dot or not stem or not field or METADATA.match(path):
        return None
    return escaped(f"{folder}/{stem}" if folder else stem), escaped(field.lower())


def _check_new(key: str, seen: set[str], name: str) -> None:
    if key in seen:
        order = "pack the files in the order of their names (tar --sort=name)"
        raise DataError(f"{name}: the members of {key} are not together; {order}")
    seen.add(key)
