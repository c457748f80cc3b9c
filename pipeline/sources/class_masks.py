"""A folder for each class, with images and a mask of the class beside each, as FSS-1000 is published.

    jobs/refresh_dataset.py class-masks --folder fewshot_data --classes-file test.txt --output-folder fss/test

    abacus/1.jpg        abacus/1.png    grey or in colours; a pixel of 128 or more, of 255, is of the class
    abe's_flyingfish/1.jpg …

FSS-1000: Li, Wei, Chen, Tai, Tang, 2020, arXiv 1907.12347. A mask becomes one object with a segmentation in
``boxes.json``, whose label is the folder's name with spaces for underscores. An empty mask has no object.
"""

import json
import posixpath
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import require
from pipeline.errors import DataError, SampleError, missing
from pipeline.shards.media import IMAGE
from pipeline.shards.objects import FIELD
from pipeline.shards.pixels import MOST_PIXELS
from pipeline.shards.segmentation import run_lengths
from pipeline.shards.storage import Folder, file_stamp, split_file
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import UNCHANGED, Part, Row, Slice, is_hidden

MASK_ENDING = ".png"
IMAGE_ENDINGS = tuple(f".{ending}" for ending in IMAGE.endings if f".{ending}" != MASK_ENDING)
THRESHOLD = 128


@dataclass(frozen=True, kw_only=True)
class ClassMasks:
    """The images of the class folders in ``classes_file``, in its order; without it of all folders, sorted."""

    kind: ClassVar[str] = "class-masks"
    summary: ClassVar[str] = "A folder for each class, with images and a mask PNG beside each, such as FSS-1000."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = False

    folder: str
    """Folder of the class folders: a path or fsspec URI that every worker can read."""
    classes_file: str = ""
    """File with one class folder a line, such as a split's list: a path or fsspec URI; empty = all folders."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """Class name to an empty group, in the order of the folders."""
        return {_readable(name): "" for name, *_ in self._files}

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files.

        Raises:
            SettingError: no such folder or file, a class without a folder, or no images.
        """
        yield from record_slices(
            list(self._files), rows_per_shard, scratch, "class-masks", digest=json_digest, stored=lambda file: file[:3]
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that is missing or cannot be used is a problem."""
        for folder, image, mask in slice_records(piece):
            yield self._row(_readable(folder), image, mask)

    def schema(self) -> Mapping[str, type]:
        """``label``: the class."""
        return {"label": str}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @cached_property
    def _files(self) -> Sequence[tuple[str, str, str, str, str]]:
        """Class folder, paths of image and mask, and the version stamps of both."""
        if self._place.kind() != "directory":
            raise missing("folder", self.folder)
        found = self._place.find(depth=2)
        paths: dict[str, list[str]] = {}
        for path in found:
            if path.count("/") == 1 and path.lower().endswith(IMAGE_ENDINGS) and not is_hidden(path):
                paths.setdefault(path.partition("/")[0], []).append(path)
        allowed = f"a folder of class folders with images ({' '.join(IMAGE_ENDINGS)})"
        require(bool(paths), "folder", self.folder, allowed)
        names = self._listed() if self.classes_file else tuple(paths)
        absent = [name for name in names if name not in paths]
        require(not absent, "classes_file", absent[:5], f"names of folders with images in {self.folder}")
        pairs = [(name, path, posixpath.splitext(path)[0] + MASK_ENDING) for name in names for path in paths[name]]
        stamps = {path: file_stamp(facts) for path, facts in found.items()}
        return [(name, path, mask, stamps[path], stamps.get(mask, "")) for name, path, mask in pairs]

    def _listed(self) -> tuple[str, ...]:
        """The class folders in the file, each once."""
        place, name = split_file(self.classes_file)
        try:
            lines = place.read_text(name).splitlines()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise missing("classes_file", self.classes_file) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.classes_file} is no text ({error})") from error
        return tuple(dict.fromkeys(line.strip().strip("/") for line in lines if line.strip()))

    def _row(self, label: str, image: str, mask: str) -> Row:
        columns = {"label": label}
        try:
            content = self._read(image, "unreadable")
            size = _opened(content, image).size
            record = json.dumps(_record(self._mask(mask, size), label), ensure_ascii=False).encode()
        except SampleError as problem:
            return Row(url=image, columns=columns, problem=problem)
        return Row(url=image, parts=(Part("image", content),), members={FIELD: record}, columns=columns)

    def _mask(self, path: str, size: tuple[int, int]) -> NDArray[np.bool_]:
        """The pixels of the class, bool [height, width]; ``size`` is the image's width and height."""
        opened = _opened(self._read(path, "no_mask"), path)
        if opened.size != size:
            sizes = f"{opened.width} x {opened.height} pixels, its image {size[0]} x {size[1]}"
            raise SampleError("failed_to_resize", "mask_size", f"{path} has {sizes}")
        try:
            found: NDArray[np.bool_] = np.asarray(opened.convert("L")) >= THRESHOLD
        except (OSError, ValueError, SyntaxError) as error:
            raise SampleError("failed_to_resize", "mask", f"cannot decode {path}: {error}") from error
        return found

    def _read(self, path: str, reason: str) -> bytes:
        try:
            return self._place.read_bytes(path)
        except OSError as error:
            raise SampleError("failed_to_download", reason, f"cannot read {path}: {error}") from error


def _opened(content: bytes, path: str) -> Image.Image:
    """An image whose header is read; raises ``SampleError`` for another file or too many pixels."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(BytesIO(content))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("failed_to_resize", "not_an_image", f"{path} is not an image: {error}") from error
    if image.width * image.height > MOST_PIXELS:
        raise SampleError("failed_to_resize", "too_large", f"{path} has {image.width} x {image.height} pixels")
    return image


def _record(mask: NDArray[np.bool_], label: str) -> dict[str, Any]:
    """``boxes.json`` with one object, or with none for an empty mask."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return {"width": width, "height": height, "objects": []}
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    runs = {"size": [height, width], "counts": run_lengths(mask)}
    one = {"label": label, "bbox": box, "area": int(mask.sum()), "segmentation": runs}
    return {"width": width, "height": height, "objects": [one]}


def _readable(folder: str) -> str:
    return folder.replace("_", " ")
