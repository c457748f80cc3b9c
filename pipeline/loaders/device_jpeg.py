"""JPEGs decoded by the GPU that trains (nvJPEG, through torchvision) instead of the loader's processes.

A loader's process draws the crop and hands over the encoded image; the training process decodes, cuts and resizes all
images of a batch on the GPU. What nvJPEG may not read (other formats, other colours, a file that is cut off) is decoded
by the loader's process as ever. Images are decoded whole, so a result is nearer to the exact resize than that of a
reduced decode; decoders round differently, by a level or two.

A JPEG whose damage shows only when it is decoded cannot be replaced by the next sample any more, so it ends the run.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.images import ImageTransform, crop_bits, encoded_image
from pipeline.loaders.resample import AT_ONCE, resize_each
from pipeline.shards.sample import Sample

COLOURS = "YCbCr"
START, END = b"\xff\xd8", b"\xff\xd9"
LONGEST = 2048  # pixels a side of what is decoded on the GPU: the images of a group are padded to the largest
DECODER = "nvJPEG support"  # in torchvision's error, if it is built without it


@dataclass(frozen=True)
class EncodedCrop:
    """An encoded image, and the box (top, left, height, width) of it that training sees, mirrored or not."""

    content: bytes
    box: tuple[int, int, int, int]
    flipped: bool


@dataclass(frozen=True, kw_only=True)
class EncodedImageReader:
    """Like :class:`~pipeline.loaders.readers.ImageReader` with a random crop; :meth:`finish` makes the images."""

    transform: ImageTransform
    seed: int = 0
    key: str = "image"
    fields = ("image",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """An :class:`EncodedCrop`, or uint8 [3, H, W] of an image that nvJPEG may not read."""
        content = encoded_image(sample)
        assert at is not None, "in evaluation nothing is random"
        bits = crop_bits(self.seed, *at)
        size = jpeg_size(content)
        if size is None:
            return {self.key: self.transform.read(content, bits)}
        return {self.key: EncodedCrop(content, self.transform.box(*size, bits), self.transform.flips(bits))}

    def collate(self, rows: list[Row]) -> Batch:
        """Tensors whose keys begin with ``key``: bytes of all encoded images, their lengths, boxes and rows."""
        values = [row[self.key] for row in rows]
        encoded = [(number, value) for number, value in enumerate(values) if isinstance(value, EncodedCrop)]
        others = [(number, value) for number, value in enumerate(values) if isinstance(value, Tensor)]
        crops = [crop for _, crop in encoded]
        content = bytearray(b"".join(crop.content for crop in crops))
        images = [value for _, value in others] or [torch.empty(3, *self.transform.size, dtype=torch.uint8)]
        return {
            f"{self.key}.bytes": torch.frombuffer(content or bytearray(1), dtype=torch.uint8),
            f"{self.key}.lengths": _numbers([len(crop.content) for crop in crops]),
            f"{self.key}.boxes": _numbers([crop.box for crop in crops]).reshape(-1, 4),
            f"{self.key}.flipped": torch.tensor([crop.flipped for crop in crops], dtype=torch.bool),
            f"{self.key}.decoded": torch.stack(images)[: len(others)],
            f"{self.key}.order": _numbers([number for number, _ in (*encoded, *others)]).argsort(),
        }

    def finish(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with ``key``, uint8 [B, 3, H, W] on ``device``, in place of what :meth:`collate` gave.

        Raises:
            DataError: an encoded image is damaged.
        """
        names = ("bytes", "lengths", "boxes", "flipped", "decoded", "order")
        parts = {name: batch[f"{self.key}.{name}"] for name in names}
        rest = {key: value for key, value in batch.items() if not key.startswith(f"{self.key}.")}
        images = parts["decoded"].to(device, non_blocking=True)
        if len(parts["lengths"]):
            contents = parts["bytes"].split(parts["lengths"].tolist())
            crops = self._crops(contents, parts["boxes"], device)
            flipped = parts["flipped"].to(device, non_blocking=True)[:, None, None, None]
            images = torch.cat([torch.where(flipped, crops.flip(-1), crops), images])
        return {**rest, self.key: images[parts["order"].to(device, non_blocking=True)]}

    def _crops(self, contents: Sequence[Tensor], boxes: Tensor, device: torch.device) -> Tensor:
        """uint8 [N, 3, height, width] of the boxes, in groups that bound the memory."""
        parts = []
        for first in range(0, len(contents), AT_ONCE):
            group = slice(first, first + AT_ONCE)
            whole = decoded(contents[group], device)
            cut = [
                image[:, top : top + height, left : left + width]
                for image, (top, left, height, width) in zip(whole, boxes[group].tolist(), strict=True)
            ]
            sizes = boxes[group, 2:].to(device, non_blocking=True)
            parts.append(resize_each(padded(cut), sizes[:, 0], sizes[:, 1], self.transform.size))
        return torch.cat(parts)


def decoded(contents: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """JPEGs, uint8 [bytes] in the CPU's memory, to uint8 [3, H, W] on ``device``.

    Raises:
        DataError: one is damaged.
        SettingError: torchvision is built without nvJPEG.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # see docs/decisions.md
            images: list[Tensor] = decode_jpeg(list(contents), mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if DECODER in reason:
            raise SettingError(
                "image_decoder", device.type, "cpu with this torchvision, built without nvJPEG"
            ) from error
        advice = "--image-decoder cpu replaces unreadable images by the next sample"
        raise DataError(f"a JPEG of this batch cannot be decoded on {device.type} ({reason}); {advice}") from error
    return images


def padded(images: Sequence[Tensor]) -> Tensor:
    """uint8 [3, H, W] of several sizes to uint8 [N, 3, largest H, largest W], each in the upper left corner."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    together = images[0].new_zeros((len(images), 3, height, width))
    for place, image in zip(together, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]].copy_(image)
    return together


def encoded_reader(transform: ImageTransform | None, seed: int, key: str) -> EncodedImageReader:
    """The reader for these settings.

    Raises:
        SettingError: the images are not random crops, or are resized in another way.
    """
    fits = transform is not None and transform.crop != "centre" and transform.interpolation == "bicubic"
    require(fits, "image_decoder", "cuda", "cpu where images are not random crops, resized bicubically")
    assert transform is not None
    return EncodedImageReader(transform=transform, seed=seed, key=key)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of an image that is left to the GPU; ``None`` for one that the loader's process decodes."""
    if content[:2] != START or content[-2:] != END:
        return None
    try:
        height, width, colours, *_ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if colours == COLOURS and max(height, width) <= LONGEST else None


def _numbers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
