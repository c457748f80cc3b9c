"""The sound of a scene: every object sounds, its timbre follows the shape, its pitch the colour, its level the size.

    timbre   24 = 6 spectra x 4 envelopes, one for each shape
    pitch    10 bands of 4.8 semitones from 110 to 1760 Hz, one for each colour; an object's own pitch varies within
             the inner 70 % of its band, as its colour does
    level    small -12 dB, medium -6 dB, large 0 dB; the main object 3 dB more

Objects begin at different times and overlap. Below them is noise of one of three colours, 20 to 55 dB softer than the
objects; some sounds of the pre-training splits are silent. Samples are 16 bits at 16 kHz.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.sources.drawn import sets, world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.scenes import Look, Scene

RATE = 16_000
SPECTRA = ("pure", "hollow", "bright", "bell", "vowel", "breath")
ENVELOPES = ("plucked", "steady", "pulsing", "rising")
LOWEST, OCTAVES = 110.0, 4.0
SILENT = 0.03
"""Fraction of silent sounds in the pre-training splits."""

_LEVELS = {"small": -12.0, "medium": -6.0, "large": 0.0}
_HIGHEST = 0.45 * RATE  # partials above are left out
_FORMANTS = ((700.0, 150.0), (1_150.0, 200.0), (2_600.0, 300.0))
_BELL = ((1.0, 1.0), (2.76, 0.6), (5.40, 0.35), (8.93, 0.2))

Wave = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DrawnSound:
    """``flac`` is the encoded sound; ``silent`` is True where nothing is heard; ``noisy`` where noise is loud."""

    flac: bytes
    silent: bool
    noisy: bool


def timbre_of(shape: str) -> tuple[str, str]:
    """Spectrum and envelope of a shape; no two shapes share both."""
    rank = world.SHAPE_NAMES.index(shape)
    return SPECTRA[rank % len(SPECTRA)], ENVELOPES[rank // len(SPECTRA)]


def band_of(colour: str) -> tuple[float, float]:
    """Lowest and highest fundamental frequency of a colour, in hertz."""
    rank, width = world.COLOUR_NAMES.index(colour), OCTAVES / len(world.COLOUR_NAMES)
    low, high = ((rank + margin) * width for margin in (0.15, 0.85))
    return LOWEST * 2**low, LOWEST * 2**high


def draw_sound(scene: Scene, split: str, seed: int, index: int, seconds: float) -> DrawnSound:
    """The sound of the scene of sample ``index``: a pure function of its arguments."""
    # Imported here: every job loads this source, few need libsndfile.
    from pipeline.shards.waveforms import encode_flac

    draws = Draws(seed, split, index, "sound")
    length = round(seconds * RATE)
    if split in sets.CAPTIONED and draws.chance(SILENT):
        return DrawnSound(encode_flac(np.zeros((1, length), np.float32), RATE), True, False)
    mixed = np.zeros(length)
    for number, obj in enumerate(scene.objects):
        level = _LEVELS[obj.look.size] + (3.0 if number == scene.main else 0.0) + draws.uniform(-2.0, 2.0)
        duration = min(length, round(length * draws.uniform(0.45, 0.9)))
        begin = draws.integer(length - duration + 1)
        mixed[begin : begin + duration] += 10 ** (level / 20) * _voice(obj.look, duration, draws)
    below = draws.uniform(20.0, 55.0)
    mixed += _noise(length, draws) * math.sqrt(float(np.mean(mixed**2))) * 10 ** (-below / 20)
    mixed *= draws.uniform(0.3, 0.9) / float(np.abs(mixed).max())
    return DrawnSound(encode_flac(mixed.astype(np.float32)[None], RATE), False, below < 28.0)


def _voice(look: Look, length: int, draws: Draws) -> Wave:
    """One object for ``length`` samples; its loudest sample is about 1."""
    spectrum, envelope = timbre_of(look.shape)
    low, high = band_of(look.colour)
    pitch = low * (high / low) ** draws.random()
    time = np.arange(length) / RATE
    rise = 0.2 if envelope == "rising" else 0.0
    wobble = 0.004 * np.sin(2 * np.pi * 5.5 * time) if envelope == "steady" else np.zeros(length)
    frequency = pitch * (1 + rise * time / time[-1] + wobble)
    if spectrum == "breath":
        frequency = frequency * (1 + 0.03 * _smooth(draws.normals(length)))
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    wave = np.zeros(length)
    for ratio, weight in _partials(spectrum, pitch):
        decay = np.exp(-time * ratio * 2.0) if spectrum == "bell" else 1.0
        wave += weight * decay * np.sin(ratio * phase + 2 * np.pi * draws.random())
    wave = wave * _envelope(envelope, time)
    return wave / max(float(np.abs(wave).max()), 1e-9)


def _partials(spectrum: str, pitch: float) -> list[tuple[float, float]]:
    """Frequency as a multiple of the pitch, and amplitude, of each partial below ``_HIGHEST``."""
    if spectrum == "bell":
        found = list(_BELL)
    elif spectrum == "pure":
        found = [(1.0, 1.0)]
    elif spectrum == "breath":
        found = [(1.0, 1.0), (2.0, 0.7), (3.0, 0.5)]
    else:
        step = 2 if spectrum == "hollow" else 1
        found = [(float(k), _weight(spectrum, k, pitch)) for k in range(1, 40, step)]
    return [(ratio, weight) for ratio, weight in found if ratio * pitch < _HIGHEST]


def _weight(spectrum: str, harmonic: int, pitch: float) -> float:
    if spectrum != "vowel":
        return 1 / harmonic
    heard = (math.exp(-(((harmonic * pitch - middle) / width) ** 2)) for middle, width in _FORMANTS)
    return 0.05 / harmonic + sum(heard)


def _envelope(name: str, time: Wave) -> Wave:
    attack = np.minimum(1.0, time / 0.02) * np.minimum(1.0, (time[-1] - time) / 0.02)
    shapes: dict[str, Callable[[], Wave]] = {
        "plucked": lambda: np.exp(-time * 5.0),
        "pulsing": lambda: 0.5 + 0.5 * np.tanh(4 * np.sin(2 * np.pi * 7.0 * time)),
        "rising": lambda: time / time[-1],
        "steady": lambda: np.ones_like(time),
    }
    envelope: Wave = attack * shapes[name]()
    return envelope


def _noise(length: int, draws: Draws) -> Wave:
    """Noise of power 1: white, pink or brown."""
    slope = draws.pick((0.0, 0.5, 1.0))
    spectrum = np.fft.rfft(draws.normals(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 20.0) ** -slope
    noise = np.fft.irfft(spectrum, length)
    return noise / math.sqrt(float(np.mean(noise**2)))


def _smooth(noise: Wave) -> Wave:
    """Slow noise of power 1: the mean of 5 ms."""
    width = RATE // 200
    return np.convolve(noise, np.ones(width), "same") / math.sqrt(width)
