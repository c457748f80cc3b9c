"""Videos for people: frames in a row with their times, and clips that every browser and MLflow play."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.codecs.video import VideoCodec, VideoOptions
from pipeline.errors import SampleError
from pipeline.evaluation.figures import RIGHT, WRONG
from pipeline.loaders.frames import FrameSampling
from pipeline.loaders.images import as_stored, resize
from pipeline.loaders.sample_figures import blank_figure, show_image, wrapped
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import Frames, read_frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAYED = 30.0
"""Longest played clip in seconds."""
FRAMES, HEIGHT, GAP = 8, 96, 2
"""Frames of a contact row, their height and the white columns between them, in pixels."""
LONGEST_SIDE = 320  # of a played clip's shorter side: larger ones are reduced


def frames_of(sample: Sample, count: int = FRAMES) -> Frames:
    """``count`` frames at equal distances, each the middle one of its part.

    Raises:
        UnreadableSample: the sample has no readable video.
    """
    body = _body(sample)
    sampling = FrameSampling(mode="segments", frames=count)
    try:
        return read_frames(body, sampling.frame_times, size=2 * HEIGHT)
    except SampleError as error:
        raise UnreadableSample(f"{sample.key}: {error.message}") from error


def contact_row(frames: Frames) -> Tensor:
    """The frames side by side: uint8 [3, ``HEIGHT``, W]."""
    width = max(1, round(HEIGHT * frames.pixels.shape[2] / frames.pixels.shape[1]))
    cells = [resize(pixels, (HEIGHT, width)) for pixels in frames.pixels]
    white = torch.full((3, HEIGHT, GAP), 255, dtype=torch.uint8)
    parts = [part for cell in cells for part in (cell, white)]
    return torch.cat(parts[:-1], dim=2)


def clip_grid(
    samples: Sequence[Sample], captions: Sequence[str], right: Sequence[bool] = (), title: str = ""
) -> "Figure":
    """Frames of each clip in a row, with their times below and its caption above; green where ``right``, red where not.

    Samples without a readable video are shown as an empty row.
    """
    figure = blank_figure(11, 1.5 * len(samples) + 0.5, title)
    axes = figure.subplots(len(samples), 1, squeeze=False).flat
    for number, (axis, sample, caption) in enumerate(zip(axes, samples, captions, strict=True)):
        try:
            frames = frames_of(sample)
            row, times = contact_row(frames), frames.times
        except UnreadableSample:
            row, times = torch.full((3, HEIGHT, HEIGHT * FRAMES), 255, dtype=torch.uint8), np.zeros(0, np.float32)
        show_image(axis, row)
        pitch = (row.shape[2] + GAP) / max(len(times), 1)
        axis.set_xticks([pitch * (place + 0.5) - GAP / 2 for place in range(len(times))])
        axis.set_xticklabels([f"{time:.2f} s" for time in times.tolist()], fontsize=7)
        axis.tick_params(length=0, pad=1)
        colour = "black" if not right else RIGHT if right[number] else WRONG
        words = wrapped(caption, 120, 2) if len(times) else f"{wrapped(caption, 100, 1)} (not readable)"
        axis.set_title(words, fontsize=8.5, loc="left", pad=3, color=colour, parse_math=False)
    return figure


def clip_files(captioned: Iterable[tuple[Sample, str]]) -> dict[str, bytes]:
    """The clips of samples as MP4, named by number and caption; samples without a readable video are left out."""
    files = {}
    for number, (sample, caption) in enumerate(captioned):
        try:
            name = re.sub(r"[^\w.-]+", "_", caption, flags=re.ASCII).strip("_.")[:60]
            files[f"{number:02d}_{name or sample.key}.mp4"] = playable_clip(sample)
        except UnreadableSample:
            continue
    return files


def playable_clip(sample: Sample, seconds: float = PLAYED, around: float = 0.0) -> bytes:
    """A clip of at most ``seconds`` as MP4 with H.264, which all browsers play, without sound.

    Of a longer video it is the part with ``around``, in seconds, in its middle.

    Raises:
        UnreadableSample: the sample has no readable video.
    """
    body = _body(sample)
    options = VideoOptions(video_size=LONGEST_SIDE, video_seconds=seconds, video_quality=26, video_min_seconds=0.0)
    begin = max(0.0, around - seconds / 2)
    try:
        encoded = VideoCodec().encode(body, options, (begin, begin + seconds) if begin else None)
    except SampleError as error:
        raise UnreadableSample(f"{sample.key}: {error.message}") from error
    return encoded.fields["mp4"]


def video_picture(sample: Sample) -> Tensor:
    """The contact row of a sample's video; raises :class:`UnreadableSample`."""
    return contact_row(frames_of(sample))


def frame_at(sample: Sample, seconds: float) -> Tensor:
    """The frame that is shown at a time: uint8 [3, H, W]; raises :class:`UnreadableSample`."""
    body = _body(sample)
    try:
        return as_stored(read_frames(body, [seconds], size=LONGEST_SIDE).pixels[0])
    except SampleError as error:
        raise UnreadableSample(f"{sample.key}: {error.message}") from error


def _body(sample: Sample) -> bytes:
    content = sample.body(VIDEO)
    if content is None:
        raise UnreadableSample(f"{sample.key} has no video")
    return content
