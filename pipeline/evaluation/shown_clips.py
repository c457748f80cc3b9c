"""Videos for people: clips that every browser and MLflow play, and single frames."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor

from pipeline.codecs.video import VideoCodec, VideoOptions
from pipeline.errors import SampleError
from pipeline.loaders.images import as_stored
from pipeline.loaders.sample_figures import contact_row, frames_of
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.video_frames import read_frames

PLAYED = 30.0
"""Longest played clip in seconds."""
LONGEST_SIDE = 320  # of a played clip's shorter side: larger ones are reduced


def clip_files(captioned: Iterable[tuple[Sample, str]]) -> dict[str, bytes]:
    """The clips of samples as MP4, named by number and caption; samples without a readable video are left out."""
    return named_files(captioned, playable_clip, "mp4")


def named_files(
    captioned: Iterable[tuple[Sample, str]], play: Callable[[Sample], bytes], ending: str
) -> dict[str, bytes]:
    """What ``play`` makes of samples, by number and caption; samples that it cannot read are left out."""
    files = {}
    for number, (sample, caption) in enumerate(captioned):
        try:
            name = re.sub(r"[^\w.-]+", "_", caption, flags=re.ASCII).strip("_.")[:60]
            files[f"{number:02d}_{name or sample.key}.{ending}"] = play(sample)
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
