"""Sounds of samples as waveforms: a segment is decoded, resampled and brought to one length.

The model computes spectrograms on its device: they have more numbers than the waveform, and augmentations come first.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import AUDIO
from pipeline.shards.sample import Sample
from pipeline.shards.sound_kinds import Samples
from pipeline.shards.waveforms import read_header, read_waveform

MOST_SECONDS = 600.0
"""What is decoded of a sound whose header does not state its exact length."""

Padding = Literal["repeat_zeros", "repeat", "zeros", "zeros_around"]


@dataclass(frozen=True, kw_only=True)
class AudioTransform:
    """Converts a sound to a waveform float32 [channels, sample_rate * seconds], full scale -1 to 1."""

    sample_rate: int = 48_000
    """Samples per second."""
    seconds: float = 10.0
    """Length of the segment."""
    channels: Literal[1, 2] = 1
    """1: the average of all channels; 2: a mono sound is on both, a stereo sound is unchanged."""
    crop: Literal["random", "centre", "start"] = "centre"
    """Part of a longer sound; `random` takes a random part in training, the centre in evaluation."""
    padding: Padding = "repeat_zeros"
    """End of a shorter sound: whole repeats and then zeros (CLAP's `repeatpad`), repeats, zeros, or zeros on both
    sides."""

    def __post_init__(self) -> None:
        require(1_000 <= self.sample_rate <= 768_000, "sample_rate", self.sample_rate, "1,000 to 768,000")
        require(0 < self.seconds <= MOST_SECONDS, "seconds", self.seconds, f"more than 0, at most {MOST_SECONDS:g}")

    @property
    def samples(self) -> int:
        """Samples of a segment."""
        return round(self.sample_rate * self.seconds)

    def read(self, content: bytes, random: float | None = None) -> Tensor:
        """float32 [channels, samples]; ``random``, from 0 to 1, is the position of a random crop.

        Only the segment is decoded.

        Raises:
            UnreadableSample: not a sound, or a broken one.
        """
        try:
            header = read_header(content)
            length = header.seconds if header.exact else None
            start, span = (0.0, MOST_SECONDS) if length is None else (self._start(length, random), self.seconds)
            sound = read_waveform(
                content, start=start, seconds=span, sample_rate=self.sample_rate, stereo=self.channels == 2
            )
        except SampleError as error:
            raise UnreadableSample(error.message) from error
        first = round(self._start(sound.seconds, random) * self.sample_rate) if length is None else 0
        samples = sound.samples[:, first:]
        wide = np.repeat(samples, 2, axis=0) if self.channels > len(samples) else samples
        return torch.from_numpy(np.ascontiguousarray(padded(wide, self.samples, self.padding)))

    def _start(self, length: float, random: float | None) -> float:
        """First second of the segment in a sound of ``length`` seconds."""
        spare = max(0.0, length - self.seconds)
        if self.crop == "start":
            return 0.0
        return spare * (0.5 if random is None or self.crop == "centre" else random)


@dataclass(frozen=True, kw_only=True)
class AudioReader:
    """Waveforms as float32 [B, channels, samples]; random crops are a pure function of (seed, epoch, sample).

    With ``optional`` a sample may lack a sound: its row is zeros, and False in bool [B] ``<key>_present``.
    """

    transform: AudioTransform
    seed: int = 0
    key: str = "audio"
    optional: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """A sound in any format."""
        return () if self.optional else ("audio",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """float32 [channels, samples]; raises :class:`UnreadableSample`."""
        content = sample.body(AUDIO)
        if content is None and self.optional:
            return {self.key: torch.zeros(self.transform.channels, self.transform.samples), self._present: False}
        if content is None:
            raise UnreadableSample(f"{sample.key} has no sound")
        random = None
        if at is not None and self.transform.crop == "random":
            random = int(random_bits(self.seed, RandomStream.SOUND_CROPS, *at, 1)[0] >> np.uint64(11)) * 2.0**-53
        row = {self.key: self.transform.read(content, random)}
        return {**row, self._present: True} if self.optional else row

    def collate(self, rows: list[Row]) -> Batch:
        """The batch of both keys."""
        batch = {self.key: torch.stack([row[self.key] for row in rows])}
        if self.optional:
            batch[self._present] = torch.tensor([row[self._present] for row in rows])
        return batch

    @property
    def _present(self) -> str:
        return f"{self.key}_present"


def padded(samples: Samples, wanted: int, padding: Padding) -> Samples:
    """float32 [C, T], T at least 1, to [C, wanted]; longer ones are cut at the end."""
    length = samples.shape[1]
    if length >= wanted:
        return samples[:, :wanted]
    if padding == "repeat":
        return np.tile(samples, -(-wanted // length))[:, :wanted]
    if padding == "repeat_zeros":
        samples = np.tile(samples, wanted // length)
    missing = wanted - samples.shape[1]
    before = missing // 2 if padding == "zeros_around" else 0
    return np.pad(samples, ((0, 0), (before, missing - before)))
