"""The fixed bins of a report's histograms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Fixed bins from ``low`` to ``high``: ``per_unit`` bins per unit, or per doubling with ``doubling``."""

    title: str
    unit: str
    low: float
    high: float
    per_unit: float
    doubling: bool = False

    def bin(self, value: float) -> int:
        """The bin of ``value``; values outside the range go into the first or last bin."""
        place, first, last = (self._place(one) for one in (value, self.low, self.high))
        return int(min(max(place - first, 0), last - first - 1))

    def edge(self, number: int) -> float:
        """The lower edge of bin ``number``."""
        place = (self._place(self.low) + number) / self.per_unit
        return 2.0**place if self.doubling else place

    def _place(self, value: float) -> int:
        unit = math.log2(max(value, 1e-9)) if self.doubling else value
        return math.floor(unit * self.per_unit + 1e-9)


SCALES: Mapping[str, Scale] = {
    "width": Scale(title="Width", unit="pixels", low=8, high=32768, per_unit=8, doubling=True),
    "height": Scale(title="Height", unit="pixels", low=8, high=32768, per_unit=8, doubling=True),
    "original": Scale(
        title="Shorter side before resizing", unit="pixels", low=8, high=32768, per_unit=8, doubling=True
    ),
    "aspect": Scale(title="Aspect ratio", unit="width / height", low=1 / 16, high=16, per_unit=8, doubling=True),
    "bytes": Scale(title="Bytes per image", unit="bytes", low=64, high=2**28, per_unit=4, doubling=True),
    "seconds": Scale(title="Duration of sounds", unit="seconds", low=1 / 16, high=8192, per_unit=4, doubling=True),
    "rate": Scale(title="Sampling rate", unit="samples per second", low=1024, high=2**19, per_unit=8, doubling=True),
    "channels": Scale(title="Channels", unit="channels", low=0, high=65, per_unit=1),
    "loudness": Scale(title="Loudness", unit="dBFS", low=-120, high=1, per_unit=1),
    "sound_bytes": Scale(title="Bytes per sound", unit="bytes", low=64, high=2**30, per_unit=4, doubling=True),
    "clip_seconds": Scale(
        title="Duration of videos", unit="seconds", low=1 / 16, high=65536, per_unit=4, doubling=True
    ),
    "clip_width": Scale(title="Width of videos", unit="pixels", low=8, high=32768, per_unit=8, doubling=True),
    "clip_height": Scale(title="Height of videos", unit="pixels", low=8, high=32768, per_unit=8, doubling=True),
    "clip_rate": Scale(title="Frame rate", unit="frames per second", low=0, high=241, per_unit=1),
    "clip_bytes": Scale(title="Bytes per video", unit="bytes", low=64, high=2**34, per_unit=4, doubling=True),
    "cloud_points": Scale(title="Points per cloud", unit="points", low=1, high=2**23, per_unit=4, doubling=True),
    "cloud_extent": Scale(
        title="Extent of clouds", unit="units of the files", low=2**-20, high=2**40, per_unit=2, doubling=True
    ),
    "cloud_bytes": Scale(title="Bytes per cloud", unit="bytes", low=64, high=2**30, per_unit=4, doubling=True),
    "words": Scale(title="Caption length", unit="words", low=0, high=160, per_unit=1),
    "score": Scale(title="CLIP score", unit="cosine of image and caption", low=-1, high=1, per_unit=50),
}
