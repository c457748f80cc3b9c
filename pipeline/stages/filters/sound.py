"""Length, level, silence and clipping of sounds.

The values are the columns that a refresh stores; where a shard lacks them, the sounds are decoded. Samples without a
sound are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.shards.media import AUDIO
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.part_values import Values, part_values
from pipeline.stages.filters.view import ShardView

COLUMNS = ("audio_seconds", "audio_loudness", "audio_silent", "audio_clipped")
MOST_SECONDS = 600.0
"""What is decoded of a sound without stored values."""


@dataclass(frozen=True, kw_only=True)
class Sound(Filter):
    """Drop sounds: ``unreadable``, ``short``, ``long``, ``soft``, ``silent``, ``clipped``."""

    name: ClassVar[str] = "sound"
    rank: ClassVar[int] = 10
    min_sound_seconds: float = 1.0
    max_sound_seconds: float = math.inf
    min_sound_level: float = -60.0
    """Lowest level in dBFS."""
    max_silent: float = 0.9
    """Largest fraction of frames of 20 ms below -60 dBFS."""
    max_clipped: float = 0.01
    """Largest fraction of samples at full scale."""

    def check(self) -> None:
        """Require valid bounds."""
        shortest, longest = self.min_sound_seconds, self.max_sound_seconds
        require(shortest >= 0, "min_sound_seconds", shortest, "0 or more seconds")
        require(longest > shortest, "max_sound_seconds", longest, "more than min_sound_seconds")
        require(self.min_sound_level <= 0, "min_sound_level", self.min_sound_level, "0 dBFS or less")
        require(0 <= self.max_silent <= 1, "max_silent", self.max_silent, "0 to 1")
        require(0 <= self.max_clipped <= 1, "max_clipped", self.max_clipped, "0 to 1")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Comparisons with NaN are false, so a sample without a sound has no reason."""
        values, unreadable = sound_values(view)
        return Verdict(
            {
                "unreadable": unreadable,
                "short": values["audio_seconds"] < self.min_sound_seconds,
                "long": values["audio_seconds"] > self.max_sound_seconds,
                "soft": values["audio_loudness"] < self.min_sound_level,
                "silent": values["audio_silent"] > self.max_silent,
                "clipped": values["audio_clipped"] > self.max_clipped,
            }
        )


def sound_values(view: ShardView) -> tuple[Values, NDArray[np.bool_]]:
    """The values of ``COLUMNS``, float64 [n], NaN without a sound; and which sounds cannot be read, bool [n]."""
    return part_values(view, AUDIO, COLUMNS, _measured)


def _measured(body: bytes) -> Sequence[float]:
    from pipeline.shards.loudness import measure
    from pipeline.shards.waveforms import read_waveform

    sound = read_waveform(body, seconds=MOST_SECONDS, stereo=True)
    loudness = measure(sound.samples, sound.sample_rate)
    return sound.seconds, loudness.level, loudness.silent, sound.clipped
