"""Timed captions of videos and sounds: texts with a start and an end, from the json of a sample.

``timed_captions`` is a list of ``{"start": 2.0, "end": 5.5, "text": "..."}`` in seconds of the clip.
"""

import math
from typing import Any, NamedTuple

from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.shards.sample import Sample

KEY = "timed_captions"


class TimedText(NamedTuple):
    """A text, and when it is said or shown, in seconds of the clip."""

    start: float
    end: float
    text: str


def read_timed_captions(sample: Sample) -> list[TimedText] | None:
    """The timed captions of a sample, by their start; ``None`` where its json has no such list.

    Entries without a text, or with times that are not finite numbers, negative or backwards, are left out.

    Raises:
        UnreadableSample: there is a list, but without a valid entry.
    """
    listed = json_of_sample(sample).get(KEY)
    if listed is None:
        return None
    found = [one for one in map(_timed, listed if isinstance(listed, list) else ()) if one is not None]
    if not found:
        raise UnreadableSample(f"{sample.key}.json has no valid entry in {KEY}")
    return sorted(found)


def _timed(entry: Any) -> TimedText | None:
    if not isinstance(entry, dict):
        return None
    start, end, text = _seconds(entry.get("start")), _seconds(entry.get("end")), entry.get("text")
    if not isinstance(text, str) or not text.strip():
        return None
    return TimedText(start, end, text) if 0 <= start <= end < math.inf else None


def _seconds(value: Any) -> float:
    """A number as float; NaN for any other value."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
