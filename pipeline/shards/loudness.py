"""How loud a waveform is: level, peak, and the part of it that is silent."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.shards.sound_kinds import Samples

SILENCE = -60.0
"""Level in dBFS below which a frame counts as silent."""
FLOOR = -120.0
"""Level of a waveform of zeros, in dBFS: below the quantisation of 16 bits (-98), and finite for tables."""

_FRAME = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Loudness:
    """Levels in dBFS, at least ``FLOOR``: 0 is a constant of full scale, -3.01 a sine of full scale.

    ``silent`` is the fraction of frames of 20 ms whose level is below ``SILENCE``.
    """

    level: float
    peak: float
    silent: float


def measure(samples: Samples, sample_rate: int) -> Loudness:
    """The loudness of a finite waveform float32 [C, T], T at least 1; levels are over all channels."""
    power = np.square(samples, dtype=np.float32).mean(axis=0)
    length = min(len(power), max(1, round(_FRAME * sample_rate)))
    frames = power[: len(power) // length * length].reshape(-1, length).mean(axis=1)
    silent = float((frames < 10 ** (SILENCE / 10)).mean())
    level = _decibels(float(power.mean(dtype=np.float64)))
    return Loudness(level, _decibels(float(np.abs(samples).max()) ** 2), silent)


def _decibels(power: float) -> float:
    return max(FLOOR, 10 * math.log10(power)) if power > 0 else FLOOR
