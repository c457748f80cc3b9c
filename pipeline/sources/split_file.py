"""Labelled images in the order of a published split, as in papers on few-shot learning.

    json      CoOp's split files: {"train": [[path, label, class name], ...], "val": [...], "test": [...]}
    aircraft  FGVC-Aircraft's own: variants.txt, and images_variant_{train,val,test}.txt with lines "0034309 707-320"
    folders   one folder of images per class, in sorted order; the file of class names has lines "n01440764 tench" in
              the order of the labels; without that file the sorted folder names are the classes: those of all parts
              together, if the folder is called train, val, test or similar and the others are beside it

Few-shot images are sampled by their index in this order, so (split file, seed) fixes them on every machine. ImageNet
has no split file: the reference code reads its folders in file system order, which differs between machines. Sorted
order is the same on every machine, but differs from the papers' order.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from pipeline.config import parse_json, require
from pipeline.errors import DataError, SampleError
from pipeline.shards.storage import Folder, read_errors
from pipeline.sources.source import Part, Row, Scalar, Slice, is_hidden

SplitPart = Literal["train", "val", "test"]
PART_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """An image: its path relative to the folder, and the number and name of its class."""

    path: str
    number: int
    name: str


@dataclass(frozen=True, kw_only=True)
class SplitFile:
    """One part of a split; the module's docstring describes the formats."""

    kind: ClassVar[str] = "split-file"
    has_captions: ClassVar[bool] = False

    folder: str = ""
    """Folder of the dataset: a path or fsspec URI that every worker can read."""
    pictures: str = ""
    """Subfolder to which the paths of the split are relative; empty = the folder itself."""
    format: Literal["json", "aircraft", "folders"] = "json"
    """Format of the split, see pipeline/sources/split_file.py."""
    split: str = ""
    """File of the split in the folder; with the format folders, the file of the class names."""
    part: SplitPart = "train"
    """Part of the split."""
    home: str = ""
    """Origin of the split file, shown where the file is missing."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Class names or class folders of the split, mapped to their names in prompts."""
    leave_out: tuple[str, ...] = ()
    """Names of classes to leave out."""

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the split, not the images."""
        items = self.items
        for start in range(0, len(items), rows_per_shard):
            part = items[start : start + rows_per_shard]
            digest = hashlib.sha256(repr((self.folder, self.pictures, part)).encode()).hexdigest()
            yield Slice(count=len(part), digest=digest, where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; an image that cannot be read is a row with a problem."""
        start = int(piece.where["start"])
        for item in self.items[start : start + piece.count]:
            yield self._row(item)

    def schema(self) -> Mapping[str, type]:
        """The class by name, and its number in the split."""
        return {"label": str, "class_number": int}

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The images of the split, in its order; opens no image.

        Raises:
            SettingError: no folder, or no split file in it.
            DataError: the split file is malformed, or gives one class number several names.
        """
        require(bool(self.folder), "folder", self.folder, f"the dataset's folder, with {self.split or 'its images'}")
        read = {"json": self._read_json, "aircraft": self._read_aircraft, "folders": self._read_folders}[self.format]
        found = (Item(item.path, item.number, self.renames.get(item.name, item.name)) for item in read())
        items = tuple(item for item in found if item.name not in self.leave_out)
        require(bool(items), "folder", self.folder, f"a folder with images for {self.part}")
        self._check(items)
        return items

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    def _text(self, name: str) -> str:
        try:
            return self._place.read_text(name)
        except FileNotFoundError as error:
            home = self.home or "the dataset's home page"
            allowed = f"a folder with the published file {name}, which comes from {home}; do not make a new split"
            require(False, "folder", self.folder, allowed)
            raise AssertionError from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self._place.join(name)} is no text ({error})") from error

    def _read_json(self) -> Iterator[Item]:
        where, text = self._place.join(self.split), self._text(self.split)
        try:
            content: Any = parse_json(text)
            rows = [(path, label, name) for path, label, name in content[self.part]]
        except (ValueError, KeyError, TypeError) as error:
            form = "{'train': [[path, label, class name], ...], 'val': ..., 'test': ...}"
            raise DataError(f"{where} is no split file of the form {form} ({error!r})") from error
        for path, label, name in rows:
            path = path.replace("\\", "/") if isinstance(path, str) else path  # written on Windows
            whole = isinstance(path, str) and isinstance(label, int) and isinstance(name, str)
            if not whole or label < 0 or path.startswith("/") or ".." in path.split("/"):
                raise DataError(f"{where}: {[path, label, name]} is no [path below the folder, label, class name]")
            yield Item(path, label, name)

    def _read_aircraft(self) -> Iterator[Item]:
        names = {line.strip(): number for number, line in enumerate(self._text(self.split).splitlines())}
        listing = f"images_variant_{self.part}.txt"
        for line in self._text(listing).splitlines():
            image, _, name = line.strip().partition(" ")
            if name not in names:
                raise DataError(f"{self._place.join(listing)}: the variant {name!r} is not in {self.split}")
            yield Item(f"{image}.jpg", names[name], name)

    def _read_folders(self) -> Iterator[Item]:
        root = self._place.folder(self.pictures) if self.pictures else self._place
        allowed = f"a folder with {self.pictures or 'images'} in it"
        require(root.kind() == "directory", "folder", self.folder, allowed)
        paths = self._images_below(root)
        others = (
            [path for part in self._other_parts(root) for path in self._images_below(part)] if not self.split else []
        )
        names = self._names(sorted({path.split("/")[0] for path in (*paths, *others)}))
        for path in paths:
            folder = path.split("/")[0]
            if folder in names:
                yield Item(path, *names[folder])

    @staticmethod
    def _images_below(root: Folder) -> list[str]:
        """Sorted paths, relative to ``root``, of the images in folders of classes."""
        return [path for path in root.find() if path.lower().endswith(IMAGES) and "/" in path and not is_hidden(path)]

    @staticmethod
    def _other_parts(root: Folder) -> list[Folder]:
        """The folders of the set's other parts beside ``root``, if all have the usual names."""
        above, _, own = root.uri.rpartition("/")
        if own.lower() not in PART_FOLDERS or not above:
            return []
        parent = Folder(above)
        with read_errors(above):
            names = [str(path).rstrip("/").rpartition("/")[2] for path in parent.fs.ls(parent.path, detail=False)]
        parts = sorted(name for name in names if name.lower() in PART_FOLDERS and name != own)
        return [folder for folder in map(parent.folder, parts) if folder.kind() == "directory"]

    def _names(self, folders: list[str]) -> dict[str, tuple[int, str]]:
        """Number and name of each class by its folder; folder names 0, 1, ... are class numbers (ImageNet V2)."""
        if not self.split:
            return {folder: (number, folder) for number, folder in enumerate(folders)}
        lines = [line.strip().partition(" ") for line in self._text(self.split).splitlines() if line.strip()]
        numbered = all(folder.isdigit() for folder in folders)
        return {
            str(number) if numbered else folder: (number, self.renames.get(folder, name.strip()))
            for number, (folder, _, name) in enumerate(lines)
        }

    def _check(self, items: tuple[Item, ...]) -> None:
        """Each number has one name. The code that makes prompts checks for names with several numbers."""
        names: dict[int, str] = {}
        for item in items:
            if names.setdefault(item.number, item.name) != item.name:
                both = f"{names[item.number]!r} and {item.name!r}"
                raise DataError(f"{self._place.join(self.split)} calls the class {item.number} {both}")

    def _row(self, item: Item) -> Row:
        path = f"{self.pictures.rstrip('/')}/{item.path}" if self.pictures else item.path
        columns: dict[str, Scalar] = {"label": item.name, "class_number": item.number}
        try:
            return Row(url=path, parts=(Part("image", self._place.read_bytes(path)),), columns=columns)
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
            return Row(url=path, columns=columns, problem=problem)
