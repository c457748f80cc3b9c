"""Images with boxes, masks and stored regions, moved together: large-scale jitter and a mirror.

Ghiasi, Cui, Srinivas, Qian, Lin, Cubuk, Le, Zoph, 2020, arXiv 2012.07177: an image is resized so that it would fill
the result times a random factor, a random part of it as large as the result is cut out, and what is missing at the
right and below is filled. A :class:`Place` is where one image comes to lie; it moves pixels, boxes and masks by the
same numbers, so nothing can be mirrored that is not mirrored elsewhere. It is a pure function of (seed, epoch, sample
number) and the image's size, as a crop is in ``images.py``.

What is cut away: objects of which less than a pixel is left are left out. Stored regions keep their rows, since their
features stay, but a box of zeros, which no loss counts. Both are padded with zeros to the batch's largest number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.config import require
from pipeline.errors import DataError, SidecarError
from pipeline.loaders.images import Pixels, decode, resize
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.objects import FIELD, Objects, plain_word, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.segmentation import mask_of
from pipeline.shards.sidecar import Wanted

FILL = (124, 116, 104)  # ImageNet's mean, which normalisation makes zero
SMALLEST = 1.0
"""Pixels of the result: what has a shorter side is left out."""
BACKGROUND = -1
"""The label of a row that only pads."""

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where an image of ``height`` x ``width`` comes to lie in a square of ``size``: mirrored, then resized to
    ``scaled`` (height, width), then moved up and left by ``offset`` (y, x)."""

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
        """Boxes x1, y1, x2, y2 in the image's pixels, [N, 4], in the square's, cut to what is seen of it."""
        moved = boxes.copy()
        if self.mirrored:
            moved[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        scale = np.array([self.scaled[1] / self.width, self.scaled[0] / self.height] * 2)
        moved = moved * scale - np.array([self.offset[1], self.offset[0]] * 2)
        seen: Boxes = moved.clip(0, np.array([self.extent[1], self.extent[0]] * 2))
        return seen

    def mask(self, mask: NDArray[np.uint8], box: NDArray[np.float64], cells: int) -> NDArray[np.uint8]:
        """The part of a whole image's ``mask`` that a ``box`` in the square shows, on a grid of cells x cells."""
        scale = self.width / self.scaled[1], self.height / self.scaled[0]
        left, top = (box[0] + self.offset[1]) * scale[0], (box[1] + self.offset[0]) * scale[1]
        across, down = (box[2] - box[0]) * scale[0] / cells, (box[3] - box[1]) * scale[1] / cells
        if self.mirrored:
            left, across = self.width - left, -across
        # OpenCV's pixels have their middle at whole numbers.
        matrix = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        grid = cv2.warpAffine(mask * np.uint8(255), matrix, (cells, cells), flags=flags)
        return (grid >= 128).astype(np.uint8)

    def _visible(self, scaled: Tensor) -> Tensor:
        (top, left), (height, width) = self.offset, self.extent
        return scaled[:, top : top + height, left : left + width]


def large_enough(boxes: Boxes) -> NDArray[np.bool_]:
    """Bool [N]: which boxes still have sides of a pixel; none that is no number."""
    enough: NDArray[np.bool_] = np.logical_and.reduce(boxes[:, 2:] - boxes[:, :2] >= SMALLEST, axis=1)
    return enough


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Large-scale jitter into a square of ``size`` pixels; with a scale of (1, 1) and no flip nothing is random."""

    size: int = 1024
    scale: tuple[float, float] = (0.1, 2.0)
    """Factors, between which one is drawn evenly, of the size at which an image just fits."""
    flip: float = 0.5
    """Probability of a mirrored image."""

    def __post_init__(self) -> None:
        require(32 <= self.size <= 4096, "image_size", self.size, "32 to 4096")
        require(0 < self.scale[0] <= self.scale[1] <= 8, "jitter_scale", self.scale, "0 < low <= high <= 8")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    def place(self, height: int, width: int, seed: int, place: tuple[int, int]) -> Place:
        """Where the image of the sample at ``place``, (epoch, number), comes to lie."""
        uniform = ((random_bits(seed, RandomStream.PLACEMENTS, *place, 4) >> np.uint64(11)) * 2.0**-53).tolist()
        factor = self.scale[0] + uniform[0] * (self.scale[1] - self.scale[0])
        return self._placed(height, width, factor, uniform[1] < self.flip, (uniform[2], uniform[3]))

    def whole(self, height: int, width: int) -> Place:
        """The whole image as large as fits, at the top left."""
        return self._placed(height, width, 1.0, False, (0.0, 0.0))

    def _placed(self, height: int, width: int, factor: float, mirrored: bool, uniform: tuple[float, float]) -> Place:
        shrink = self.size * factor / max(height, width)
        scaled = max(1, round(height * shrink)), max(1, round(width * shrink))
        offset = [int(u * (max(side - self.size, 0) + 1)) for u, side in zip(uniform, scaled, strict=True)]
        return Place(height, width, self.size, mirrored, scaled, (offset[0], offset[1]))


@dataclass(frozen=True)
class Found:
    """The objects of a sample that its place shows: ``boxes`` [N, 4] in the square, ``labels`` [N], class numbers;
    ``numbers`` are their places in ``objects``."""

    place: Place
    objects: Objects
    numbers: tuple[int, ...]
    boxes: Boxes
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What of the samples' objects is to be learnt, and where it lies; shared by the readers of one batch.

    Objects of other classes (labels and names are compared by ``plain_word``) and crowds are left out, their images
    are not; without ``classes`` all objects are of class 0. ``most`` objects of an image are taken, the first ones.
    """

    jitter: Jitter
    classes: tuple[str, ...] = ()
    most: int = 300
    seed: int = 0

    def find(self, sample: Sample, place: tuple[int, int]) -> Found:
        """The objects of ``sample``; raises ``UnreadableSample`` where they cannot be read."""
        return _found(self, _Identified(sample.key, sample.fields.get(FIELD, b""), sample), place)

    def look(self, sample: Sample, place: tuple[int, int]) -> Found:
        """:meth:`find`, done anew."""
        try:
            objects = read_objects(sample)
        except DataError as error:
            raise UnreadableSample(str(error)) from error
        where = self.jitter.place(objects.height, objects.width, self.seed, place)
        moved = where.boxes(objects.boxes)
        wanted = [self._numbers.get(plain_word(label), BACKGROUND) if self.classes else 0 for label in objects.labels]
        kept = [
            number
            for number, (enough, label, crowd) in enumerate(
                zip(large_enough(moved), wanted, objects.crowd, strict=True)
            )
            if enough and label != BACKGROUND and not crowd
        ][: self.most]
        return Found(where, objects, tuple(kept), moved[kept], tuple(wanted[number] for number in kept))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {plain_word(name): number for number, name in enumerate(self.classes)}


class _Identified:
    """A sample as a key of a cache: its own key and what is known of its objects."""

    def __init__(self, key: str, content: bytes, sample: Sample) -> None:
        self.identity, self.sample = (key, content), sample

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identified) and self.identity == other.identity


@lru_cache(maxsize=2)
def _found(scene: Scene, sample: _Identified, place: tuple[int, int]) -> Found:
    return scene.look(sample.sample, place)


@dataclass(frozen=True, kw_only=True)
class SceneReader:
    """Images as uint8 [B, 3, size, size]."""

    scene: Scene
    fields: Sequence[str] = ("image", FIELD)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """uint8 [3, size, size]; raises ``DataError`` where the boxes are of an image of another size."""
        found = self.scene.find(sample, place)
        content = sample.image()
        if content is None:
            raise UnreadableSample(f"{sample.key} has no image")
        pixels = decode(content)
        found.objects.check_size(pixels.shape[0], pixels.shape[1], sample.key)
        return found.place.image(pixels)

    def collate(self, values: list[Tensor]) -> Tensor:
        """uint8 [B, 3, size, size]."""
        stacked: Tensor = default_collate(values)
        return stacked


@dataclass(frozen=True, kw_only=True)
class ExtentReader:
    """Height and width of what is no padding: int64 [B, 2]."""

    scene: Scene
    fields: Sequence[str] = (FIELD,)

    def read(self, sample: Sample, place: tuple[int, int]) -> tuple[int, int]:
        """(height, width)."""
        return self.scene.find(sample, place).place.extent

    def collate(self, values: list[tuple[int, int]]) -> Tensor:
        """int64 [B, 2]."""
        return torch.tensor(values, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class BoxReader:
    """The objects' boxes, x1, y1, x2, y2 in pixels of the square: float32 [B, N, 4], padded with zeros."""

    scene: Scene
    fields: Sequence[str] = (FIELD,)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """float32 [n, 4]."""
        return torch.from_numpy(self.scene.find(sample, place).boxes).float()

    def collate(self, values: list[Tensor]) -> Tensor:
        """float32 [B, N, 4]; N is at least 1."""
        return padded(values, 0.0)


@dataclass(frozen=True, kw_only=True)
class ObjectLabelReader:
    """The objects' class numbers: int64 [B, N], padded with ``BACKGROUND``."""

    scene: Scene
    fields: Sequence[str] = (FIELD,)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """int64 [n]."""
        return torch.tensor(self.scene.find(sample, place).labels, dtype=torch.int64)

    def collate(self, values: list[Tensor]) -> Tensor:
        """int64 [B, N]."""
        return padded(values, BACKGROUND)


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """The objects' masks, each on a grid over its own box: uint8 [B, N, cells, cells] of 0 and 1.

    300 objects take 3.8 MB at 112 cells, where bits over an image of 1024 pixels a side would take 39 MB. What has no
    segmentation is taken to fill its box.
    """

    scene: Scene
    cells: int
    fields: Sequence[str] = (FIELD,)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """uint8 [n, cells, cells]; raises ``UnreadableSample`` for a segmentation that is none."""
        found = self.scene.find(sample, place)
        masks = torch.ones((len(found.numbers), self.cells, self.cells), dtype=torch.uint8)
        for row, number in enumerate(found.numbers):
            segmentation = found.objects.segmentations[number]
            if segmentation:
                masks[row] = torch.from_numpy(self._mask(segmentation, found, row, sample.key))
        return masks

    def collate(self, values: list[Tensor]) -> Tensor:
        """uint8 [B, N, cells, cells]."""
        return padded(values, 0)

    def _mask(self, segmentation: Any, found: Found, row: int, key: str) -> NDArray[np.uint8]:
        try:
            whole = mask_of(segmentation, found.objects.height, found.objects.width)
        except DataError as error:
            raise UnreadableSample(f"{key}: {error}") from error
        return found.place.mask(whole, found.boxes[row], self.cells)


@dataclass(frozen=True, kw_only=True)
class RegionBoxReader:
    """The boxes of stored regions, where the image now shows them: float32 [B, M, 4], padded with zeros.

    Those that were cut away are zeros too, since rows belong to those of :class:`RegionFeatureReader`. The first
    ``most`` regions are taken, the best ones.
    """

    scene: Scene
    wanted: Wanted
    most: int = 300
    fields: Sequence[str] = (FIELD,)

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The regions."""
        return (self.wanted,)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """float32 [m, 4]; raises ``SidecarError`` for regions of an image of another size."""
        row, found = sample.rows[self.wanted.name], self.scene.find(sample, place)
        boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)[: self.most]
        height, width = found.objects.height, found.objects.width
        if len(boxes) and (row["height"], row["width"]) != (height, width):
            sizes = f"{row['width']} x {row['height']} pixels, its boxes of one of {width} x {height}"
            raise SidecarError(
                f"{self.wanted.name} of sample {sample.key} are of an image of {sizes}; make them with "
                f"{self.wanted.job}"
            )
        moved = found.place.boxes(boxes * [width, height, width, height])
        return torch.from_numpy(np.where(large_enough(moved)[:, None], moved, 0.0)).float()

    def collate(self, values: list[Tensor]) -> Tensor:
        """float32 [B, M, 4]."""
        return padded(values, 0.0)


@dataclass(frozen=True, kw_only=True)
class RegionFeatureReader:
    """The features of stored regions, L2-normalised: float16 [B, M, D], padded with zeros."""

    wanted: Wanted
    width: int
    most: int = 300
    fields: Sequence[str] = ()

    @property
    def sidecars(self) -> tuple[Wanted, ...]:
        """The regions."""
        return (self.wanted,)

    def read(self, sample: Sample, place: tuple[int, int]) -> Tensor:
        """float16 [m, D]; raises ``SidecarError`` where there are not as many as boxes."""
        row = sample.rows[self.wanted.name]
        features = np.frombuffer(row["features"], np.float16)
        if len(features) * 4 != len(row["boxes"]) * self.width:
            raise SidecarError(
                f"{self.wanted.name} of sample {sample.key} have {len(row['boxes']) // 4} boxes and {len(features)} "
                f"numbers, not {self.width} for each; make them again with {self.wanted.job}"
            )
        return torch.from_numpy(features.reshape(-1, self.width)[: self.most].copy())

    def collate(self, values: list[Tensor]) -> Tensor:
        """float16 [B, M, D]."""
        return padded(values, 0.0)


@dataclass(frozen=True, kw_only=True)
class DrawReader:
    """A random number for each sample, by which its anchors and regions are drawn, whichever rank has it: int64 [B]."""

    seed: int = 0
    fields: Sequence[str] = ()

    def read(self, sample: Sample, place: tuple[int, int]) -> int:
        """0 to 2**63 - 1."""
        return int(random_bits(self.seed, RandomStream.DRAWS, *place, 1)[0] >> np.uint64(1))

    def collate(self, values: list[int]) -> Tensor:
        """int64 [B]."""
        return torch.tensor(values, dtype=torch.int64)


def padded(values: list[Tensor], fill: float) -> Tensor:
    """Tensors [n, ...] of different n as one, [B, N, ...], filled behind each; N is at least 1."""
    most = max(1, *(len(value) for value in values))
    out = values[0].new_full((len(values), most, *values[0].shape[1:]), fill)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out
