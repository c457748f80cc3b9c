"""Near duplicates of sounds by a hash of their spectrogram.

The first 30 s are resampled to 8 kHz, and silence at both ends is cut off. The levels of 32 bands from 100 to 3,800 Hz,
of equal width on a logarithmic scale, become a grey image of 32 x 32: time by frequency, black from 30 dB below the
loudest on. Its perceptual hash is that of :mod:`~pipeline.stages.filters.perceptual`, as is the search. So volume,
rate, format and silence around a sound make little difference; a part of a longer sound is no duplicate of it. Exact
duplicates are found by ``exact_duplicates``. (The hash and the threshold are not from a paper. On sounds of `drawn`,
97 % of the copies in OGG or MP3 are found, and 1 of 3,000 pairs of different sounds.)
"""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.media import AUDIO
from pipeline.stages.filters.duplicates import in_duplicates
from pipeline.stages.filters.filter import Step, Verdict
from pipeline.stages.filters.perceptual import SIDE, HashDuplicates, hashes_of
from pipeline.stages.filters.view import ShardView

RATE, SECONDS = 8_000, 30.0
WINDOW, HOP = 1_024, 256
BANDS = (100.0, 3_800.0)
RANGE = 30.0
"""Decibels from black to white."""
SILENCE = 40.0
"""Decibels below the loudest frame from which the ends of a sound are silent."""


@dataclass(frozen=True, kw_only=True)
class SoundDuplicates(HashDuplicates):
    """Drop sounds that are like an earlier one: ``near_duplicate``. Samples without a readable sound are kept."""

    name: ClassVar[str] = "sound_duplicates"
    rank: ClassVar[int] = 11
    max_sound_hamming: int = 6
    """Largest number of the 64 bits in which near duplicates differ."""

    def check(self) -> None:
        """Require at most a quarter of the bits; above it, most pairs match by chance."""
        require(0 <= self.max_sound_hamming <= 16, "max_sound_hamming", self.max_sound_hamming, "0 to 16 bits")

    @property
    def distance(self) -> int:
        """``max_sound_hamming``."""
        return self.max_sound_hamming

    @staticmethod
    def hashes(view: ShardView) -> pa.Table:
        """The hashes of all sounds that can be read."""
        sounds = (
            (int(place), sample.body(AUDIO)) for place, sample in zip(view.positions, view.samples(), strict=True)
        )
        return hashes_of((place, sound_thumbnail(body)) for place, body in sounds if body is not None)

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the table of duplicates."""
        return Verdict({"near_duplicate": in_duplicates(view, step, 1)})


def sound_thumbnail(body: bytes) -> NDArray[np.uint8] | None:
    """The spectrogram of a sound as uint8 [32, 32]; ``None`` if it is unreadable or silent."""
    from pipeline.shards.waveforms import read_waveform

    try:
        samples = read_waveform(body, seconds=SECONDS, sample_rate=RATE).samples[0]
    except SampleError:
        return None
    padded = np.pad(samples, (WINDOW // 2, WINDOW // 2 + HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * np.hanning(WINDOW).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    total = power.sum(axis=1)
    loud = np.flatnonzero(total > total.max() * 10 ** (-SILENCE / 10))
    if not len(loud) or not total.max() > 0:
        return None
    bands = np.add.reduceat(power[loud[0] : loud[-1] + 1], _edges(), axis=1)[:, :SIDE] / np.diff(_edges())
    levels = 10 * np.log10(np.maximum(bands, bands.max() * 10 ** (-RANGE / 10)))
    grey = (levels - levels.max() + RANGE) * (255 / RANGE)
    method = cv2.INTER_AREA if len(grey) > SIDE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=method), np.float64).round().astype(np.uint8)


def _edges() -> NDArray[np.int64]:
    """The first bin of each band, and the first after the last, int64 [33]; every band has at least one bin."""
    edges = np.geomspace(BANDS[0], BANDS[1], SIDE + 1) * WINDOW / RATE
    bins = np.round(edges).astype(np.int64)
    for number in range(1, len(bins)):
        bins[number] = max(bins[number], bins[number - 1] + 1)
    return bins
