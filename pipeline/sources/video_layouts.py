"""Lists of videos in the layouts in which data sets are published, as one kind of record.

| layout | table | from |
| --- | --- | --- |
| ``table`` | csv or tsv with a line of names | anything |
| ``msrvtt`` | ``MSRVTT_data.json``; the split is a csv: ``MSRVTT_JSFUSION_test.csv`` | MSR-VTT, 9k and 1k-A |
| ``kinetics`` | ``train.csv``: label, youtube_id, time_start, time_end, split | Kinetics-400, -600, -700 |
| ``hmdb51`` | folder of ``<class>_test_split1.txt``: name, and 1 (train), 2 (test) or 0 | HMDB-51 |
| ``ucf101`` | ``trainlist01.txt``: class/name, class number | UCF-101 |
| ``youcook2`` | ``youcookii_annotations_trainval.json`` | YouCook2 |
| ``howto100m`` | ``caption.json``: start, end and text of each video | HowTo100M |

Each reader is a function of the text of a table and of :class:`VideoListOptions`. A table that is not of its layout
raises ``KeyError``, ``TypeError``, ``ValueError`` or ``AttributeError``.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.sources.source import TimedCaption


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """A clip of a list. ``values`` fill the braces of the path; without ``start`` the whole file is meant.

    ``timed`` are captions of times in the file.
    """

    values: Mapping[str, str]
    start: float | None = None
    end: float | None = None
    captions: tuple[str, ...] = ()
    label: str = ""
    timed: tuple[TimedCaption, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VideoListOptions:
    """What a layout is asked for: the part of it, and columns of plain tables.

    ``names`` are the names of a table: of its columns for captions, the label, begin and end.
    """

    split: str = ""
    listed: str | None = None
    captions: tuple[str, ...] = ()
    label: str = ""
    start: str = ""
    end: str = ""
    name: str = ""


Reader = Callable[[str, VideoListOptions], Iterator[VideoRecord]]


def read_table(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """A row for each clip."""
    for line in _lines(text):
        yield VideoRecord(
            values=line,
            start=float(line[wanted.start]) if wanted.start else None,
            end=float(line[wanted.end]) if wanted.end and line[wanted.end] else None,
            captions=tuple(line[name] for name in wanted.captions if line[name]),
            label=line[wanted.label] if wanted.label else "",
        )


def read_msrvtt(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """All captions of each video, in the order of the split's csv, or the videos of a ``split`` of the json.

    The test csv of 1k-A has one sentence for each video, which is then its only caption.
    """
    data = json.loads(text)
    captions: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    videos = {video["video_id"]: video for video in data["videos"]}
    if wanted.listed is None:
        chosen = [(name, "") for name, video in videos.items() if wanted.split in ("", video["split"])]
    else:
        chosen = [(line["video_id"], line.get("sentence", "")) for line in _lines(wanted.listed)]
    for name, sentence in chosen:
        label = str(videos[name].get("category", "")) if name in videos else ""
        texts = [sentence] if sentence else captions.get(name, [])
        yield VideoRecord(values={"video_id": name}, captions=tuple(dict.fromkeys(texts)), label=label)


def read_kinetics(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """The clips are cut already; ``{start}`` and ``{end}`` of their names have six digits."""
    for line in _lines(text):
        if wanted.split not in ("", line.get("split", wanted.split)):
            continue
        times = {"start": f"{int(float(line['time_start'])):06d}", "end": f"{int(float(line['time_end'])):06d}"}
        label = line.get("label", "")
        yield VideoRecord(values={**line, **times, "label": label}, label=label)


def read_hmdb51(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """One class, whose name is the begin of the file's: ``<class>_test_split1.txt``."""
    label = wanted.name.rpartition("/")[2].rpartition("_test_split")[0]
    code = {"train": "1", "test": "2", "": ""}[wanted.split]
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, part = line.rpartition(" ")
        if part == code or (not code and part in ("0", "1", "2")):
            yield VideoRecord(values={"label": label, "name": name.strip()}, label=label.replace("_", " "))


def read_ucf101(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """Paths with the class as their folder."""
    for line in filter(None, map(str.strip, text.splitlines())):
        path = line.split(" ")[0]
        label, slash, _ = path.partition("/")
        if not slash:
            raise ValueError("a path without the folder of its class")
        yield VideoRecord(values={"path": path, "label": label}, label=label)


def read_youcook2(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """Whole videos with the sentences of their segments as timed captions."""
    for name, video in json.loads(text)["database"].items():
        if wanted.split not in ("", video["subset"]):
            continue
        timed = tuple(
            TimedCaption(start=float(one["segment"][0]), end=float(one["segment"][1]), text=one["sentence"])
            for one in video["annotations"]
        )
        recipe = str(video.get("recipe_type", ""))
        values = {"video_id": name, "recipe_type": recipe, "subset": video["subset"]}
        yield VideoRecord(values=values, label=recipe, timed=timed)


def read_howto100m(text: str, wanted: VideoListOptions) -> Iterator[VideoRecord]:
    """Whole videos with their speech as timed captions."""
    for name, video in json.loads(text).items():
        spoken = zip(video["start"], video["end"], video["text"], strict=True)
        timed = tuple(TimedCaption(start=float(start), end=float(end), text=str(words)) for start, end, words in spoken)
        yield VideoRecord(values={"video_id": name}, timed=timed)


LAYOUTS: Mapping[str, Reader] = {
    "table": read_table,
    "msrvtt": read_msrvtt,
    "kinetics": read_kinetics,
    "hmdb51": read_hmdb51,
    "ucf101": read_ucf101,
    "youcook2": read_youcook2,
    "howto100m": read_howto100m,
}
FILES: Mapping[str, str] = {
    "table": "{file_name}",
    "msrvtt": "videos/all/{video_id}.mp4",
    "kinetics": "{label}/{youtube_id}_{start}_{end}.mp4",
    "hmdb51": "{label}/{name}",
    "ucf101": "{path}",
    "youcook2": "raw_videos/{video_id}.mp4",
    "howto100m": "{video_id}.mp4",
}
"""Path of a file in the folder of the data set, for each layout."""


def timed_clips(record: VideoRecord, each: bool, clip_seconds: float) -> Iterator[VideoRecord]:
    """Clips of a whole video with timed captions.

    With ``each`` one clip for each caption, also where its end is not after its begin. Otherwise with ``clip_seconds``
    clips of that length that have a caption, each with the captions that begin in it, in seconds of the clip and cut at
    its end; 0 keeps the video whole. Captions that end before they begin are left out there.
    """
    if each:
        for one in record.timed:
            yield replace(record, start=one["start"], end=one["end"], captions=(one["text"],), timed=())
        return
    timed = sorted(filter(is_timed, record.timed), key=lambda one: one["start"])
    if not clip_seconds:
        yield replace(record, captions=_joined(timed), timed=tuple(timed))
        return
    grouped: dict[int, list[TimedCaption]] = {}
    for one in timed:
        grouped.setdefault(int(one["start"] // clip_seconds), []).append(one)
    for number, texts in grouped.items():
        begin = number * clip_seconds
        inside = tuple(_shifted(one, begin, clip_seconds) for one in texts)
        yield replace(record, start=begin, end=begin + clip_seconds, captions=_joined(inside), timed=inside)


def is_timed(one: TimedCaption) -> bool:
    """Whether a caption begins in the video and ends after that."""
    return 0 <= one["start"] < one["end"] < math.inf


def _shifted(one: TimedCaption, begin: float, seconds: float) -> TimedCaption:
    return TimedCaption(start=one["start"] - begin, end=min(one["end"] - begin, seconds), text=one["text"])


def _joined(timed: list[TimedCaption] | tuple[TimedCaption, ...]) -> tuple[str, ...]:
    text = " ".join(one["text"].strip() for one in timed).strip()
    return (text,) if text else ()


def _lines(text: str) -> list[dict[str, str]]:
    first = text.partition("\n")[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader: Any = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, restval="")
    return [{key: value for key, value in line.items() if isinstance(key, str)} for line in reader]
