"""Samples for people: a picture of each medium, and sounds that browsers and MLflow play.

The picture of a sound is its spectrogram: power in dB of windows of 25 ms on a mel scale, up to half of its rate. That
of a video are frames in a row, see ``shown_clips.py``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.codecs.point_views import depth_image
from pipeline.errors import SampleError
from pipeline.evaluation.figures import RIGHT, WRONG
from pipeline.evaluation.shown_clips import named_files, video_picture
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.images import as_stored, decode
from pipeline.loaders.points import PointReader
from pipeline.loaders.sample_figures import blank_figure, show_image, wrapped
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import AUDIO, MEDIA, POINTS, VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.waveforms import Waveform, encode_flac, read_waveform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAYED = 30.0
"""Seconds of a sound that are shown and played."""
WINDOW, BANDS, RANGE = 0.025, 96, 80.0  # seconds, mel bands, and dB below the loudest that are shown
WIDEST = 480  # pixels
FASTEST = 48_000  # Hz: browsers play any rate up to it


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """``picture``: a picture of one medium of each sample, as a list of uint8 [3, H, W]."""

    medium: str
    key: str = "picture"
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The picture; raises :class:`UnreadableSample`."""
        return {self.key: picture(sample, self.medium)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list."""
        return {self.key: [row[self.key] for row in rows]}


@dataclass(frozen=True, kw_only=True)
class SampleReader:
    """``sample``: the samples themselves, as a list."""

    key: str = "sample"
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The sample."""
        return {self.key: sample}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list."""
        return {self.key: [row[self.key] for row in rows]}


def picture(sample: Sample, medium: str) -> Tensor:
    """An image, the spectrogram of a sound, frames of a video or views of a point cloud in a row, as uint8 [3, H, W].

    Raises:
        UnreadableSample: the sample has no readable part of this medium.
    """
    if medium == AUDIO.name:
        return spectrogram(sound_of(sample))
    if medium == VIDEO.name:
        return video_picture(sample)
    if medium == POINTS.name:
        return depth_image(PointReader().read(sample)["points"])
    return as_stored(decode(_part(sample, medium)))


def sound_of(sample: Sample, seconds: float = PLAYED) -> Waveform:
    """The first ``seconds`` of the sample's sound, mono, at its own rate or at 48 kHz if that is less.

    Raises:
        UnreadableSample: the sample has no readable sound.
    """
    try:
        found = read_waveform(_part(sample, AUDIO.name), seconds=seconds)
        if found.sample_rate <= FASTEST:
            return found
        return read_waveform(_part(sample, AUDIO.name), seconds=seconds, sample_rate=FASTEST)
    except SampleError as error:
        raise UnreadableSample(f"{sample.key}: {error}") from error


def spectrogram(sound: Waveform) -> Tensor:
    """The mel spectrogram in colours, low pitches below: uint8 [3, 96, W], W up to 481, a column for 10 ms or more."""
    from matplotlib import colormaps

    samples = torch.from_numpy(sound.samples).mean(dim=0)
    window = max(16, round(WINDOW * sound.sample_rate))
    hop = max(1, round(sound.sample_rate / 100), math.ceil(len(samples) / WIDEST))
    size = max(_fft_size(sound.sample_rate), 2 ** math.ceil(math.log2(window)))
    bands = _mel_bands(size, sound.sample_rate)
    spectrum = torch.stft(
        samples, size, hop, window, torch.hann_window(window), pad_mode="constant", return_complex=True
    )
    power = bands.T @ spectrum.abs().square().double()
    loudest = float(power.max())
    level = (10 * (power / loudest).clamp(min=1e-30).log10() / RANGE + 1).clamp(0, 1) if loudest > 0 else power
    colours: NDArray[np.float64] = colormaps["magma"](level.flip(0).numpy())[..., :3]
    return torch.from_numpy((255 * colours).round().astype(np.uint8).transpose(2, 0, 1).copy())


def _fft_size(sample_rate: int) -> int:
    """The smallest power of two at which every band has a frequency of the transform."""
    first = 700 * (10 ** (math.log10(1 + sample_rate / 1400) / (BANDS + 1)) - 1)
    return int(2 ** math.ceil(math.log2(sample_rate / first)))


@cache
def _mel_bands(size: int, sample_rate: int) -> Tensor:
    """Triangular filters on HTK's mel scale, float64 [size / 2 + 1, 96]."""
    from transformers.audio_utils import mel_filter_bank

    bands = mel_filter_bank(size // 2 + 1, BANDS, 0.0, sample_rate / 2, sample_rate, norm=None, mel_scale="htk")
    return torch.from_numpy(np.asarray(bands, np.float64))


def sound_grid(
    samples: Sequence[Sample], captions: Sequence[str], right: Sequence[bool] = (), columns: int = 4, title: str = ""
) -> "Figure":
    """Spectrograms over their captions; green where ``right``, red where not."""
    rows = -(-len(samples) // columns)
    figure = blank_figure(3.6 * columns, 2.6 * rows + 0.5, title)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes[len(samples) :]:
        axis.axis("off")
    for number, (axis, sample, caption) in enumerate(zip(axes, samples, captions, strict=False)):
        sound = sound_of(sample)
        show_image(axis, spectrogram(sound))
        axis.set_aspect("auto")
        axis.set_title(f"{sound.seconds:.3g} s, {sound.sample_rate / 1000:g} kHz", fontsize=8, loc="left", pad=3)
        colour = "black" if not right else RIGHT if right[number] else WRONG
        axis.set_xlabel(wrapped(caption, 40, 3), fontsize=9, color=colour, parse_math=False)
    return figure


def sound_files(captioned: Iterable[tuple[Sample, str]]) -> dict[str, bytes]:
    """The sounds of samples as FLAC, named by number and caption; samples without a readable sound are left out."""
    return named_files(captioned, playable, "flac")


def playable(sample: Sample) -> bytes:
    """The sound as FLAC of 16 bits, 30 seconds at most; raises :class:`UnreadableSample`."""
    sound = sound_of(sample)
    content: bytes = encode_flac(sound.samples, sound.sample_rate)
    return content


def _part(sample: Sample, medium: str) -> bytes:
    content = sample.body(MEDIA[medium])
    if content is None:
        raise UnreadableSample(f"{sample.key} has no {medium}")
    return content
