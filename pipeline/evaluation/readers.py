"""What an evaluation reads of a sample: each reader gives some keys of a sample, and makes a batch of them.

They have the shape of the training's readers; ``at``, the place in the training's order, is none here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.images import ImageTransform, Pixels, decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import read_caption
from pipeline.shards.objects import FIELD, read_objects
from pipeline.shards.sample import Sample

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ImageReader:
    """``image``: uint8 ``[B, 3, H, W]``; without a transform a list of images as they are stored, of any sizes."""

    transform: ImageTransform | None = None
    fields = ("image",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> dict[str, Any]:
        """The decoded image, uint8 ``[3, H, W]``."""
        content = sample.image()
        if content is None:
            raise UnreadableSample(f"{sample.key} has no image")
        return {"image": (self.transform or as_stored)(decode(content))}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """One tensor, or a list."""
        images = [row["image"] for row in rows]
        return {"image": images if self.transform is None else torch.stack(images)}


@dataclass(frozen=True)
class ClassReader:
    """``label``: int64 ``[B]``, the places of the samples' classes among ``classes``; ``name`` is the set's."""

    name: str
    key: str
    classes: tuple[str, ...]
    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> dict[str, Any]:
        """The class as the sample says it."""
        return {"label": read_label(sample, self.key)}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """Numbers of the classes; raises ``DataError`` for a label that is none of them."""
        number = {name: place for place, name in reversed(list(enumerate(self.classes)))}
        labels = [_class_number(row["label"], number, len(self.classes)) for row in rows]
        unknown = sorted({str(row["label"]) for row, found in zip(rows, labels, strict=True) if found is None})
        if unknown:
            raise DataError(
                f"{self.name}: {_some(unknown)} in the samples' {self.key!r} is none of the {len(self.classes)} classes"
                f" ({_some(self.classes)}); say where the class is with --label, or bring the names with --classes"
            )
        return {"label": torch.tensor(labels)}


@dataclass(frozen=True)
class CaptionsReader:
    """``text``: the tokens of all captions, int64 ``[T, L]``; ``owner``: the row of each, int64 ``[T]``."""

    tokenizer: Callable[[list[str]], Tensor]
    where: str = "auto"
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> dict[str, Any]:
        """The captions."""
        return {"captions": read_captions(sample, self.where)}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """All captions of a batch."""
        captions = [caption for row in rows for caption in row["captions"]]
        owners = [place for place, row in enumerate(rows) for _ in row["captions"]]
        return {"text": self.tokenizer(captions), "owner": torch.tensor(owners)}


@dataclass(frozen=True)
class FirstCaptionReader:
    """``caption``: the first caption of each sample; an empty one where there is none."""

    where: str = "auto"
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> dict[str, Any]:
        """The first caption."""
        try:
            return {"caption": read_captions(sample, self.where)[0]}
        except UnreadableSample:
            return {"caption": ""}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """The captions as a list."""
        return {"caption": [row["caption"] for row in rows]}


@dataclass(frozen=True)
class ObjectsReader:
    """``objects``: what is marked in each image; ``key``: the samples' keys."""

    fields = (FIELD,)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> dict[str, Any]:
        """The marked objects of one sample."""
        return {"key": sample.key, "objects": read_objects(sample)}

    def collate(self, rows: Rows) -> dict[str, Any]:
        """Lists, since images have any number of objects."""
        return {name: [row[name] for row in rows] for name in ("key", "objects")}


def as_stored(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] to uint8 [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_label(sample: Sample, key: str) -> str | int:
    """The class in the sample's json under ``key``; ``cls`` is webdataset's member with a class number.

    Raises:
        DataError: there is none; the keys that exist are listed.
    """
    if key == "cls" and "cls" in sample.fields:
        text = sample.fields["cls"].decode("utf-8", errors="replace").strip()
        return int(text) if text.isdigit() else text
    record = _record(sample)
    value = record.get(key)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    raise DataError(f"sample {sample.key} has no class under {key!r} in its json; its keys: {_some(sorted(record))}")


def read_captions(sample: Sample, where: str = "auto") -> list[str]:
    """All captions: the list ``captions`` of the json where there is one, else the text; or what ``where`` names.

    Raises:
        UnreadableSample: the sample has no caption.
    """
    several = _record(sample).get("captions") if where == "auto" else None
    texts = several if isinstance(several, list) else [read_caption(sample, "txt" if where == "auto" else where)]
    captions = [text for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise UnreadableSample(f"{sample.key} has no caption")
    return captions


def _record(sample: Sample) -> dict[str, object]:
    try:
        record = json.loads(sample.fields.get("json", b"{}"))
    except ValueError as error:
        raise UnreadableSample(f"{sample.key}.json is no JSON") from error
    return record if isinstance(record, dict) else {}


def _class_number(label: str | int, number: Mapping[str, int], classes: int) -> int | None:
    """The place of a class name; a number that is no name is a place itself."""
    if str(label) in number:
        return number[str(label)]
    return label if isinstance(label, int) and 0 <= label < classes else None


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")
