"""Sounds for tests, encoded by the libraries themselves, and waveforms with known values."""

import io
import tempfile
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile


def tone(rate: int = 16_000, seconds: float = 1.0, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    """A sine, float32 [T]."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    """float32 [T] or [T, C] by libsndfile."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def by_ffmpeg(samples: np.ndarray, rate: int, kind: str = "mp4", codec: str = "aac", **options: Any) -> bytes:
    """float32 [T] or [T, 2] in a container of FFmpeg's."""
    values = samples[:, None] if samples.ndim == 1 else samples
    with tempfile.NamedTemporaryFile() as file:  # FFmpeg opens it a second time for "faststart"
        with av.open(file.name, "w", format=kind, **options) as container:
            track = container.add_stream(codec, rate=rate, layout="stereo" if values.shape[1] == 2 else "mono")
            _encode(container, track, values, rate)
        return file.read()


class Pipe:
    """Collects what a writer writes; cannot seek."""

    def __init__(self) -> None:
        self.body = b""

    def write(self, content: bytes) -> int:
        self.body += content
        return len(content)


def piped(samples: np.ndarray, rate: int, kind: str, codec: str) -> bytes:
    """float32 [T] as FFmpeg writes it to a pipe: the header is never completed."""
    pipe = Pipe()
    with av.open(pipe, "w", format=kind) as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        _encode(container, track, samples[:, None], rate)
    return pipe.body


def video(
    images: np.ndarray, fps: int, samples: np.ndarray | None, rate: int = 16_000, kind: str = "mp4", codec: str = "h264"
) -> bytes:
    """uint8 [N, H, W, 3] as a video, with a sound float32 [T] or without."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        pictures = container.add_stream(codec, rate=fps, width=images.shape[2], height=images.shape[1])
        pictures.pix_fmt = "yuv420p"
        track = None if samples is None else container.add_stream("aac", rate=rate, layout="mono")
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        if track is not None and samples is not None:
            _encode(container, track, samples[:, None], rate)
    return stream.getvalue()


def _encode(container: Any, track: Any, values: np.ndarray, rate: int) -> None:
    planes = np.ascontiguousarray(values.T, np.float32)
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo" if len(planes) == 2 else "mono")
    frame.sample_rate, frame.pts = rate, 0
    for converted in av.AudioResampler(track.format, track.layout, rate).resample(frame):
        container.mux(track.encode(converted))
    container.mux(track.encode(None))
