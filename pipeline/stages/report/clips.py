"""Videos of a report: values for its histograms, and short examples that a page can play."""

import base64
from typing import NamedTuple

import simplejpeg

from pipeline.codecs import codec_of
from pipeline.codecs.video import VideoOptions
from pipeline.config import parse_json
from pipeline.errors import SampleError
from pipeline.shards.media import VIDEO
from pipeline.shards.sample import Sample
from pipeline.shards.text import decoded

EXAMPLE_SIZE, EXAMPLE_QUALITY = 160, 30  # a page of two dozen examples of four seconds then has some two megabytes
STORED = {
    "clip_seconds": "video_seconds",
    "clip_width": "video_width",
    "clip_height": "video_height",
    "clip_rate": "video_rate",
}
"""Values by the columns of the codec."""


class ExampleClip(NamedTuple):
    """The start of a video as MP4 and its middle frame as JPEG, both in base64."""

    mp4: str
    poster: str


def clip_values(sample: Sample) -> dict[str, float] | None:
    """Seconds, width, height and frame rate: those in the sample's json, else the header's; None for a broken video."""
    body = sample.body(VIDEO)
    if body is None:
        return {}
    record = _json(sample)
    found = {name: record.get(column) for name, column in STORED.items()}
    if not all(isinstance(value, int | float) for value in found.values()):
        from pipeline.shards.video_frames import read_video_header  # loads decoders, which other reports do not need

        try:
            header = read_video_header(body)
        except SampleError:
            return None
        found = {
            "clip_seconds": header.seconds,
            "clip_width": header.width,
            "clip_height": header.height,
            "clip_rate": header.frame_rate,
        }
    known = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    return known | {"clip_bytes": float(len(body))}


def example_clip(body: bytes, seconds: float) -> ExampleClip | None:
    """The start of a video in a small size; None where it cannot be decoded."""
    from pipeline.shards.video_frames import read_frames

    options = VideoOptions(
        video_seconds=seconds, video_size=EXAMPLE_SIZE, video_quality=EXAMPLE_QUALITY, video_min_seconds=0.0
    )
    try:
        clip = codec_of(VIDEO.name).encode(body, options).fields["mp4"]
        poster = read_frames(clip, lambda line: [line.end / 2]).pixels[0]
    except SampleError:
        return None
    image = simplejpeg.encode_jpeg(poster, quality=80, colorspace="RGB")
    return ExampleClip(*(base64.b64encode(content).decode() for content in (clip, image)))


def _json(sample: Sample) -> dict[str, object]:
    try:
        record = parse_json(decoded(sample.fields.get("json", b"{}")))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
