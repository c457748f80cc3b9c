"""Clips of sound files and videos in a folder, as parts of rows: a video, or a sound and a frame from the middle."""

from pipeline.errors import SampleError
from pipeline.shards.segments import with_segment
from pipeline.shards.storage import Folder
from pipeline.sources.source import Part

MOST_BYTES = 128 << 20
"""Largest file that is read whole; of a larger one the first ``MOST_SECONDS`` are read."""
MOST_SECONDS = 600.0
WHOLE_BYTES = 16 << 20
"""Largest video that is given whole for each of its clips; out of a larger one their packets are copied."""

_QUALITY = 95


def read_clip(
    place: Folder, path: str, start: float | None = None, seconds: float | None = None, frame: bool = False
) -> tuple[Part, ...]:
    """The sound from ``start`` on, ``seconds`` long, as FLAC of 16 bits; without both, the whole file as it is.

    With ``frame`` the frame at the middle of the clip comes first, as JPEG. A video without sound is a frame alone.
    Memory is bounded by the clip.

    Raises:
        SampleError: "failed_to_download" where the file cannot be read, else the decoders' classes.
    """
    try:
        if frame:
            return _frame_and_sound(place, path, start, seconds)
        if start is None and seconds is None and place.size(path) <= MOST_BYTES:
            return (Part("audio", place.read_bytes(path)),)
        return (_sound(place, path, start or 0.0, seconds or MOST_SECONDS),)
    except OSError as error:
        raise SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}") from error


def read_video(place: Folder, path: str, start: float | None = None, seconds: float | None = None) -> tuple[Part, ...]:
    """The video from ``start`` on, ``seconds`` long, still encoded; without both, the whole file.

    The url of the part says where the clip is in its body. Memory is bounded by the clip.

    Raises:
        SampleError: as :func:`read_clip`.
    """
    try:
        small = place.size(path) <= WHOLE_BYTES
        if start is None and (small or place.size(path) <= MOST_BYTES):
            return (Part("video", place.read_bytes(path), url=path),)
        begin, length = start or 0.0, seconds or MOST_SECONDS
        if small:
            return (Part("video", place.read_bytes(path), url=with_segment(path, begin, begin + length)),)
        from pipeline.shards.video_cut import copy_clip

        with place.open(path) as file:
            body, inside = copy_clip(file, begin, min(length, MOST_SECONDS))
        return (Part("video", body, url=with_segment(path, inside, inside + length)),)
    except OSError as error:
        raise SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}") from error


def _sound(place: Folder, path: str, start: float, seconds: float) -> Part:
    from pipeline.shards.waveforms import encode_flac, read_waveform

    with place.open(path) as file:
        sound = read_waveform(file, start=start, seconds=min(seconds, MOST_SECONDS), stereo=True)
    return Part("audio", encode_flac(sound.samples, sound.sample_rate))


def _frame_and_sound(place: Folder, path: str, start: float | None, seconds: float | None) -> tuple[Part, ...]:
    import simplejpeg

    from pipeline.shards.video_frames import read_frame, read_length

    begin = start or 0.0
    with place.open(path) as file:
        length = seconds or max(0.0, (read_length(file) or 0.0) - begin)
        pixels = read_frame(file, begin + min(length, MOST_SECONDS) / 2)
    image = Part("image", simplejpeg.encode_jpeg(pixels, quality=_QUALITY))
    try:
        return image, _sound(place, path, begin, length or MOST_SECONDS)
    except SampleError as error:
        if error.error_class == "no_sound":
            return (image,)
        raise
