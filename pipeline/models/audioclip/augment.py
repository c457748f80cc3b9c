"""AudioCLIP's augmentation of sounds, and their fixed length, as pure functions of random numbers.

Guzhov, Raue, Hees, Dengel, 2021, arXiv 2106.13043, in the order of the authors' code: time inversion, time scaling,
padding, cropping, noise. In evaluation a sound is padded or cropped around its middle.

Their time inversion flips the first dimension of a sound [C, T]: it exchanges the channels of a stereo sound and does
nothing to a mono one. Here time is inverted; ``inversion="channels"`` is theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config import require

NUMBERS = 6
"""Uniform random numbers of one sound: inversion, speed, place in the padding, crop, noise, level of the noise."""


@dataclass(frozen=True, kw_only=True)
class SoundAugmentation:
    """Strengths and probabilities, with the values of the authors' code."""

    invert: float = 0.5
    """Probability of inverting a sound, 0 to 1."""
    inversion: Literal["time", "channels"] = "time"
    """What is inverted: time, or the order of the channels (the authors' code)."""
    time_scale: float = 1.5
    """Largest factor of the random speed, 1 or more: a sound becomes up to this much longer or shorter."""
    noise: float = 0.25
    """Probability of adding Gaussian noise, 0 to 1."""
    noise_snr: tuple[float, float] = (10.0, 120.0)
    """Range of the ratio of signal to noise in decibels; the authors' code draws up to 1 dB more than the second."""

    def __post_init__(self) -> None:
        for name in ("invert", "noise"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        require(1 <= self.time_scale <= 10, "time_scale", self.time_scale, "1 to 10")
        low, high = self.noise_snr
        require(-100 <= low <= high <= 300, "noise_snr", self.noise_snr, "-100 <= low <= high <= 300")


def augmented(
    sound: Tensor, length: int, config: SoundAugmentation, random: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Float [C, T] to [C, length]. ``random`` are ``NUMBERS`` uniform numbers, 0 to less than 1."""
    if random[0] < config.invert:
        sound = sound.flip(-1 if config.inversion == "time" else 0)
    sound = time_scaled(sound, config.time_scale ** (2 * random[1] - 1))
    sound = cropped(padded(sound, length, random[2]), length, random[3])
    if random[4] < config.noise:
        low, high = config.noise_snr
        sound = with_noise(sound, low + random[5] * (high - low + 1), generator)
    return sound


def fixed_length(sound: Tensor, length: int) -> Tensor:
    """Float [C, T] to [C, length], padded or cropped around its middle."""
    return cropped(padded(sound, length), length)


def time_scaled(sound: Tensor, factor: float) -> Tensor:
    """Float [C, T] to [C, floor(factor T)] (at least one sample), interpolated linearly; pitch changes with speed."""
    places = torch.arange(max(int(sound.shape[-1] * factor), 1), dtype=torch.float64) / factor
    before = places.long().clamp(max=sound.shape[-1] - 1)
    after = (before + 1).clamp(max=sound.shape[-1] - 1)
    weight = (places - before).to(sound.dtype)
    return sound[:, before] * (1 - weight) + sound[:, after] * weight


def padded(sound: Tensor, length: int, random: float | None = None) -> Tensor:
    """Float [C, T] to at least ``length`` samples, with the mean of the channels at each end.

    ``random``, 0 to less than 1, places the sound; without it, it is in the middle.
    """
    missing = length - sound.shape[-1]
    if missing <= 0:
        return sound
    before = round(missing / 2) if random is None else int(random * missing)
    ends = [sound[:, :1].mean().expand(len(sound), before), sound[:, -1:].mean().expand(len(sound), missing - before)]
    return torch.cat([ends[0], sound, ends[1]], dim=1)


def cropped(sound: Tensor, length: int, random: float | None = None) -> Tensor:
    """Float [C, T] to at most ``length`` samples.

    A crop with less than half the deviation of the sound is replaced by its start; if that is also below the half, yet
    louder than the crop, by its end (the authors' rule, in training and evaluation).
    """
    surplus = sound.shape[-1] - length
    if surplus <= 0:
        return sound
    start = round(surplus / 2) if random is None else int(random * surplus)
    crop, least = sound[:, start : start + length], sound.std() / 2
    if crop.std() >= least:
        return crop
    head = sound[:, :length]
    return sound[:, -length:] if crop.std() < head.std() < least else head


def with_noise(sound: Tensor, decibels: float, generator: torch.Generator) -> Tensor:
    """Add white noise whose power is ``decibels`` below the sound's."""
    power = sound.square().mean() / 10 ** (decibels / 10)
    noise = torch.randn(sound.shape, generator=generator, dtype=sound.dtype)
    return sound + noise * power.sqrt()
