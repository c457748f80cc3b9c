"""Label maps: the class of every pixel of an image, and their reader.

A label map is int16 [H, W], a class number or ``VOID``, which losses and metrics leave out. It is made from

- ``boxes.json``: the masks of objects, larger ones painted first, so that a small object stays visible on a large one.
  Crowds and objects without a mask (their whole box) are void, and are painted before all others;
- ``mask.png``: value v is class v of ``mask_classes``, counted from 1; 0 is an unlabelled pixel and 255 is void
  (``shards/label_values.py`` has the rules of 16 bits and of palettes).

Rules for both:

- classes are compared by ``plain_word``; pixels of a class that is none of ``classes`` are void, since it is known that
  they are something else;
- pixels of other classes may instead count as unlabelled (``other_classes``), as in the authors' code of LSeg;
- the class of an object is its value of ``label_key``, such as ``supercategory``;
- unlabelled pixels are void, or the class ``unlabelled``;
- a ``mask.png`` of another size than its image, of another kind, or with a value beyond ``mask_classes`` makes the
  sample unreadable. Objects of another size than their image are an error, as for a detector: the data were resized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.detection import Placement, RandomResize
from pipeline.loaders.images import MAX_PIXELS, as_stored, decode, encoded_image
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.label_values import MASK_FIELD, decode_values, void_of
from pipeline.shards.objects import FIELD, Objects, names_of, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of

VOID = -1
MOST_CLASSES = 32_767
LabelField = Literal["boxes.json", "mask.png"]
OtherClasses = Literal["void", "unlabelled"]
LabelMap = NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class LabelClasses:
    """The class numbers of labels: the position in ``classes``. Any name of a class is accepted (``couch; sofa``)."""

    classes: tuple[str, ...]
    field: LabelField = FIELD  # type: ignore[assignment]  # a plain str in shards/objects.py
    unlabelled: str = ""
    mask_classes: tuple[str, ...] = ()
    other_classes: OtherClasses = "void"
    label_key: str = "label"

    def __post_init__(self) -> None:
        count = len(self.classes)
        require(1 <= count <= MOST_CLASSES, "class_names", count, f"1 to {MOST_CLASSES} class names")
        known = not self.unlabelled or plain_word(self.unlabelled) in self.numbers
        require(known, "unlabelled", self.unlabelled, "one of the class names, or empty for void")

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Class numbers by plain word; of equal names the first class counts."""
        pairs = [(plain_word(name), number) for number, word in enumerate(self.classes) for name in names_of(word)]
        firsts = [(plain_word(word), number) for number, word in enumerate(self.classes)]
        return dict(reversed(pairs)) | dict(reversed(firsts))

    @property
    def ground(self) -> int:
        """The class number of unlabelled pixels."""
        return self.numbers[plain_word(self.unlabelled)] if self.unlabelled else VOID

    @cached_property
    def own_numbers(self) -> NDArray[np.int64]:
        """The class numbers that pixels of the data set can have, sorted."""
        found = {self.ground, *map(self.number, self.mask_classes)}
        return np.array(sorted(found - {VOID}), np.int64)

    def number(self, label: str) -> int:
        """The class number of ``label``; that of other classes is ``VOID``, or that of unlabelled pixels."""
        other = self.ground if self.other_classes == "unlabelled" else VOID
        return next((self.numbers[name] for name in map(plain_word, names_of(label)) if name in self.numbers), other)

    def label_map(self, sample: Sample, height: int, width: int) -> LabelMap:
        """The label map of a sample whose image has ``height`` x ``width`` pixels.

        Raises:
            UnreadableSample: no labels, labels that cannot be read, or a mask of another size.
            DataError: the objects belong to an image of another size.
        """
        if self.field == MASK_FIELD:
            return self._from_values(read_mask(sample, height, width, len(self.mask_classes)), sample.key)
        try:
            objects = read_objects(sample, self.label_key)
        except DataError as error:
            raise UnreadableSample(str(error)) from error
        objects.check_size(height, width, sample.key)
        try:
            return self._from_objects(objects)
        except DataError as error:
            raise UnreadableSample(f"{sample.key}: {error}") from error

    def _from_values(self, values: NDArray[np.int64], key: str) -> LabelMap:
        largest = int(values.max(initial=0))
        if largest > len(self.mask_classes):
            have = f"{largest}, but there are {len(self.mask_classes)} classes"
            raise UnreadableSample(f"{MASK_FIELD} of sample {key} has the value {have}")
        table = [VOID, self.ground, *map(self.number, self.mask_classes)]
        found: LabelMap = np.array(table, np.int16)[values + 1]
        return found

    def _from_objects(self, objects: Objects) -> LabelMap:
        painted = np.full((objects.height, objects.width), self.ground, np.int16)
        shapes = []
        for number, label in enumerate(objects.labels):
            segmentation, box = objects.segmentations[number], objects.boxes[number]
            if segmentation is None:
                mask = _filled(box, objects.height, objects.width)
            else:
                mask = mask_of(segmentation, objects.height, objects.width).astype(bool)
            vague = segmentation is None or objects.crowd[number]
            shapes.append((not vague, -int(mask.sum()), VOID if vague else self.number(label), mask))
        for _, _, number, mask in sorted(shapes, key=lambda shape: shape[:2]):
            painted[mask] = number
        return painted


def read_mask(sample: Sample, height: int, width: int, classes: int) -> NDArray[np.int64]:
    """The values of ``mask.png``, int64 [height, width]; ``VOID`` for void, by the number of ``classes``.

    Raises:
        UnreadableSample: no mask, not a PNG, an image with colours, or one of another size.
    """
    content = sample.fields.get(MASK_FIELD)
    if content is None:
        raise UnreadableSample(f"sample {sample.key} has no {MASK_FIELD}")
    try:
        values = decode_values(content, MAX_PIXELS)
    except DataError as error:
        raise UnreadableSample(f"{MASK_FIELD} of sample {sample.key}: {error}") from error
    if values.shape != (height, width):
        sizes = f"{values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}"
        raise UnreadableSample(f"{MASK_FIELD} of sample {sample.key} has {sizes}")
    found: NDArray[np.int64] = np.where(void_of(values, classes), VOID, values.astype(np.int64))
    return found


def _filled(box: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """The pixels that a box covers, also in part."""
    left, top, right, bottom = box
    mask = np.zeros((height, width), bool)
    mask[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))] = True
    return mask


def placed_labels(labels: LabelMap, place: Placement) -> LabelMap:
    """A label map in the square of its image: int16 [size, size], the nearest pixel's class, ``VOID`` as padding."""
    height, width = place.extent
    rows = (np.arange(height) + place.offset[0] + 0.5) * place.height / place.scaled[0]
    columns = (np.arange(width) + place.offset[1] + 0.5) * place.width / place.scaled[1]
    across = columns.astype(np.int64).clip(0, place.width - 1)
    if place.mirrored:
        across = place.width - 1 - across
    whole = np.full((place.size, place.size), VOID, np.int16)
    whole[:height, :width] = labels[rows.astype(np.int64).clip(0, place.height - 1)[:, None], across]
    return whole


@dataclass(frozen=True, kw_only=True)
class SegmentationReader:
    """Images and their label maps.

    image   uint8 [B, 3, size, size]
    labels  int16 [B, size, size], class numbers, ``VOID`` where there is none and in the padding

    In training both are resized, cut and mirrored by the numbers of one ``Placement``. Without a ``resize`` a batch has
    lists of both as they are stored, for evaluation.
    """

    classes: LabelClasses
    resize: RandomResize | None
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The image, and the field with labels."""
        return ("image", self.classes.field)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """One image, uint8 [3, H, W], and its label map; raises as :meth:`LabelClasses.label_map`."""
        pixels = decode(encoded_image(sample))
        labels = self.classes.label_map(sample, pixels.shape[0], pixels.shape[1])
        if self.resize is None:
            return {"image": as_stored(pixels), "labels": torch.from_numpy(labels)}
        place = self.resize.place(pixels.shape[0], pixels.shape[1], self.seed, at)
        return {"image": place.image(pixels), "labels": torch.from_numpy(placed_labels(labels, place))}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The tensors named above."""
        together: dict[str, list[Tensor]] = {key: [row[key] for row in rows] for key in ("image", "labels")}
        return together if self.resize is None else {key: default_collate(some) for key, some in together.items()}
