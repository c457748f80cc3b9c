"""Images with boxes, masks and stored regions, transformed together by random resizing and mirroring.

Ghiasi, Cui, Srinivas, Qian, Lin, Cubuk, Le, Zoph, 2020, arXiv 2012.07177. An image is resized to a random factor times
the size that fits the result. A random part as large as the result is cut out; missing pixels at the right and bottom
are filled. A :class:`Placement` transforms pixels, boxes and masks by the same numbers, so they stay aligned. It is a
pure function of (seed, epoch, sample number) and the image's size, like a crop in ``images.py``.

Objects with less than one visible pixel are dropped. Stored regions keep their rows, because their features stay; a
region that is cut away gets a box of zeros, which losses ignore. Both are padded with zeros to the batch's largest
number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import Pixels, decode, encoded_image, resize
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.objects import FIELD, Objects, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of
from pipeline.shards.sidecar import Wanted
from pipeline.stages.annotate.pseudo_boxes import JOB, objects_of_row

FILL = (124, 116, 104)  # ImageNet's mean, which becomes zero after normalisation
SMALLEST = 1.0
"""Smallest visible side of a box, in pixels of the result."""
BACKGROUND = -1
"""Label of a padding row."""

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class Placement:
    """The position of an image of ``height`` x ``width`` in a square of ``size``: mirrored, then resized to ``scaled``
    (height, width), then moved up and left by ``offset`` (y, x)."""

    height: int
    width: int
    size: int
    mirrored: bool
    scaled: tuple[int, int]
    offset: tuple[int, int]

    def image(self, pixels: Pixels) -> Tensor:
        """uint8 [height, width, 3] to uint8 [3, size, size]."""
        part = self._visible(resize(pixels[:, ::-1].copy() if self.mirrored else pixels, self.scaled, "bilinear"))
        whole = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        whole[:, : part.shape[1], : part.shape[2]] = part
        return whole

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the part of the square that shows the image."""
        return min(self.size, self.scaled[0] - self.offset[0]), min(self.size, self.scaled[1] - self.offset[1])

    def boxes(self, boxes: Boxes) -> Boxes:
        """[N, 4] boxes x1, y1, x2, y2 in the image's pixels to boxes in the square, clipped to its visible part."""
        moved = boxes.copy()
        if self.mirrored:
            moved[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        scale = np.array([self.scaled[1] / self.width, self.scaled[0] / self.height] * 2)
        moved = moved * scale - np.array([self.offset[1], self.offset[0]] * 2)
        seen: Boxes = moved.clip(0, np.array([self.extent[1], self.extent[0]] * 2))
        return seen

    def mask(self, mask: NDArray[np.uint8], box: NDArray[np.float64], cells: int) -> NDArray[np.uint8]:
        """The part of a whole image's ``mask`` inside a ``box`` of the square, on a grid of cells x cells."""
        scale = self.width / self.scaled[1], self.height / self.scaled[0]
        left, top = (box[0] + self.offset[1]) * scale[0], (box[1] + self.offset[0]) * scale[1]
        across, down = (box[2] - box[0]) * scale[0] / cells, (box[3] - box[1]) * scale[1] / cells
        if self.mirrored:
            left, across = self.width - left, -across
        # The centres of OpenCV's pixels are at whole numbers.
        matrix = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        grid = cv2.warpAffine(mask * np.uint8(255), matrix, (cells, cells), flags=flags)
        return (grid >= 128).astype(np.uint8)

    def _visible(self, scaled: Tensor) -> Tensor:
        (top, left), (height, width) = self.offset, self.extent
        return scaled[:, top : top + height, left : left + width]


def large_enough(boxes: Boxes) -> NDArray[np.bool_]:
    """Bool [N]: the boxes with sides of at least one pixel; False for NaN."""
    enough: NDArray[np.bool_] = np.logical_and.reduce(boxes[:, 2:] - boxes[:, :2] >= SMALLEST, axis=1)
    return enough


@dataclass(frozen=True, kw_only=True)
class RandomResize:
    """Random resizing (the paper's large-scale jitter) into a square of ``size`` pixels.

    A scale of (1, 1) without a flip is deterministic.
    """

    size: int = 1024
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of the random factor, uniform, relative to the size at which an image fits the square."""
    flip: float = 0.5
    """Probability of mirroring an image."""

    def __post_init__(self) -> None:
        require(32 <= self.size <= 4096, "image_size", self.size, "32 to 4096")
        require(0 < self.scale[0] <= self.scale[1] <= 8, "jitter_scale", self.scale, "0 < low <= high <= 8")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    def place(self, height: int, width: int, seed: int, at: SamplePosition | None) -> Placement:
        """The placement of the image of the sample at ``at``; :meth:`whole` in evaluation, where ``at`` is ``None``."""
        if at is None:
            return self.whole(height, width)
        uniform = ((random_bits(seed, RandomStream.PLACEMENTS, *at, 4) >> np.uint64(11)) * 2.0**-53).tolist()
        factor = self.scale[0] + uniform[0] * (self.scale[1] - self.scale[0])
        return self._placed(height, width, factor, uniform[1] < self.flip, (uniform[2], uniform[3]))

    def whole(self, height: int, width: int) -> Placement:
        """The whole image at the top left, as large as fits."""
        return self._placed(height, width, 1.0, False, (0.0, 0.0))

    def _placed(
        self, height: int, width: int, factor: float, mirrored: bool, uniform: tuple[float, float]
    ) -> Placement:
        shrink = self.size * factor / max(height, width)
        scaled = max(1, round(height * shrink)), max(1, round(width * shrink))
        offset = [int(u * (max(side - self.size, 0) + 1)) for u, side in zip(uniform, scaled, strict=True)]
        return Placement(height, width, self.size, mirrored, scaled, (offset[0], offset[1]))


@dataclass(frozen=True)
class Targets:
    """The visible objects of a sample: ``boxes`` [N, 4] in the square and ``labels`` [N], class numbers; ``numbers``
    are their indices in ``objects``."""

    placement: Placement
    objects: Objects
    numbers: tuple[int, ...]
    boxes: Boxes
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StoredRegions:
    """The sidecar with stored regions, as a reader uses it."""

    wanted: Wanted
    width: int
    """Dimensions of a feature."""
    most: int = 300
    """Maximum number of regions per image; the first ones are used, which are the best."""


@dataclass(frozen=True, kw_only=True)
class StoredBoxes:
    """The sidecar with pseudo boxes, as a reader uses it."""

    wanted: Wanted
    least_score: float = 0.5
    """Minimum score of a box."""

    @classmethod
    def named(cls, name: str, least_score: float) -> "StoredBoxes | None":
        """The sidecar ``name``, in the data sets that have it; ``None`` without a name.

        Raises:
            SettingError: no name of a sidecar, or a score out of range.
        """
        require(0 <= least_score <= 1, "least_box_score", least_score, "0 to 1")
        require(not name or name.isidentifier(), "pseudo_boxes", name, "the name of a sidecar, a plain word")
        return cls(wanted=Wanted(name=name, job=JOB, optional=True), least_score=least_score) if name else None


def objects_in(
    sample: Sample, stored: StoredBoxes | None = None, seed: int = 0, at: SamplePosition | None = None
) -> Objects:
    """The objects of ``sample``: those of its row of ``stored`` where it has one, else of ``boxes.json``.

    They come with one of their captions, among those whose phrases name objects: the first one, in training a random
    one.

    Raises:
        UnreadableSample: ``boxes.json`` is malformed, or the image was unreadable when the pseudo boxes were made.
        DataError: neither a row nor ``boxes.json``.
        SidecarError: a malformed row.
    """
    found = _all_objects(sample, stored)
    usable = [n for n, one in enumerate(found.captions) if any(phrase.objects for phrase in one.phrases)] or [0]
    chosen = 0 if at is None else int(random_bits(seed, RandomStream.TEXTS, *at, 1)[0] % len(usable))
    return found.with_caption(usable[chosen])


def _all_objects(sample: Sample, stored: StoredBoxes | None) -> Objects:
    if stored is not None:
        row = sample.rows.get(stored.wanted.name)
        if row is not None:
            found = objects_of_row(row, stored.least_score)
            if found is None:
                raise UnreadableSample(f"{sample.key} had no readable image when its pseudo boxes were made")
            return found
        if FIELD not in sample.fields:
            missing = f"neither {FIELD} nor pseudo boxes ({stored.wanted.name})"
            raise DataError(f"sample {sample.key} has {missing}; make them with {stored.wanted.job}")
    try:
        return read_objects(sample)
    except DataError as error:
        raise UnreadableSample(str(error)) from error


def masks_in(
    boxes: Boxes, objects: Objects, numbers: Sequence[int], placement: Placement, cells: int, unknown: int
) -> Tensor:
    """The masks of the objects ``numbers``, each inside its row of ``boxes`` [N, 4] of the square.

    uint8 [N, cells, cells] of 0 and 1, or of ``unknown`` for an object without a segmentation; raises
    ``UnreadableSample`` for a malformed one.
    """
    masks = torch.full((len(numbers), cells, cells), unknown, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        segmentation = objects.segmentations[number] if objects.segmentations else None
        if segmentation:
            try:
                whole = mask_of(segmentation, objects.height, objects.width)
            except DataError as error:
                raise UnreadableSample(f"{objects.key}: {error}") from error
            masks[row] = torch.from_numpy(placement.mask(whole, boxes[row], cells))
    return masks


KEYS = ("image", "extent", "boxes", "labels", "masks", "region_boxes", "region_features", "draws")
"""The keys that :class:`DetectionReader` can read."""
_FILLS = {"boxes": 0.0, "labels": BACKGROUND, "masks": 0, "region_boxes": 0.0, "region_features": 0.0}


@dataclass(frozen=True, kw_only=True)
class DetectionReader:
    """Images in a square and their objects, parsed once for all ``keys``.

    image            uint8 [B, 3, size, size]
    extent           int64 [B, 2], height and width of the part without padding
    boxes            float32 [B, N, 4], x1, y1, x2, y2 in pixels of the square, padded with zeros; N is at least 1
    labels           int64 [B, N], class numbers, padded with ``BACKGROUND``
    masks            uint8 [B, N, cells, cells] of 0 and 1, each on a grid over its object's own box
    region_boxes     float32 [B, M, 4], stored regions in the square; zeros where they were cut away
    region_features  float16 [B, M, D], the features of these regions, L2-normalised
    draws            int64 [B], a random number per sample, independent of the rank that reads it

    Objects are those of ``boxes.json``, or the ``pseudo`` boxes of a sidecar, whose labels are phrases. Objects of
    other classes (labels and names are compared by ``plain_word``) and crowds are left out; their images stay. Without
    ``classes`` all objects have class 0. At most ``most`` objects per image are read, the first ones.

    A mask on a grid takes 12.5 kB at 112 cells. A bit mask of an image of 1024 x 1024 pixels would take 131 kB. An
    object without a segmentation gets a mask that fills its box.
    """

    keys: tuple[str, ...]
    resize: RandomResize
    classes: tuple[str, ...] = ()
    most: int = 300
    seed: int = 0
    mask_cells: int = 112
    regions: StoredRegions | None = None
    pseudo: StoredBoxes | None = None

    def __post_init__(self) -> None:
        require(bool(self.keys) and set(self.keys) <= set(KEYS), "keys", self.keys, "some of " + ", ".join(KEYS))
        stored = not {"region_boxes", "region_features"} & set(self.keys)
        require(stored or self.regions is not None, "regions", None, "the sidecar of the stored regions")

    @property
    def fields(self) -> Sequence[str]:
        """The objects, unless a sidecar has them, and the image if a key needs it."""
        objects = (FIELD,) if self.pseudo is None else ()
        return ("image", *objects) if "image" in self.keys else objects

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The stored regions and the pseudo boxes, where they are read."""
        return tuple(one.wanted for one in (self.regions, self.pseudo) if one is not None)

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """The values of ``keys``; :meth:`collate` pads them.

        Raises:
            UnreadableSample: objects, a segmentation or an image cannot be read.
            DataError: the boxes belong to an image of another size.
            SidecarError: the regions belong to an image of another size, or boxes and features differ in number.
        """
        targets = self.find(sample, at)
        return {key: self._value(key, sample, at, targets) for key in self.keys}

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        return {key: self._collated(key, [row[key] for row in rows]) for key in self.keys}

    def find(self, sample: Sample, at: SamplePosition | None) -> Targets:
        """The objects of ``sample``; raises ``UnreadableSample`` where they cannot be read."""
        objects = objects_in(sample, self.pseudo, self.seed, at)
        placement = self.resize.place(objects.height, objects.width, self.seed, at)
        moved = placement.boxes(objects.boxes)
        wanted = [self._numbers.get(plain_word(label), BACKGROUND) if self.classes else 0 for label in objects.labels]
        kept = [
            number
            for number, (enough, label, crowd) in enumerate(
                zip(large_enough(moved), wanted, objects.crowd, strict=True)
            )
            if enough and label != BACKGROUND and not crowd
        ][: self.most]
        return Targets(placement, objects, tuple(kept), moved[kept], tuple(wanted[number] for number in kept))

    def _value(self, key: str, sample: Sample, at: SamplePosition | None, targets: Targets) -> Any:
        match key:
            case "image":
                return self._image(sample, targets)
            case "extent":
                return targets.placement.extent
            case "boxes":
                return torch.from_numpy(targets.boxes).float()
            case "labels":
                return torch.tensor(targets.labels, dtype=torch.int64)
            case "masks":
                return self._masks(targets)
            case "region_boxes":
                return self._region_boxes(sample, targets)
            case "region_features":
                return self._region_features(sample)
        return 0 if at is None else int(random_bits(self.seed, RandomStream.DRAWS, *at, 1)[0] >> np.uint64(1))

    def _collated(self, key: str, values: list[Any]) -> Tensor:
        if key in _FILLS:
            return padded(values, _FILLS[key])
        stacked: Tensor = default_collate(values) if key == "image" else torch.tensor(values, dtype=torch.int64)
        return stacked

    def _image(self, sample: Sample, targets: Targets) -> Tensor:
        pixels = decode(encoded_image(sample))
        targets.objects.check_size(pixels.shape[0], pixels.shape[1], sample.key)
        return targets.placement.image(pixels)

    def _masks(self, targets: Targets) -> Tensor:
        cells, numbers = self.mask_cells, targets.numbers
        return masks_in(targets.boxes, targets.objects, numbers, targets.placement, cells, unknown=1)

    def _region_boxes(self, sample: Sample, targets: Targets) -> Tensor:
        assert self.regions is not None
        wanted = self.regions.wanted
        row = sample.rows[wanted.name]
        boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)[: self.regions.most]
        height, width = targets.objects.height, targets.objects.width
        if len(boxes) and (row["height"], row["width"]) != (height, width):
            sizes = f"{row['width']} x {row['height']} pixels, its boxes of one of {width} x {height}"
            raise SidecarError(
                f"{wanted.name} of sample {sample.key} are of an image of {sizes}; make them with {wanted.job}"
            )
        moved = targets.placement.boxes(boxes * [width, height, width, height])
        return torch.from_numpy(np.where(large_enough(moved)[:, None], moved, 0.0)).float()

    def _region_features(self, sample: Sample) -> Tensor:
        assert self.regions is not None
        wanted, width = self.regions.wanted, self.regions.width
        row = sample.rows[wanted.name]
        features = np.frombuffer(row["features"], np.float16)
        if len(features) * 4 != len(row["boxes"]) * width:
            raise SidecarError(
                f"{wanted.name} of sample {sample.key} have {len(row['boxes']) // 4} boxes and {len(features)} "
                f"numbers, not {width} for each; make them again with {wanted.job}"
            )
        return torch.from_numpy(features.reshape(-1, width)[: self.regions.most].copy())

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {plain_word(name): number for number, name in enumerate(self.classes)}


def padded(values: list[Tensor], fill: float) -> Tensor:
    """Tensors [n, ...] of different n as one tensor [B, N, ...], filled at the end; N is at least 1."""
    most = max(1, *(len(value) for value in values))
    out = values[0].new_full((len(values), most, *values[0].shape[1:]), fill)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out
