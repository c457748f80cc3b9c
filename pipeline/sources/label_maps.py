"""Images with label maps as published: a folder of images, and beside it a folder of PNGs with a value for each pixel.

    jobs/refresh_dataset.py label-maps --folder VOCdevkit/VOC2012 --images JPEGImages --labels SegmentationClass \\
        --split ImageSets/Segmentation/val.txt --classes-of voc --resize-mode no --output-folder voc

    voc          JPEGImages/2007_000033.jpg      SegmentationClass/2007_000033.png      0 background, 255 void
    ade20k       images/validation/a.jpg         annotations/validation/a.png           0 other, 1 to 150
    coco_stuff   images/val2017/000000000139.jpg annotations/val2017/000000000139.png   COCO's id - 1, 255 unlabelled

Values are mapped to those of ``mask.png`` (``shards/label_values.py``): v for the v-th class of the card, 0 for an
unlabelled pixel, 255 for void (65535 with more than 254 classes). A file with another value is a row with its reason,
unless ``other_values`` says what such pixels are.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.dataset import load_card
from pipeline.errors import DataError, SampleError, missing
from pipeline.shards.label_values import (
    MASK_FIELD,
    MOST_MASK_CLASSES,
    UNLABELLED,
    VOID_VALUE,
    WIDE_VOID,
    decode_values,
    encode_values,
)
from pipeline.shards.media import IMAGE
from pipeline.shards.storage import Folder, file_stamp
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import UNCHANGED, Part, Row, Slice, is_hidden

ENDINGS = tuple(f".{ending}" for ending in IMAGE.endings)
REFUSED = WIDE_VOID + 1  # in a table of values: a value that no class has


@dataclass(frozen=True, kw_only=True)
class LabelMaps:
    """The images of ``split``, in its order; without a split all images of the folder, sorted by path."""

    kind: ClassVar[str] = "label-maps"
    summary: ClassVar[str] = "A folder of images and a folder of PNGs with a class number for each pixel."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = False
    label_field: ClassVar[str] = MASK_FIELD

    folder: str
    """Folder of the dataset: a path or fsspec URI that every worker can read."""
    classes_of: str
    """Dataset card with the classes, in the order of their values: a name or a YAML file."""
    images: str = "images"
    """Subfolder of the images."""
    labels: str = "annotations"
    """Subfolder of the label PNGs; a label has the relative path of its image, with `label_suffix` as its ending."""
    label_suffix: str = ".png"
    """Replacement of the image's extension in the name of its label file."""
    split: str = ""
    """File in the folder with one image a line, relative to `images`, with or without extension; empty = all images."""
    class_values: tuple[int, ...] = ()
    """Values of the classes in the label files, in the order of the card; empty = 1, 2, 3, ..."""
    unlabelled_values: tuple[int, ...] = (0,)
    """Values of unlabelled pixels."""
    void_values: tuple[int, ...] = (255,)
    """Values of pixels that losses and metrics leave out."""
    other_values: Literal["refuse", "unlabelled", "void"] = "refuse"
    """Meaning of all other values: refuse (the row fails), unlabelled or void."""

    def __post_init__(self) -> None:
        values = (*self.class_values, *self.unlabelled_values, *self.void_values)
        inside = all(0 <= value <= WIDE_VOID for value in values)
        require(inside, "class_values, unlabelled_values, void_values", values, f"0 to {WIDE_VOID}")
        require(self.label_suffix.endswith(".png"), "label_suffix", self.label_suffix, "an ending in .png")

    @cached_property
    def classes(self) -> Mapping[str, str]:
        """Class name to base or novel, if the card has novel classes; in the order of the values of ``mask.png``."""
        card = load_card(self.classes_of)
        require(bool(card.classes), "classes_of", self.classes_of, "a card with classes")
        require(len(card.classes) <= MOST_MASK_CLASSES, "classes_of", self.classes_of, f"{MOST_MASK_CLASSES} classes")
        old = "base" if card.novel else ""
        return {name: "novel" if name in card.novel else old for name in card.classes}

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files, and the
        mapping of values.

        Raises:
            SettingError: no such folder or split, no images, or a value with two meanings.
        """
        mapping = hashlib.sha256(self._table.tobytes()).hexdigest()
        yield from record_slices(
            self._files(),
            rows_per_shard,
            scratch,
            "label-maps",
            digest=lambda part: json_digest([mapping, self.images, self.labels, part]),
            stored=lambda file: file[:2],
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that is missing or cannot be used is a problem."""
        for image, label in slice_records(piece):
            yield self._row(image, label)

    def schema(self) -> Mapping[str, type]:
        """``name``: the image's path without its extension; ``mask_digest`` shows a refresh which labels changed."""
        return {"name": str, "mask_digest": str}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        """For each value of a label file the value of ``mask.png``, or ``REFUSED``."""
        count = len(self.classes)
        values = self.class_values or tuple(range(1, count + 1))
        require(len(values) == count, "class_values", len(values), f"one for each of the {count} classes of the card")
        void = VOID_VALUE if count < VOID_VALUE else WIDE_VOID
        others = {"refuse": REFUSED, "unlabelled": UNLABELLED, "void": void}[self.other_values]
        table = np.full(WIDE_VOID + 1, others, np.int64)
        meanings = [(value, number) for number, value in enumerate(values, 1)]
        meanings += [(value, UNLABELLED) for value in self.unlabelled_values] + [(v, void) for v in self.void_values]
        every = [value for value, _ in meanings]
        twice = sorted({value for value in every if every.count(value) > 1}) if len({*every}) < len(every) else []
        allowed = "values with one meaning each, among classes, unlabelled and void"
        require(not twice, "class_values, unlabelled_values, void_values", twice[:5], allowed)
        for value, meaning in meanings:
            table[value] = meaning
        return table

    def _files(self) -> list[tuple[str, str, str, str]]:
        """Paths of image and label, relative to their subfolders, and the version stamps of both."""
        images, labels = self._found("images"), self._found("labels")
        paths = [path for path in images if path.lower().endswith(ENDINGS) and not is_hidden(path)]
        require(bool(paths), "images", self.images, f"a subfolder of {self.folder} with images ({' '.join(ENDINGS)})")
        if self.split:
            stems = {_stem(path): path for path in reversed(paths)}
            paths = [stems.get(_stem(name), name) for name in self._names()]
        pairs = [(path, _stem(path) + self.label_suffix) for path in paths]
        some = any(label in labels for _, label in pairs)
        require(some, "labels", self.labels, f"a subfolder of {self.folder} with {pairs[0][1]} and the others in it")
        return [
            (path, label, file_stamp(images.get(path, {})), file_stamp(labels.get(label, {}))) for path, label in pairs
        ]

    def _found(self, field: str) -> dict[str, Any]:
        """The files below a subfolder: relative paths and fsspec's facts."""
        require(bool(self.folder), "folder", self.folder, "the folder of the dataset")
        if self._place.kind() != "directory":
            raise missing("folder", self.folder)
        name = getattr(self, field)
        place = self._place.folder(name) if name else self._place
        if place.kind() != "directory":
            raise missing(field, place.uri)
        return place.find()

    def _names(self) -> list[str]:
        """The images of the split."""
        try:
            text = self._place.read_text(self.split)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise missing("split", self._place.join(self.split)) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self._place.join(self.split)} is no text ({error})") from error
        names = [line.split()[0] for line in text.splitlines() if line.strip()]
        bad = next((name for name in names if name.startswith("/") or ".." in name.split("/")), "")
        require(not bad, "split", self.split, f"a file of paths relative to {self.images}, not {bad!r}")
        require(bool(names), "split", self.split, "a file with the name of an image in each line")
        return names

    def _row(self, image: str, label: str) -> Row:
        url = f"{self.images.strip('/')}/{image}" if self.images else image
        columns = {"name": _stem(image), "mask_digest": ""}
        try:
            content, mask = self._read("images", image), self._mask(self._read("labels", label), label)
        except SampleError as problem:
            return Row(url=url, columns=columns, problem=problem)
        columns["mask_digest"] = hashlib.sha256(mask).hexdigest()[:16]
        return Row(url=url, parts=(Part("image", content),), members={MASK_FIELD: mask}, columns=columns)

    def _read(self, field: str, path: str) -> bytes:
        name = getattr(self, field)
        full = f"{name.strip('/')}/{path}" if name else path
        try:
            return self._place.read_bytes(full)
        except FileNotFoundError as error:
            reason = "no_mask" if field == "labels" else "unreadable"
            raise SampleError("failed_to_download", reason, f"there is no file {full}") from error
        except OSError as error:
            raise SampleError("failed_to_download", "unreadable", f"cannot read {full}: {error}") from error

    def _mask(self, label: bytes, path: str) -> bytes:
        """A label file as ``mask.png``."""
        try:
            values = decode_values(label)
        except DataError as error:
            raise SampleError("failed_to_resize", "bad_mask", f"{path}: {error}") from error
        mapped = self._table[values]
        if mapped.max(initial=0) == REFUSED:
            outside = np.unique(values[mapped == REFUSED])[:5].tolist()
            message = f"{path} has the values {', '.join(map(str, outside))}, which no class has"
            raise SampleError("failed_to_resize", "bad_mask", message)
        narrow = len(self.classes) < VOID_VALUE
        return encode_values(mapped.astype(np.uint8 if narrow else np.uint16))


def _stem(path: str) -> str:
    """The path without the extension of an image."""
    for ending in ENDINGS:
        if path.lower().endswith(ending):
            return path[: -len(ending)]
    return path
