"""A perfect model of three pitches, three colours and their names, which are one feature space, and its samples."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.batches import Row
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import AUDIO
from pipeline.shards.sample import Sample
from pipeline.shards.waveforms import SampleError, read_waveform
from tests.evaluation.conftest import COLOURS, ColourModel, image
from tests.sounds import encoded, tone

PITCHES = {"red": 220.0, "green": 880.0, "blue": 3520.0}
"""Hertz of the sound of each colour."""
RATE = 16_000


@dataclass(frozen=True)
class PitchReader:
    """``audio``: float32 [B, 1, T]."""

    fields = ("audio",)

    def read(self, sample: Sample, at: Any = None) -> Row:
        """Half a second."""
        field = AUDIO.field_of(sample.fields)
        if field is None:
            raise UnreadableSample("no sound")
        try:
            found = read_waveform(sample.fields[field], seconds=0.5, sample_rate=RATE).samples
        except SampleError as error:
            raise UnreadableSample(str(error)) from error
        return {"audio": np.pad(found, ((0, 0), (0, RATE // 2 - found.shape[1])))}

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """A batch."""
        return {"audio": torch.from_numpy(np.stack([row["audio"] for row in rows]))}


class SoundAndColourModel(ColourModel):
    """Adds sounds to the perfect model of colours: the feature is the power at each colour's pitch."""

    def audio_reader(self) -> PitchReader:
        """Mono at 16 kHz."""
        return PitchReader()

    def encode_audio(self, audio: Tensor) -> Tensor:
        """The colour of the strongest pitch."""
        power = torch.fft.rfft(audio.mean(dim=1)).abs().square()
        bins = [round(hertz / 2) for hertz in PITCHES.values()]  # half a second: bins of 2 Hz
        return functional.normalize(power[:, bins], dim=-1)


def sound(colour: str, kind: str = "FLAC", seconds: float = 0.5) -> bytes:
    """The tone of a colour."""
    return encoded(tone(RATE, seconds, PITCHES[colour]), RATE, kind)


def sample(
    colour: str, media: str = "iat", caption: str | None = None, heard: str = "", **record: Any
) -> dict[str, bytes]:
    """Fields of a sample: i, a and t in ``media`` are its image, its sound (of the colour ``heard``), its caption."""
    fields = {"json": json.dumps({"label": colour, **record}).encode()}
    if "i" in media:
        fields["png"] = image(COLOURS[colour])
    if "a" in media:
        fields["flac"] = sound(heard or colour)
    if "t" in media:
        fields["txt"] = (f"a {colour} one" if caption is None else caption).encode()
    return fields
