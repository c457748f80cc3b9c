"""Log-mel spectrograms of waveforms, computed in batches on the device of the module.

The defaults are LAION-CLAP's (arXiv 2211.06687). The result equals transformers' ``ClapFeatureExtractor`` to 1e-4 dB in
float64. In float32 that holds within 60 dB of the loudest frequency of a frame; below, rounding adds up to 0.1 dB.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from pipeline.config import require

SMALLEST_POWER = 1e-10
"""Power of a band below which the logarithm is not taken: -100 dB."""


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """A short-time Fourier transform with a periodic Hann window, and triangular filters on the mel scale."""

    sample_rate: int = 48_000
    """Samples per second of the waveform."""
    window: int = 1024
    """Samples of a window, 16 or more."""
    hop: int = 480
    """Samples from one frame to the next, 1 or more."""
    bands: int = 64
    """Number of mel bands."""
    low: float = 50.0
    """Lowest frequency, in hertz."""
    high: float = 14_000.0
    """Highest frequency, in hertz; at most half the sample rate."""
    scale: Literal["htk", "slaney"] = "htk"
    """Mel scale: `htk` with filters of height 1 (torchaudio's default, CLAP with fusion), or `slaney` with filters of
    area 1 (librosa's default, CLAP without fusion)."""

    def __post_init__(self) -> None:
        require(1_000 <= self.sample_rate <= 768_000, "sample_rate", self.sample_rate, "1,000 to 768,000")
        require(16 <= self.window <= 1 << 16, "window", self.window, "16 to 65,536 samples")
        require(1 <= self.hop <= self.window, "hop", self.hop, "1 to the samples of a window")
        require(1 <= self.bands <= 512, "bands", self.bands, "1 to 512")
        half = self.sample_rate / 2
        require(0 <= self.low < self.high <= half, "high", self.high, f"more than {self.low:g}, at most {half:g} hertz")

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform of ``samples`` samples."""
        return 1 + samples // self.hop


class LogMel(nn.Module):
    """Waveforms float [..., T] to decibels [..., frames, bands] in ``dtype``; without parameters.

    The ends of a waveform are mirrored, so that the first frame is centred on the first sample; T is more than half a
    window. The arithmetic has ``dtype`` under autocast, too.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, config: LogMelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        filters = mel_filter_bank(
            num_frequency_bins=config.window // 2 + 1,
            num_mel_filters=config.bands,
            min_frequency=config.low,
            max_frequency=config.high,
            sampling_rate=config.sample_rate,
            norm="slaney" if config.scale == "slaney" else None,
            mel_scale=config.scale,
        )
        # Frequencies above the last band cost nothing. Both follow from the config, so they are not in the state.
        used = filters[: int(np.flatnonzero(filters.any(axis=1)).max(initial=0)) + 1]
        hann = torch.hann_window(config.window, dtype=torch.float64)
        self.register_buffer("window", hann.to(dtype), persistent=False)
        self.register_buffer("filters", torch.from_numpy(used).to(dtype), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Decibels; see the class."""
        half = self.config.window // 2
        with torch.autocast(waveform.device.type, enabled=False):
            flat = waveform.reshape(-1, 1, waveform.shape[-1]).to(self.window.dtype)
            mirrored = functional.pad(flat, (half, half), mode="reflect")[:, 0]
            # A third faster than torch.stft on CPUs.
            spectrum = torch.fft.rfft(mirrored.unfold(-1, self.config.window, self.config.hop) * self.window)
            used = spectrum[..., : len(self.filters)]
            power = (used.real.square() + used.imag.square()) @ self.filters
            decibels: Tensor = 10 * power.clamp(min=SMALLEST_POWER).log10()
        return decibels.reshape(*waveform.shape[:-1], *decibels.shape[1:])
