"""Segments of sounds and videos in urls: W3C Media Fragments, ``https://host/a.mp4#t=10,20``, in seconds."""

import math
import re

Segment = tuple[float, float]
"""Begin and end of a part in its file, in seconds; the end is later, and infinite where it is that of the file."""

_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_FRAGMENT = re.compile(rf"(?P<url>[^#]*)#t=(?:npt:)?(?P<begin>{_NUMBER})?(?:,(?P<end>{_NUMBER}))?", re.DOTALL)


def split_segment(url: str) -> tuple[str, Segment | None]:
    """The url without its segment, and the segment; a fragment that is none stays.

    >>> split_segment("http://host/a.mp4#t=1.5,4"), split_segment("http://host/a.mp4#t=,4")
    (('http://host/a.mp4', (1.5, 4.0)), ('http://host/a.mp4', (0.0, 4.0)))
    >>> split_segment("http://host/a.mp4#t=9"), split_segment("http://host/a.html#top")
    (('http://host/a.mp4', (9.0, inf)), ('http://host/a.html#top', None))
    """
    match = _FRAGMENT.fullmatch(url)
    if match is None or match["begin"] is match["end"] is None:
        return url, None
    begin = float(match["begin"] or 0)
    end = float(match["end"]) if match["end"] is not None else math.inf
    return (match["url"], (begin, end)) if begin < end else (url, None)


def with_segment(url: str, begin: float, end: float | None) -> str:
    """The url of a segment; without ``end`` up to the end of the file.

    >>> with_segment("http://host/a.mp4", 1.5, 4)
    'http://host/a.mp4#t=1.5,4'
    """
    return f"{url}#t={_plain(begin)}" + ("" if end is None else f",{_plain(end)}")


def _plain(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")
