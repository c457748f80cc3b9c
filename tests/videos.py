"""Videos for tests, encoded by FFmpeg's libraries, whose frames show their own numbers."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

BITS = 10


def numbered(count: int, height: int = 48, width: int = 80, first: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: each frame shows its number as dark and bright stripes, the lowest bit on the left."""
    numbers = np.arange(first, first + count)
    bits = (numbers[:, None] >> np.arange(BITS)) & 1
    stripes = np.repeat(np.where(bits, 220, 30), width // BITS, axis=1).astype(np.uint8)
    stripes = np.pad(stripes, ((0, 0), (0, width - stripes.shape[1])), mode="edge")
    return np.ascontiguousarray(np.broadcast_to(stripes[:, None, :, None], (count, height, width, 3)))


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, H, W, 3] show."""
    width = frames.shape[2] // BITS
    middles = frames[:, frames.shape[1] // 2, width // 2 :: width, 0][:, :BITS]
    return ((middles > 125).astype(int) << np.arange(BITS)).sum(axis=1).tolist()


def encoded_video(
    images: np.ndarray,
    stamps: Sequence[int] | None = None,
    *,
    unit: Fraction = Fraction(1, 10),
    kind: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    degrees: float | None = None,
    mirrored: bool = False,
    pixel_ratio: Fraction | None = None,
    colours: dict[str, int] | None = None,
    images_format: str = "rgb24",
) -> bytes:
    """uint8 [N, H, W, 3] (or 4) with a time stamp for each image in ``unit`` seconds, or 0, 1, 2, ..."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind, options=container_options or {}) as container:
        track = container.add_stream(codec, rate=1 / unit, options=options or {})
        track.width, track.height, track.pix_fmt = images.shape[2], images.shape[1], pixels
        track.codec_context.time_base = unit
        if pixel_ratio is not None:
            track.codec_context.sample_aspect_ratio = pixel_ratio
        for name, value in (colours or {}).items():
            setattr(track.codec_context, name, value)
        if degrees is not None or mirrored:
            track.set_display_rotation(degrees or 0.0, hflip=mirrored)
        for image, stamp in zip(images, stamps or range(len(images)), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=images_format)
            frame.pts, frame.time_base = stamp, unit
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def every_frame(body: bytes) -> list[tuple[float, Any]]:
    """Time stamp and frame of everything that FFmpeg decodes from the first packet on, in order of display.

    The time stamps are sorted: in AVI they are those of the order of decoding.
    """
    with av.open(io.BytesIO(body)) as container:
        frames = list(container.decode(video=0))
    stamps = sorted(float(frame.pts * frame.time_base) for frame in frames if frame.pts is not None)
    step = stamps[1] - stamps[0] if len(stamps) > 1 else 1.0
    stamps += [stamps[-1] + step * (more + 1) for more in range(len(frames) - len(stamps))]
    return list(zip(stamps, frames, strict=True))
