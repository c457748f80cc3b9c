"""Samples with sounds: waveforms of one length, tags, and samples that lack a modality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from pipeline.errors import SampleError
from pipeline.loaders.batches import Batch, Reader, Row, SamplePosition
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.models.audioclip.augment import NUMBERS, SoundAugmentation, augmented, fixed_length
from pipeline.shards.media import AUDIO
from pipeline.shards.objects import plain_word
from pipeline.shards.sample import Sample
from pipeline.shards.waveforms import read_waveform

LONGEST = 4
"""Of a sound, this many times the wanted length is decoded at most, from its start."""
PRESENCE = "has_"
"""Prefix of the keys that mark which rows have a modality."""


@dataclass(frozen=True, kw_only=True)
class SoundReader:
    """``audio``: float32 [B, channels, samples] in -1 to 1, at ``sample_rate``.

    A sound with another number of channels becomes their mean, repeated. In evaluation (``at`` is none) it is padded or
    cropped around its middle; ends continue with their values. Other lengths and paddings, without augmentation, are
    those of :class:`~pipeline.loaders.audio.AudioReader`.
    """

    sample_rate: int
    seconds: float
    channels: int = 1
    augmentation: SoundAugmentation
    seed: int = 0
    key: str = "audio"
    fields = ("audio",)

    @property
    def samples(self) -> int:
        """Length of every waveform."""
        return round(self.seconds * self.sample_rate)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Float32 [channels, samples]; raises :class:`UnreadableSample`."""
        sound = self._decoded(sample)
        if at is None:
            return {self.key: fixed_length(sound, self.samples)}
        bits = random_bits(self.seed, RandomStream.SOUNDS, *at, NUMBERS + 1)
        uniform = ((bits[:NUMBERS] >> np.uint64(11)) * 2.0**-53).tolist()
        generator = torch.Generator().manual_seed(int(bits[NUMBERS] >> np.uint64(1)))
        return {self.key: augmented(sound, self.samples, self.augmentation, uniform, generator)}

    def collate(self, rows: list[Row]) -> Batch:
        """Float32 [B, channels, samples]."""
        return {self.key: default_collate([row[self.key] for row in rows])}

    def _decoded(self, sample: Sample) -> Tensor:
        content, longest = sample.body(AUDIO), LONGEST * self.seconds
        if content is None:
            raise UnreadableSample(f"{sample.key} has no sound")
        try:
            found = read_waveform(content, seconds=longest, sample_rate=self.sample_rate, stereo=self.channels == 2)
        except SampleError as error:
            raise UnreadableSample(error.message) from error
        return torch.from_numpy(found.samples).expand(self.channels, -1)


@dataclass(frozen=True, kw_only=True)
class TagReader:
    """``tags``: float32 [B, classes], 1 for the classes of each sample, from a list of names or one name in its json.

    A sample with no name among the classes is unreadable.
    """

    classes: tuple[str, ...]
    json_key: str = "labels"
    key: str = "tags"
    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Float32 [classes]; raises :class:`UnreadableSample`."""
        value = json_of_sample(sample).get(self.json_key)
        names = {plain_word(str(name)) for name in (value if isinstance(value, list) else [value])}
        tags = torch.tensor([float(plain_word(name) in names) for name in self.classes])
        if not tags.any():
            raise UnreadableSample(f"{sample.key}.json has no known class under {self.json_key}")
        return {self.key: tags}

    def collate(self, rows: list[Row]) -> Batch:
        """Float32 [B, classes]."""
        return {self.key: torch.stack([row[self.key] for row in rows])}


@dataclass(frozen=True, kw_only=True)
class ModalitiesReader:
    """Several modalities of a sample, some of which it may lack.

    A batch has each reader's keys, and for each modality ``has_<modality>``, float32 [B], 1 for the rows that have it;
    the others have the values in ``blanks``. An empty text is none. A sample with fewer than two modalities is
    unreadable, and so is one whose modality is there but damaged.
    """

    readers: Mapping[str, Reader]
    blanks: Mapping[str, Row]
    fields: Sequence[str] = ()

    @property
    def sidecars(self) -> Sequence[Any]:
        """Those of all readers."""
        return [one for reader in self.readers.values() for one in getattr(reader, "sidecars", ())]

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The values by modality, none for a missing one."""
        found = {name: reader.read(sample, at) for name, reader in self.readers.items() if _has(sample, reader)}
        rows = {name: row for name, row in found.items() if row.get("text") != ""}
        if len(rows) < 2:
            raise UnreadableSample(f"{sample.key} has {', '.join(rows) or 'none'} of {', '.join(self.readers)}")
        return rows

    def collate(self, rows: list[Row]) -> Batch:
        """All modalities, and which rows have them."""
        batch: Batch = {}
        for name, reader in self.readers.items():
            batch |= reader.collate([row.get(name, self.blanks[name]) for row in rows])
            batch[PRESENCE + name] = torch.tensor([float(name in row) for row in rows])
        return batch


def _has(sample: Sample, reader: Reader) -> bool:
    """Whether a sample has what a reader reads: its fields, and values in its rows of sidecars."""
    rows = (sample.rows[one.name] for one in getattr(reader, "sidecars", ()))
    stored = all(value is not None for row in rows for value in row.values())
    return stored and all(_has_field(sample, field) for field in reader.fields)


def _has_field(sample: Sample, field: str) -> bool:
    if field == "image":
        return sample.image() is not None
    return sample.body(AUDIO) is not None if field == "audio" else field in sample.fields
