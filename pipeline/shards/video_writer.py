"""Write frames as MP4 with H.264, by libx264 inside the wheel of PyAV."""

from collections.abc import Mapping
from fractions import Fraction
from io import BytesIO

import av
from av.packet import Packet
from av.video.frame import PictureType
from av.video.stream import VideoStream

UNIT = Fraction(1, 90_000)
"""Seconds of one step of the time stamps that are written."""

_KEEP = ("colorspace", "color_primaries", "color_trc")
_LIMITED_RANGE = 1
_PRESET = "veryfast"
# The analysis of coming frames reads memory beyond frames of some sizes, so that the bytes vary from call to call.
# Without it, a crf that is two higher gives the same error and the same number of bytes.
_REPEATABLE = "mbtree=0:b-adapt=0:scenecut=0:weightp=0"


class Mp4Writer:
    """Collects frames of one size, ``yuv420p`` with even sides, each with its time; :meth:`finish` gives the file.

    ``crf`` is libx264's constant rate factor, 0 (lossless) to 51. A key frame begins at least every ``key_seconds``, so
    that readers can seek. ``rate`` is the expected number of frames per second, a hint for the encoder. The same frames
    give the same bytes with the same version of libx264.
    """

    def __init__(self, size: tuple[int, int], *, crf: int = 25, key_seconds: float = 2.0, rate: float = 25.0) -> None:
        self._file = BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        options = {"preset": _PRESET, "crf": str(crf), "threads": "1", "forced-idr": "1", "flags": "+bitexact"}
        options["x264-params"] = _REPEATABLE
        self._stream = self._container.add_stream("libx264", rate=_fraction(rate), options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = UNIT
        self._stream.codec_context.color_range = _LIMITED_RANGE
        self._stream.codec_context.gop_size = max(1, round(10 * key_seconds * rate))
        self._key_step = key_seconds / UNIT
        self._next_key = 0.0
        self._last: Packet[VideoStream] | None = None
        self._first = self._end = 0
        self.frames = 0

    def colours(self, values: Mapping[str, int]) -> None:
        """Set ``colorspace``, ``color_primaries`` and ``color_trc`` (FFmpeg's numbers) before the first frame."""
        for name in _KEEP:
            setattr(self._stream.codec_context, name, values[name])

    def add(self, frame: av.VideoFrame, begin: float, end: float) -> None:
        """Show ``frame`` from ``begin`` to ``end`` seconds; the first frame begins at 0, each at the end of another."""
        stamp = round(begin / UNIT)
        frame.pts, frame.time_base = stamp, UNIT
        frame.pict_type = PictureType.NONE
        if stamp >= self._next_key:
            frame.pict_type = PictureType.I
            self._next_key = stamp + self._key_step
        self._end = max(stamp + 1, round(end / UNIT))
        self._mux(frame)
        self.frames += 1

    def finish(self) -> bytes:
        """The complete file."""
        self._mux(None)
        if self._last is not None:
            # MP4 stores the durations in the order of decoding; with the last one their sum is the end.
            self._last.duration = max(1, self._end - (self._last.dts or 0) + self._first)
            self._container.mux(self._last)
        self._container.close()
        return self._file.getvalue()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            if self._last is None:
                self._first = packet.dts or 0
            else:
                self._container.mux(self._last)
            self._last = packet


def _fraction(rate: float) -> Fraction:
    return Fraction(min(max(rate, 1 / 60), 1_000)).limit_denominator(1_001)
