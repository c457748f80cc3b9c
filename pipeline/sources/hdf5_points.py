"""Point clouds in HDF5 files, as ModelNet40 and ScanObjectNN are published.

A file has an array of clouds, [M, N, 3 or more], and one of class numbers, [M] or [M, 1]. See the cards ``modelnet40``
and ``scanobjectnn``.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import DataError, SampleError, missing
from pipeline.shards.clouds import MOST_POINTS, Points, check_rounding, write_npy
from pipeline.shards.storage import Folder, file_stamp
from pipeline.sources.hdf5_arrays import own_array
from pipeline.sources.source import Part, Row, Slice

LIST = ".txt"
WIDEST = 64
"""Numbers of a point."""
BLOCK = 64 << 20
"""Bytes of clouds that are read together."""


@dataclass(frozen=True, kw_only=True)
class Hdf5Points:
    """The clouds of some files, in the order of the files; a class number without a name is a row with a problem."""

    kind: ClassVar[str] = "hdf5-points"
    summary: ClassVar[str] = "Point clouds in HDF5 files: ModelNet40, ScanObjectNN."
    has_captions: ClassVar[bool] = True
    media: ClassVar[tuple[str, ...]] = ("points",)

    folder: str
    """Folder of the files: a path or fsspec URI that every worker can read."""
    files: tuple[str, ...]
    """HDF5 files in the folder, or text files that list them, one path a line (ModelNet40's train_files.txt). Only the
    last part of such a path counts."""
    classes: tuple[str, ...] = ()
    """Names of the classes 0, 1, ..."""
    class_file: str = ""
    """Text file in the folder with these names, one a line (ModelNet40's shape_names.txt)."""
    points_key: str = "data"
    """Name of the array of clouds."""
    label_key: str = "label"
    """Name of the array of class numbers."""
    label_caption: str = "a {}"
    """Caption, with the name of the class in place of its only {}."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        require(bool(self.files), "files", self.files, "one file or more")
        require(not (self.classes and self.class_file), "classes", self.classes, "nothing with class_file")
        around = self.label_caption.split("{}")
        plain = len(around) == 2 and not set("{}") & set("".join(around))
        require(plain, "label_caption", self.label_caption, "a text with one {} and no other braces")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files.

        A slice may span several files.
        """
        names = self._names
        stamps = [(name, file_stamp(self._info(name)), count) for name, count in self._counts]
        total = sum(count for _, count in self._counts)
        require(total > 0, "files", self.files, "files with clouds")
        said = repr((stamps, names, self.points_key, self.label_key, self.label_caption))
        for start in range(0, total, rows_per_shard):
            count = min(rows_per_shard, total - start)
            digest = hashlib.sha256(f"{said} {start} {count}".encode()).hexdigest()
            yield Slice(count=count, digest=digest, where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        wanted, begin = int(piece.where["start"]), 0
        end = wanted + piece.count
        for name, count in self._counts:
            first, last = max(wanted, begin) - begin, min(end, begin + count) - begin
            begin += count
            if first >= last:
                continue
            with self._opened(name) as (clouds, numbers):
                labels = self._labels(name, numbers, first, last)
                for at, points in enumerate(_clouds(clouds, first, last)):
                    yield self._row(name, first + at, points, labels[at])

    def schema(self) -> Mapping[str, type]:
        """The class by name, and its number."""
        return {"label": str, "class_number": int}

    def labels(self) -> list[str]:
        """The class of every row, in order.

        Raises:
            DataError: a class number without a name.
        """
        found: list[str] = []
        for name, _ in self._counts:
            with self._opened(name) as (_, numbers):
                labels = self._labels(name, numbers, 0, numbers.shape[0])
            beyond = next((number for number in labels if not 0 <= number < len(self._names)), None)
            if beyond is not None:
                raise DataError(f"{self._place.join(name)}: class number {beyond} of {len(self._names)} classes")
            found += [self._names[number] for number in labels]
        return found

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        require(bool(self.classes or self.class_file), "classes", (), "the names of the classes, here or in class_file")
        return self.classes or tuple(self._lines("class_file", self.class_file))

    @cached_property
    def _counts(self) -> tuple[tuple[str, int], ...]:
        """Name and number of clouds of each file."""
        names: list[str] = []
        for name in self.files:
            listed = self._lines("files", name) if name.endswith(LIST) else [name]
            names += [PurePosixPath(one).name for one in listed] if name.endswith(LIST) else listed
        counts = []
        for name in names:
            with self._opened(name) as (clouds, _):
                counts.append((name, len(clouds)))
        return tuple(counts)

    def _info(self, name: str) -> Mapping[str, Any]:
        try:
            return self._place.info(name)
        except FileNotFoundError as error:
            raise missing("files", self._place.join(name)) from error

    def _lines(self, field: str, name: str) -> list[str]:
        try:
            text = self._place.read_text(name)
        except FileNotFoundError as error:
            raise missing(field, self._place.join(name)) from error
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _labels(self, name: str, numbers: Any, first: int, last: int) -> list[int]:
        try:
            found: list[int] = np.asarray(numbers[first:last]).reshape(-1).tolist()
        except OSError as error:
            raise DataError(f"{self._place.join(name)}: cannot read the class numbers ({error})") from error
        return found

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Any, Any]]:
        """The arrays of clouds and of class numbers of a file."""
        import h5py  # loads a library that other sources do not need

        where = self._place.join(name)
        self._info(name)
        with ExitStack() as stack:
            content = stack.enter_context(self._place.open(name))
            try:
                file = stack.enter_context(h5py.File(content, "r"))
                arrays = [own_array(file, key, where) for key in (self.points_key, self.label_key)]
            except (OSError, RuntimeError, KeyError) as error:
                raise DataError(f"{where} is no readable HDF5 file ({error})") from error
            clouds, numbers = arrays
            if clouds is None or numbers is None:
                keys = ", ".join(file.keys())
                raise DataError(f"{where} has no arrays {self.points_key} and {self.label_key}; it has {keys}")
            fits = clouds.ndim == 3 and 3 <= clouds.shape[2] <= WIDEST and clouds.dtype.kind in "fiu"
            paired = fits and numbers.ndim in (1, 2) and numbers.size == numbers.shape[0] == clouds.shape[0]
            if not paired or numbers.dtype.kind not in "iu":
                shapes = f"{clouds.dtype} {clouds.shape} and {numbers.dtype} {numbers.shape}"
                raise DataError(f"{where} has {shapes}, expected clouds [M, N, 3] and M whole class numbers")
            if clouds.shape[1] > MOST_POINTS:
                raise DataError(f"{where} has clouds of {clouds.shape[1]:,} points, more than {MOST_POINTS:,}")
            yield clouds, numbers

    def _row(self, name: str, index: int, points: NDArray[Any] | None, number: int) -> Row:
        url = f"{name}#{index}"
        if points is None:
            problem = SampleError("failed_to_resize", "damaged", "the file is damaged at this cloud")
            return Row(url=url, caption="", columns={"label": "", "class_number": number}, problem=problem)
        if not 0 <= number < len(self._names):
            problem = SampleError("failed_to_resize", "unknown_class", f"the class number {number} has no name")
            return Row(url=url, caption="", columns={"label": "", "class_number": number}, problem=problem)
        label = self._names[number]
        try:
            part = Part("points", write_npy(_as_float32(points[:, :3])), url=url)
        except SampleError as problem:
            return Row(url=url, caption="", columns={"label": label, "class_number": number}, problem=problem)
        caption = self.label_caption.format(label.replace("_", " "))
        return Row(url=url, caption=caption, parts=(part,), columns={"label": label, "class_number": number})


def _as_float32(points: NDArray[Any]) -> Points:
    """float32 [N, 3]; raises ``SampleError`` for coordinates that lose too much."""
    with np.errstate(over="ignore"):  # infinite coordinates have their own reason later
        narrow = points.astype(np.float32)
    if len(points) and np.isfinite(narrow).all():
        check_rounding(points, narrow)
    return narrow


def _clouds(array: Any, first: int, last: int) -> Iterator[NDArray[Any] | None]:
    """The clouds from ``first`` to before ``last``, a block at a time; None for those that cannot be read."""
    at_once = max(1, BLOCK // max(1, array.dtype.itemsize * array.shape[1] * array.shape[2]))
    for start in range(first, last, at_once):
        yield from _block(array, start, min(start + at_once, last))


def _block(array: Any, first: int, last: int) -> Iterator[NDArray[Any] | None]:
    try:
        yield from np.asarray(array[first:last])
    except OSError:
        if last - first == 1:
            yield None
            return
        middle = (first + last) // 2
        yield from _block(array, first, middle)
        yield from _block(array, middle, last)
