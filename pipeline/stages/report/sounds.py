"""Sounds of a report: values for its histograms, and short examples that a page can play."""

import base64
from collections.abc import Mapping

from pipeline.codecs import codec_of
from pipeline.codecs.audio import AudioOptions
from pipeline.config import parse_json
from pipeline.errors import SampleError
from pipeline.shards.media import AUDIO
from pipeline.shards.sample import Sample
from pipeline.shards.text import decoded

EXAMPLE_RATE = 16_000  # a page of two dozen examples of five seconds then has some two megabytes
LOUDNESS = "audio_loudness"


def sound_values(sample: Sample) -> dict[str, float] | None:
    """Seconds, rate, channels and, where the sample's json has it, loudness in dBFS; None for an unreadable sound."""
    body = sample.body(AUDIO)
    if body is None:
        return {}
    from pipeline.shards.waveforms import read_header  # loads decoders, which reports of images do not need

    try:
        header = read_header(body)
    except SampleError:
        return None
    found = {"rate": float(header.sample_rate), "channels": float(header.channels), "sound_bytes": float(len(body))}
    if header.seconds is not None:
        found["seconds"] = header.seconds
    loudness = _json(sample).get(LOUDNESS)
    if isinstance(loudness, int | float) and not isinstance(loudness, bool):
        found["loudness"] = float(loudness)
    return found


def example(body: bytes, seconds: float) -> str:
    """The start of a sound, mono, as FLAC in base64; empty where it cannot be decoded."""
    options = AudioOptions(
        audio_rate=EXAMPLE_RATE, audio_seconds=seconds, audio_min_seconds=0, audio_min_loudness=-120.0
    )
    try:
        part = codec_of(AUDIO.name).encode(body, options)
    except SampleError:
        return ""
    return base64.b64encode(next(iter(part.fields.values()))).decode()


def _json(sample: Sample) -> Mapping[str, object]:
    try:
        record = parse_json(decoded(sample.fields.get("json", b"{}")))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
