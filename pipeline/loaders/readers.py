"""The readers of images, texts, labels and objects, the same for training and for evaluation.

Each follows :class:`~pipeline.loaders.batches.Reader`. ``at``, the position in the training's order, is ``None`` in
evaluation: nothing is random then. Readers of other media belong to their methods; those of boxes with augmentation are
in :mod:`pipeline.loaders.detection`, of random views in :mod:`pipeline.loaders.augment`, of stored tokens in
:mod:`pipeline.loaders.tokens`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import default_collate

from pipeline.errors import DataError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.device_jpeg import EncodedImageReader, encoded_reader
from pipeline.loaders.images import ImageTransform, as_stored, crop_bits, decode, encoded_image
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.loaders.text import Tokenizer, caption_field, cut_text, faster, read_captions, read_texts
from pipeline.shards.objects import FIELD, plain_word, read_objects
from pipeline.shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Images as uint8 [B, 3, H, W]; random crops are a pure function of (seed, epoch, sample).

    Without a ``transform`` a batch has a list of images as they are stored, uint8 [3, H, W] of any sizes.
    """

    transform: ImageTransform | None
    seed: int = 0
    key: str = "image"
    fields = ("image",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """uint8 [3, H, W]; raises :class:`UnreadableSample`."""
        content = encoded_image(sample)
        if self.transform is None:
            return {self.key: as_stored(decode(content))}
        random = self.transform.random and at is not None
        return {self.key: self.transform.read(content, crop_bits(self.seed, *at) if random and at else None)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """uint8 [B, 3, H, W], in a loader's process in memory that it shares with the training process; or a list."""
        images = [row[self.key] for row in rows]
        return {self.key: images if self.transform is None else default_collate(images)}

    def on_device(self) -> EncodedImageReader:
        """The reader that leaves decoding to the training's device; raises ``SettingError`` where it cannot."""
        return encoded_reader(self.transform, self.seed, self.key)


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """Captions as int64 tokens [B, L], cut at the batch's longest text where the tower allows it.

    Where ``caption`` names a list of texts, training reads one of them in each epoch, evaluation the first one.
    """

    tokenizer: Tokenizer
    end_of_text: int | None = None
    caption: str = "txt"
    key: str = "text"
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The field that holds captions."""
        return (caption_field(self.caption),)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The caption; raises :class:`UnreadableSample`."""
        texts = read_texts(sample, self.caption)
        if at is None or len(texts) == 1:
            return {self.key: texts[0]}
        return {self.key: texts[int(random_bits(self.seed, RandomStream.TEXTS, *at, 1)[0] % len(texts))]}

    def collate(self, rows: list[Row]) -> Batch:
        """int64 [B, L]."""
        return {self.key: cut_text(self._faster([row[self.key] for row in rows]), self.end_of_text)}

    @cached_property
    def _faster(self) -> Tokenizer:
        return faster(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class CaptionsReader:
    """``text``: the tokens of all captions, int64 [T, L]; ``text_rows``: the row of each in the batch, int64 [T]."""

    tokenizer: Tokenizer
    caption: str = "auto"
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """All captions of a sample, see :func:`read_captions`; raises :class:`UnreadableSample`."""
        return {"captions": read_captions(sample, self.caption)}

    def collate(self, rows: list[Row]) -> Batch:
        """All captions of a batch, sample by sample."""
        captions = [caption for row in rows for caption in row["captions"]]
        owners = [number for number, row in enumerate(rows) for _ in row["captions"]]
        return {"text": self.tokenizer(captions), "text_rows": torch.tensor(owners)}


@dataclass(frozen=True, kw_only=True)
class FirstCaptionReader:
    """``caption``: the first caption of each sample as a text, to be shown; empty where there is none."""

    caption: str = "auto"
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The first caption."""
        try:
            return {"caption": read_captions(sample, self.caption)[0]}
        except UnreadableSample:
            return {"caption": ""}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The captions as a list."""
        return {"caption": [row["caption"] for row in rows]}


@dataclass(frozen=True, kw_only=True)
class LabelReader:
    """Class numbers as int64 [B]: the index in ``classes`` of a sample's label, see :func:`read_label`.

    A label that equals no name is compared without case, underscores or a last full stop (``apple_pie`` is ``Apple
    pie``), where that fits one class alone. A whole number that is no class name is an index itself; of equal names the
    first one counts. A sample without a label among the classes is unreadable, unless ``evaluated`` names the set that
    is evaluated: there it is an error.
    """

    classes: tuple[str, ...]
    json_key: str = "label"
    key: str = "label"
    evaluated: str = ""
    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The class number.

        Raises:
            UnreadableSample: none of the classes; in evaluation only where the json is broken.
            DataError: in evaluation, none of the classes.
        """
        try:
            label = read_label(sample, self.json_key)
        except DataError as error:
            if self.evaluated:
                raise
            raise UnreadableSample(str(error)) from error
        number = self._numbers.get(str(label))
        if number is None and isinstance(label, str):
            number = self._plain_numbers.get(plain_word(label))
        if number is None and isinstance(label, int) and 0 <= label < len(self.classes):
            number = label
        if number is None:
            raise self._unknown(sample, label)
        return {self.key: number}

    def collate(self, rows: list[Row]) -> Batch:
        """int64 [B]."""
        return {self.key: torch.tensor([row[self.key] for row in rows], dtype=torch.int64)}

    def _unknown(self, sample: Sample, label: str | int) -> DataError | UnreadableSample:
        wanted = f"{self.json_key!r} is none of the {len(self.classes)} classes ({_some(self.classes)})"
        if not self.evaluated:
            return UnreadableSample(f"{label!r} in {sample.key}'s {wanted}")
        advice = "say where the class is with --label, or bring the names with --classes"
        return DataError(f"{self.evaluated}: {label!r} in the samples' {wanted}; {advice}")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in reversed(list(enumerate(self.classes)))}

    @cached_property
    def _plain_numbers(self) -> dict[str, int]:
        """Of the names that no other class shares."""
        plain = [plain_word(name) for name in self._numbers]
        shared = {name for name, count in Counter(plain).items() if count > 1}
        names = zip(plain, self._numbers.values(), strict=True)
        return {name: number for name, number in names if name not in shared}


@dataclass(frozen=True, kw_only=True)
class ObjectsReader:
    """``objects``: the marked :class:`~pipeline.shards.objects.Objects` of each image; ``key``: the samples' keys."""

    fields = (FIELD,)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The marked objects of one sample; raises ``DataError``."""
        return {"key": sample.key, "objects": read_objects(sample)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Lists, since images have any number of objects."""
        return {name: [row[name] for row in rows] for name in ("key", "objects")}


def read_label(sample: Sample, key: str) -> str | int:
    """The class in the sample's json under ``key``: a name, or a number; true and false are names.

    ``cls`` is webdataset's member with a class number, where a sample has one.

    Raises:
        DataError: there is none; the keys that exist are listed.
        UnreadableSample: the json is broken.
    """
    if key == "cls" and "cls" in sample.fields:
        text = sample.fields["cls"].decode("utf-8", errors="replace").strip()
        return int(text) if text.isdigit() else text
    record = json_of_sample(sample)
    value = record.get(key)
    if isinstance(value, str | int):
        return str(value) if isinstance(value, bool) else value
    raise DataError(f"sample {sample.key} has no class under {key!r} in its json; its keys: {_some(sorted(record))}")


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")
