"""Tar shards: written the same way every time, read with suspicion.

The layout is webdataset's: a sample is a run of members ``{key}.{field}``, the key being the path up to the first dot
of its last component. Written members are USTAR with fixed owner, mode and time, so that equal samples give equal
bytes. Read archives come from anywhere, so a member that is not a plain file with a plain relative name is refused.
"""

import mmap
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import DataError
from pipeline.shards.sample import Sample

RECORD = 512
METADATA = re.compile(r"__[^/]*__($|/)")


class _WholeTar(tarfile.TarInfo):
    """Makes tarfile refuse an archive without its end mark, which it would take for a shorter one."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut off before its end mark") from error


class TarWriter:
    """Write samples to a binary file as a tar; :meth:`close` adds the end mark and leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)

    def write(self, sample: Sample) -> None:
        """Append ``sample``; its members are in the order of their field names."""
        for field in sorted(sample.fields):
            member = tarfile.TarInfo(f"{sample.key}.{field}")
            member.size = len(sample.fields[field])
            member.mode = 0o444
            member.mtime = 0
            member.uname = member.gname = "clipmill"
            self._tar.addfile(member, BytesIO(sample.fields[field]))

    def close(self) -> None:
        """Write the end-of-archive mark."""
        self._tar.close()


def iterate_tar(file: BinaryIO, name: str = "tar") -> Iterator[Sample]:
    """The samples of a tar, read front to back from a binary file (gzip, bz2 and xz are understood).

    Raises:
        DataError: truncated, not a tar, a hostile member, or members of one key that do not follow one another.
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


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    fields: dict[str, tuple[int, int]]


class TarShard:
    """A local, uncompressed tar with random access to its samples.

    The headers are read once; the contents stay on disk behind a memory map, so that an open shard costs its index
    only. Not thread-safe while it is being built; reads are.

    Raises:
        DataError: as :func:`iterate_tar`; also when a member reaches past the end of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = _index(self.path)
        self.keys = [entry.key for entry in self._entries]
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        fields = {field: self._map[start : start + size] for field, (start, size) in entry.fields.items()}
        return Sample(entry.key, fields)

    def field_names(self, index: int) -> tuple[str, ...]:
        """The names of the fields of sample ``index``, without reading them."""
        return tuple(self._entries[index].fields)

    def close(self) -> None:
        """Release the memory map; reading afterwards raises ``ValueError``."""
        self._map.close()


def split_member(member: tarfile.TarInfo, name: str) -> tuple[str, str] | None:
    """``(key, field)`` of a tar member; ``None`` for folders, and for names webdataset skips too.

    Raises:
        DataError: an absolute name, a parent folder in it, a link or a device.
    """
    path = member.name
    if member.isdir():
        return None
    if not member.isreg():
        raise DataError(f"{name}: {path!r} is a link or a device; a shard holds plain files only")
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        raise DataError(f"{name}: {path!r} is not a plain relative name")
    folder, _, last = path.rpartition("/")
    stem, dot, field = last.partition(".")
    if not dot or not stem or not field or METADATA.match(path):
        return None
    return (f"{folder}/{stem}" if folder else stem), field.lower()


def _check_new(key: str, seen: set[str], name: str) -> None:
    if key in seen:
        raise DataError(f"{name}: the members of {key} are not together")
    seen.add(key)


def _index(path: Path) -> list[_Entry]:
    entries: list[_Entry] = []
    seen: set[str] = set()
    length = path.stat().st_size
    if length < RECORD:
        raise DataError(f"{path}: not a tar ({length} bytes)")
    try:
        with tarfile.open(path, mode="r:", tarinfo=_WholeTar) as tar:
            for member in tar:
                split = split_member(member, str(path))
                if split is None:
                    continue
                key, field = split
                if not entries or entries[-1].key != key:
                    _check_new(key, seen, str(path))
                    entries.append(_Entry(key, {}))
                if field in entries[-1].fields:
                    raise DataError(f"{path}: {key} has two members .{field}")
                if member.offset_data + member.size > length:
                    raise DataError(f"{path}: cut off in the middle of {member.name}")
                entries[-1].fields[field] = (member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar ({error})") from error
    return entries
