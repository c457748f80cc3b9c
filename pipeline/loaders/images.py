"""Encoded images to uint8 tensors: decode, crop, resize.

An image stays uint8 until it is on the training device, where the model normalises it: a quarter of the bytes through
shared memory and over PCIe. The resize is antialiased bicubic and within one level of Pillow's and open_clip's. It uses
torch's vectorised uint8 kernel, which is five times faster than Pillow's.

For training, a JPEG is decoded at a half, a quarter or an eighth of its size if the crop is much larger than the
result; libjpeg does this in the frequency domain. The decoded crop is at least 1.25 times the result. The box is
aligned to the pixels of the smaller image, so the crop is not shifted. Measured in tests/loaders/test_images.py: 38 dB
or more on average against Pillow's bicubic of the same box at full size. Evaluation decodes whole images.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError, SampleError, unreadable
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.pixels import MAX_PIXELS as MAX_PIXELS
from pipeline.shards.pixels import Pixels as Pixels
from pipeline.shards.pixels import rgb
from pipeline.shards.sample import Sample
from pipeline.shards.storage import split_file

Box = tuple[int, int, int, int]

ATTEMPTS = 10
SHRINKS = (8, 4, 2)  # 1 / what libjpeg decodes to with vector instructions; 3/8, 5/8 and so on are slower than 1
MARGIN = 1.25  # smallest ratio of a reduced crop to the result; below it, sharp photographs fall to 36 dB


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Converts an image to a tensor of ``size`` (height, width).

    ``crop`` is

    - ``"centre"``: resize as ``fit`` says, then cut the centre; for evaluation, equal to open_clip's transform;
    - ``"square"``: a random square with the short side's length, the only augmentation of the CLIP paper (section 2.5);
    - ``"resized"``: a random box with an area of ``scale`` times the image's and an aspect ratio within ``ratio``.

    ``fit`` is ``"shortest"`` (short side to size, then crop), ``"longest"`` (long side to size, then pad with
    ``fill``) or ``"squash"``. Random boxes are resized to ``size`` regardless of ``fit``. ``flip`` is the probability
    of mirroring an image.
    """

    size: tuple[int, int]
    crop: Literal["centre", "square", "resized"] = "centre"
    fit: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    fill: int = 0

    def __post_init__(self) -> None:
        require(min(self.size) >= 1 and max(self.size) <= 4096, "size", self.size, "1 to 4096 pixels a side")
        require(0 < self.scale[0] <= self.scale[1] <= 1, "crop_scale", self.scale, "0 < low <= high <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], "crop_ratio", self.ratio, "0 < low <= high")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    @property
    def random(self) -> bool:
        """Whether the result depends on random bits."""
        return self.crop != "centre" or self.flip > 0

    def __call__(self, pixels: Pixels, random_bits: NDArray[np.uint64] | None = None) -> Tensor:
        """uint8 [H, W, 3] to uint8 [3, height, width]; ``random_bits`` are from :func:`crop_bits`."""
        if self.crop == "centre":
            tensor = self._centre(pixels)
        else:
            assert random_bits is not None, "a random crop needs random bits"
            tensor = self._cut(pixels, self.box(pixels.shape[0], pixels.shape[1], random_bits))
        return self._flipped(tensor, random_bits)

    def read(self, content: bytes, random_bits: NDArray[np.uint64] | None = None) -> Tensor:
        """The encoded image ``content`` to uint8 [3, height, width]: like decoding and calling, but faster if possible.

        Raises:
            UnreadableSample: as :func:`decode`.
        """
        size = None if self.crop == "centre" or random_bits is None else _jpeg_size(content)
        if size is not None and random_bits is not None:
            box, shrink = self._place(*size, random_bits)
            pixels = _decode_smaller(content, size, shrink) if shrink > 1 else None
            if pixels is not None:
                top, left, height, width = (length // shrink for length in box)
                return self._flipped(self._cut(pixels, (top, left, height, width)), random_bits)
        return self(decode(content), random_bits)

    def box(self, height: int, width: int, random_bits: NDArray[np.uint64]) -> Box:
        """(top, left, height, width) of a random crop in an image of this size."""
        return self._place(height, width, random_bits)[0]

    def _place(self, height: int, width: int, random_bits: NDArray[np.uint64]) -> tuple[Box, int]:
        """The box, and the factor by which the image may be decoded smaller; the box's edges are multiples of it."""
        top, left, box_height, box_width = self._box(height, width, _uniforms(random_bits[1:]))
        ratio = min(box_height / self.size[0], box_width / self.size[1]) / MARGIN
        shrink = next((shrink for shrink in SHRINKS if ratio >= shrink), 1)
        snapped = tuple(length - length % shrink for length in (top, left, box_height, box_width))
        return (snapped[0], snapped[1], snapped[2], snapped[3]), shrink

    def _cut(self, pixels: Pixels, box: Box) -> Tensor:
        top, left, height, width = box
        return resize(pixels[top : top + height, left : left + width], self.size, self.interpolation)

    def flips(self, random_bits: NDArray[np.uint64]) -> bool:
        """Whether the image is mirrored."""
        return bool(self.flip) and _uniforms(random_bits[:1])[0] < self.flip

    def _flipped(self, tensor: Tensor, random_bits: NDArray[np.uint64] | None) -> Tensor:
        return tensor.flip(-1) if random_bits is not None and self.flips(random_bits) else tensor

    def _box(self, height: int, width: int, uniform: list[float]) -> Box:
        if self.crop == "square":
            side = min(height, width)
            return int(uniform[0] * (height - side + 1)), int(uniform[1] * (width - side + 1)), side, side
        return random_resized_box(height, width, self.scale, self.ratio, uniform)

    def _centre(self, pixels: Pixels) -> Tensor:
        if self.fit == "squash":
            return resize(pixels, self.size, self.interpolation)
        fitted = self._fitted(pixels.shape[0], pixels.shape[1])
        return _middle(resize(pixels, fitted, self.interpolation), self.size, self.fill)

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        """The size before the central crop, rounded as open_clip rounds it: down for squares, else to the nearest."""
        if self.fit == "shortest" and self.size[0] == self.size[1]:
            side = self.size[0]
            return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        choose = max if self.fit == "longest" else min
        shrink = choose(height / self.size[0], width / self.size[1])
        return max(round(height / shrink), 1), max(round(width / shrink), 1)


def read_crops(content: bytes, crops: Sequence[tuple[ImageTransform, NDArray[np.uint64]]]) -> list[Tensor]:
    """Several random crops of the image ``content``, each a transform with its random bits; decodes once.

    A JPEG is decoded at the smallest size that is large enough for every crop.

    Raises:
        UnreadableSample: as :func:`decode`.
    """
    size = _jpeg_size(content)
    if size is not None:
        places = [transform._place(*size, random_bits) for transform, random_bits in crops]
        shrink = min(shrink for _, shrink in places)
        pixels = _decode_smaller(content, size, shrink) if shrink > 1 else None
        if pixels is not None:
            # Each box is aligned to its own factor, so also to the smallest one: all factors are powers of two.
            boxes = [(top // shrink, left // shrink, h // shrink, w // shrink) for (top, left, h, w), _ in places]
            cut = [transform._cut(pixels, box) for (transform, _), box in zip(crops, boxes, strict=True)]
            return [crop._flipped(tensor, random_bits) for (crop, random_bits), tensor in zip(crops, cut, strict=True)]
    pixels = decode(content)
    return [transform(pixels, random_bits) for transform, random_bits in crops]


def crop_bits(seed: int, epoch: int, number: int) -> NDArray[np.uint64]:
    """The random bits for the image of sample ``number`` in ``epoch``; a pure function of the arguments."""
    return random_bits(seed, RandomStream.CROPS, epoch, number, 1 + 4 * ATTEMPTS)


def random_resized_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], uniform: list[float]
) -> Box:
    """(top, left, height, width) of a box of random area and aspect ratio (Szegedy et al. 2014, arXiv 1409.4842).

    The distribution is torchvision's RandomResizedCrop: area uniform in ``scale``, ratio log-uniform, ten attempts,
    then the largest central box with an allowed ratio. ``uniform`` are 40 numbers in [0, 1).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(ATTEMPTS):
        area, log_ratio, down, right = uniform[4 * attempt : 4 * attempt + 4]
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(low + log_ratio * (high - low))
        box_width, box_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize(pixels: Pixels, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """uint8 [H, W, 3] to uint8 [3, height, width], antialiased."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    if tuple(tensor.shape[1:]) == size:
        return tensor.contiguous()
    return functional.interpolate(tensor[None], size=size, mode=interpolation, antialias=True)[0].contiguous()


def encoded_image(sample: Sample) -> bytes:
    """The encoded image of ``sample``, whatever its format; raises ``UnreadableSample`` where it has none."""
    content = sample.image()
    if content is None:
        raise UnreadableSample(f"{sample.key} has no image")
    return content


def as_stored(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] to uint8 [3, H, W], without a transform."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def decode(content: bytes, upright: bool = False) -> Pixels:
    """The image in ``content`` as uint8 [H, W, 3], by the rules of :mod:`pipeline.shards.pixels`.

    Transparent pixels are white. EXIF orientation is ignored unless ``upright`` is set.

    Raises:
        UnreadableSample: not an image, a broken image, or more than ``MAX_PIXELS`` pixels.
    """
    try:
        # Pillow warns about odd metadata and large images; both are handled.
        with warnings.catch_warnings(action="ignore"):
            return rgb(content, MAX_PIXELS, upright)
    except SampleError as error:
        raise UnreadableSample(error.message) from error


def image_at(place: str) -> Pixels:
    """The image file at a path or fsspec URI, upright, as uint8 [H, W, 3].

    Raises:
        SettingError: no such file, or one that cannot be read.
        DataError: not an image.
    """
    folder, name = split_file(place)
    try:
        return decode(folder.read_bytes(name), upright=True)
    except UnreadableSample as error:
        raise DataError(f"{place} is not a readable image ({error})") from error
    except (OSError, ValueError) as error:
        raise unreadable("image", place, "an image", error) from error


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that may be decoded smaller; ``None`` for content that :func:`decode` must check."""
    if content[:2] != b"\xff\xd8":
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if height * width <= MAX_PIXELS else None


def _decode_smaller(content: bytes, size: tuple[int, int], shrink: int) -> Pixels | None:
    """The JPEG at 1 / ``shrink`` of its size, rounded up; ``None`` if the decoder does not support it."""
    height, width = (-(-length // shrink) for length in size)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(content, min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _uniforms(random_bits: NDArray[np.uint64]) -> list[float]:
    """53 bits of each integer as a number in [0, 1)."""
    uniforms: list[float] = ((random_bits >> np.uint64(11)) * 2.0**-53).tolist()
    return uniforms


def _middle(image: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    """The central part of [3, H, W]; padded with ``fill`` where it is smaller than ``size``."""
    height, width = image.shape[1:]
    down, right = max(size[0] - height, 0), max(size[1] - width, 0)
    if down or right:
        padding = (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2)
        image = functional.pad(image, padding, value=fill)
    height, width = image.shape[1:]
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]].contiguous()
