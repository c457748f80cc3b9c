"""The media of evaluated models and sets: images, sounds, texts, and whatever :mod:`pipeline.shards.media` names.

A model encodes a medium M if it has ``encode_M``, from one tensor of a batch to features float [B, D]. A reader makes
that tensor from a sample: ``M_reader()`` of the model, whose batch has it under the key M; for images the reader of
``transforms(train=False)``, for texts the ``tokenizer``. A reader of inputs that differ in length also gives
``M_mask``, bool [B, T], the second argument of ``encode_M``. The representation of a reader, a frozen dataclass, names
its settings: stored features are those of the same weights and readers.

A model whose class has more encoders than its config needs lists its media in ``encodes``. A model that compares two
media only pair by pair names them in ``scores_pairs``, such as ("video", "text"). It has ``pair_features(medium,
inputs, mask)``, which gives a tensor with a row for each input, and ``pair_scores(first, second)``, float [N, M].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.evaluation.data import SnapshotData
from pipeline.evaluation.frame_mean import encode_frames, frames_reader
from pipeline.evaluation.task import PreparedSet
from pipeline.loaders.batches import Reader, Row, SamplePosition
from pipeline.loaders.readers import CaptionsReader, ImageReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import MEDIA, VIDEO
from pipeline.shards.sample import Sample
from pipeline.sources.source import media_of

TEXT = "text"
KNOWN = (*MEDIA, TEXT)
AUTO = "auto"
LOOKED_AT = 8
"""Samples of a card that show which media it has."""


def encoded_media(model: object) -> tuple[str, ...]:
    """The media that ``model`` encodes, in the order of :data:`KNOWN`."""
    listed = getattr(model, "encodes", None)
    names = KNOWN if listed is None else tuple(listed)
    return tuple(name for name in KNOWN if name in names and callable(getattr(model, f"encode_{name}", None)))


def paired_media(model: object) -> tuple[str, ...]:
    """The two media that ``model`` only compares pair by pair; empty for models that encode each."""
    return tuple(getattr(model, "scores_pairs", ()))


def medium_reader(model: Any, medium: str, **views: int) -> Reader:
    """The reader of a model's input of a medium other than text, without augmentation.

    ``views`` are the ``clips`` and ``crops`` of a video; see :mod:`pipeline.loaders.clip_views`.
    """
    own = getattr(model, f"{medium}_reader", None)
    if own is None and medium == "image":
        return ImageReader(transform=model.transforms(train=False))
    if medium == VIDEO.name and by_frames(model):
        return frames_reader(model, **views)
    if own is None:
        raise SettingError("checkpoint", type(model).__name__, f"a model with {medium}_reader, as it encodes {medium}")
    reader: Reader = own(**views)
    return reader


def encode_inputs(model: Any, medium: str, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """Features of a batch's inputs of a medium other than text: float32 [B, D] with unit length, on ``device``."""
    inputs = inputs_of(batch, medium, device)
    if medium == VIDEO.name and by_frames(model):
        found = encode_frames(model, *inputs)
    else:
        found = getattr(model, f"encode_{medium}")(*inputs)
    return functional.normalize(found.float(), dim=-1)


def inputs_of(batch: Mapping[str, Any], medium: str, device: torch.device) -> list[Tensor]:
    """The inputs of a medium on ``device``, and their mask where the reader gives one."""
    return [batch[name].to(device) for name in (medium, f"{medium}_mask") if name in batch]


def by_frames(model: object) -> bool:
    """Whether ``model`` encodes images and no videos, so that it can read a video by its frames."""
    able = paired_media(model) or encoded_media(model)
    return "image" in able and VIDEO.name not in able and callable(getattr(model, "transforms", None))


def usable_media(model: object, one: PreparedSet, setting: str) -> tuple[str, ...]:
    """The media of a set that ``model`` can compare or encode, texts last.

    Videos by their frames are among them where ``setting`` names them, or is ``auto`` and the set has no images.
    """
    able = paired_media(model) or encoded_media(model)
    named = VIDEO.name in setting.split("+") or (setting == AUTO and _videos_alone(one))
    return tuple(name for name in KNOWN if name in able or (name == VIDEO.name and named and by_frames(model)))


def _videos_alone(one: PreparedSet) -> bool:
    """Whether a set has videos and no images, as far as is known without reading samples."""
    if isinstance(one.data, SnapshotData):
        fields = dict.fromkeys(one.data.snapshot.fields)
        media = [name for name, medium in MEDIA.items() if medium.field_of(fields) is not None]
    else:
        media = list(media_of(one.data.source))
    return VIDEO.name in media and "image" not in media


def require_text(model: object) -> None:
    """Raise ``SettingError`` unless ``model`` encodes texts and another medium."""
    media = encoded_media(model)
    both = TEXT in media and len(media) > 1
    require(
        both, "checkpoint", type(model).__name__, "a model that encodes images and texts, or another medium and texts"
    )


def stored_media(one: PreparedSet, model: object) -> tuple[str, ...]:
    """The media other than text of a set's samples: by the fields of its snapshot, or of a card's first samples.

    A medium counts also where samples have the fields that the model's own reader of it names, such as features.
    """
    if isinstance(one.data, SnapshotData):
        fields = dict.fromkeys(one.data.snapshot.fields)
    else:
        fields = {name: None for sample in islice(one.samples(LOOKED_AT), LOOKED_AT) for name in sample.fields}
    able = paired_media(model) or encoded_media(model)
    return tuple(name for name in MEDIA if holds(fields, name, medium_reader(model, name) if name in able else None))


def holds(fields: Mapping[str, object], medium: str, reader: Reader | None) -> bool:
    """Whether samples with these fields have a part of the medium, or what its reader reads instead."""
    own = [] if reader is None else [name for name in reader.fields if name not in MEDIA]
    return MEDIA[medium].field_of(fields) is not None or (bool(own) and all(name in fields for name in own))


def medium_of_set(model: object, one: PreparedSet, setting: str = AUTO) -> str:
    """The medium of a set that the model shall encode, by its option ``medium``.

    Raises:
        SettingError: the model does not encode it, or the samples do not have it.
    """
    able = () if paired_media(model) else tuple(name for name in usable_media(model, one, setting) if name != TEXT)
    require(bool(able), "checkpoint", type(model).__name__, f"a model that encodes {' or '.join(MEDIA)}")
    if setting == AUTO and able == ("image",):  # spares reading samples of a card
        return "image"
    stored = stored_media(one, model)
    wanted = [name for name in able if setting in (AUTO, name)]
    require(bool(wanted), f"{one.name}: medium", setting, "a medium of the model: " + ", ".join(able))
    found = [name for name in wanted if name in stored]
    has = ", ".join(stored) or "none"
    require(bool(found), f"{one.name}: medium", setting, f"data with {' or '.join(wanted)}; the samples have: {has}")
    return found[0]


def check_medium(setting: str) -> None:
    """Raise ``SettingError`` unless ``setting`` is ``auto`` or a medium."""
    require(setting in (AUTO, *MEDIA), "medium", setting, ", ".join((AUTO, *MEDIA)))


@dataclass(frozen=True, kw_only=True)
class PartsReader:
    """The media of samples of which each may lack some: inputs of those that are there, and their rows in the batch.

    For each medium M the batch has the keys of its reader, M and perhaps ``M_mask``, and ``M_rows``, int64, the number
    of the sample in the batch of each input; for texts ``text`` and ``text_rows``, for all captions. ``samples`` is the
    size of the batch. A medium that the whole batch lacks has no key. A sample with fewer than ``least`` media is
    unreadable, and so is one with a broken part.
    """

    readers: Mapping[str, Reader]
    captions: CaptionsReader | None = None
    least: int = 2
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``parts``: the rows of the readers, by medium."""
        parts: dict[str, Row] = {}
        for name, reader in self.readers.items():
            if holds(sample.fields, name, reader):
                parts[name] = reader.read(sample, at)
        lacks = ""
        if self.captions is not None:
            try:
                parts[TEXT] = self.captions.read(sample)
            except UnreadableSample as error:  # still a sample of its other media
                lacks = f": {error}"
        if len(parts) < self.least:
            raise UnreadableSample(f"{sample.key} has {' and '.join(parts) or 'none'} of the compared media{lacks}")
        return {"parts": parts}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """The batch."""
        batch: dict[str, Any] = {"samples": len(rows)}
        for name, reader in self._all():
            having = [number for number, row in enumerate(rows) if name in row["parts"]]
            if not having:
                continue
            inputs = reader.collate([rows[number]["parts"][name] for number in having])
            places = torch.tensor(having)
            batch |= {key: inputs[key] for key in (name, f"{name}_mask") if key in inputs}
            batch[f"{name}_rows"] = places[inputs["text_rows"]] if name == TEXT else places
        return batch

    def _all(self) -> Iterator[tuple[str, Reader]]:
        yield from self.readers.items()
        if self.captions is not None:
            yield TEXT, self.captions
