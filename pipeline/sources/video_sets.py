"""Videos of published data sets, named by their own lists; see :mod:`~pipeline.sources.video_layouts` and the cards.

The files lie in a folder, as their owners distribute them or as a download of one's own has stored them.
"""

import logging
import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from pipeline.config import require
from pipeline.errors import SampleError, SettingError
from pipeline.shards.media import VIDEO
from pipeline.shards.segments import with_segment
from pipeline.shards.storage import Folder, file_stamp
from pipeline.shards.text import decoded
from pipeline.sources.cut_clips import read_video
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import Cell, Row, Slice, TimedCaption
from pipeline.sources.video_layouts import FILES, LAYOUTS, VideoListOptions, VideoRecord, is_timed, timed_clips

logger = logging.getLogger(__name__)

Layout = Literal["table", "msrvtt", "kinetics", "hmdb51", "ucf101", "youcook2", "howto100m"]
TIMED = ("youcook2", "howto100m")
_ENDINGS = tuple(f".{ending}" for ending in VIDEO.endings)
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class VideoSets:
    """One row for each clip of the list, in its order. A file that is missing or broken is a row with a problem."""

    kind: ClassVar[str] = "video-sets"
    summary: ClassVar[str] = (
        "Videos named by a list: MSR-VTT, Kinetics, HMDB-51, UCF-101, YouCook2, HowTo100M, a table."
    )
    media: ClassVar[tuple[str, ...]] = ("video",)

    folder: str
    """Folder of the data set: a path or fsspec URI that every worker can read."""
    table: str
    """List in the folder: a file in the format of the layout; for hmdb51 a folder of them."""
    layout: Layout = "table"
    """Format of the list."""
    file: str = ""
    """Path of a file in the folder, with values of the list in braces; empty = the layout's own, such as
    videos/all/{video_id}.mp4, or {file_name} of a table. Without that file, other endings of videos are tried."""
    split: str = ""
    """Part of the list: train, val(idate), test, training or validation, as the list calls it; empty = all. hmdb51:
    train or test."""
    split_list: str = ""
    """msrvtt: table in the folder with the videos of the split, in the column video_id."""
    split_number: int = 1
    """hmdb51: number of the split, 1 to 3."""
    captions: tuple[str, ...] = ()
    """table: columns of the captions. The first caption of a clip is its text, all are the list `captions`."""
    label: str = ""
    """table: column of the class."""
    start: str = ""
    """table: column of the begin of the clip in its file, in seconds; empty where the files are cut already."""
    end: str = ""
    """table: column of the end of the clip, in seconds."""
    label_caption: str = ""
    """Caption made of the class in place of {}, such as `a video of {}`, for lists without captions."""
    each: bool = True
    """youcook2, howto100m: one clip for each timed caption; otherwise clips with several, in `timed_captions`."""
    clip_seconds: float = 30.0
    """Length of the clips without --each; 0 = whole files, of which the codec stores a segment."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        require(bool(self.table), "table", self.table, "a file or folder in the folder")
        require(self.layout in LAYOUTS, "layout", self.layout, ", ".join(LAYOUTS))
        plain = self.layout == "table"
        for name in ("captions", "label", "start", "end"):
            value = getattr(self, name)
            require(plain or not value, name, value, "empty for other layouts than table")
        require(not self.file or bool(self._placeholders), "file", self.file, "a path with a value in braces")
        require(not self.end or bool(self.start), "end", self.end, "a column --start with it")
        require(not self.split_list or self.layout == "msrvtt", "split_list", self.split_list, "empty but for msrvtt")
        parts = self.layout != "hmdb51" or self.split in ("", "train", "test")
        require(parts, "split", self.split, "train, test or empty for hmdb51")
        require(not (plain and self.split), "split", self.split, "empty for a table")
        require(1 <= self.split_number <= 3, "split_number", self.split_number, "1 to 3")
        made = self.label_caption
        require(not made or made.count("{}") == 1, "label_caption", made, "a text with one {}")
        require(0 <= self.clip_seconds <= 600, "clip_seconds", self.clip_seconds, "0 to 600 seconds")

    @property
    def has_captions(self) -> bool:
        """Whether the list has captions, or they are made of classes."""
        return bool(self.label_caption or self.captions or self.layout in ("msrvtt", *TIMED))

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the list, sizes and times of the files.

        Raises:
            SettingError: no list, or one of another layout, or none of its files is there.
        """
        found = self._place.find()
        known = {path.rpartition(".")[0]: path for path in found if path.lower().endswith(_ENDINGS)}
        records = [self._plain(record, found, known) for record in self._records()]
        require(bool(records), "split", self.split, "a part of the list with videos")
        absent = sum(record["path"] not in found for record in records)
        require(absent < len(records), "file", self.file, f"files of the list, such as {records[0]['path']}")
        if absent:
            logger.warning("%s: the files of %d of %d clips are not there", self.folder, absent, len(records))

        def digest(part: list[dict[str, Any]]) -> str:
            stamps = [file_stamp(found.get(record["path"], {})) for record in part]
            return json_digest([self.label_caption, part, stamps])

        yield from record_slices(records, rows_per_shard, scratch, "videos", digest)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        for record in slice_records(piece):
            yield self._row(record)

    def schema(self) -> Mapping[str, type]:
        """``video_name``, and what the list has of ``label``, ``captions``, ``timed_captions``, ``start``, ``end``."""
        found: dict[str, type] = {"video_name": str}
        if self.label or self.layout not in ("table", "howto100m"):
            found["label"] = str
        if self.captions or self.layout == "msrvtt":
            found["captions"] = list
        if self.layout in TIMED and not self.each:
            found["timed_captions"] = TimedCaption
        if self.start or self.layout in TIMED:
            found |= {"start": float, "end": float}
        return found

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @property
    def _file(self) -> str:
        return self.file or FILES[self.layout]

    @property
    def _placeholders(self) -> tuple[str, ...]:
        try:
            return tuple(name for _, name, _, _ in string.Formatter().parse(self.file) if name)
        except ValueError:
            return ()

    def _records(self) -> Iterator[VideoRecord]:
        listed = self._text("split_list", self.split_list) if self.split_list else None
        wanted = VideoListOptions(
            split=self.split,
            listed=listed,
            captions=self.captions,
            label=self.label,
            start=self.start,
            end=self.end,
        )
        wrong = 0
        for name in self._lists():
            read = LAYOUTS[self.layout](self._text("table", name), VideoListOptions(**{**vars(wanted), "name": name}))
            try:
                for record in read:
                    wrong += sum(not is_timed(one) for one in record.timed)
                    yield from timed_clips(record, self.each, self.clip_seconds) if self.layout in TIMED else [record]
            except _MALFORMED as error:
                problem = f"{name} has another layout ({type(error).__name__}: {error})"
                raise SettingError("layout", self.layout, ", ".join(LAYOUTS), problem) from error
        if wrong:
            logger.warning("%s: %d timed captions do not end after they begin", self.folder, wrong)

    def _lists(self) -> list[str]:
        if self.layout != "hmdb51":
            return [self.table]
        ending = f"_test_split{self.split_number}.txt"
        folder = self._place.folder(self.table)
        names = [f"{self.table.rstrip('/')}/{name}" for name in folder.names(ending)]
        require(bool(names), "table", self.table, f"a folder with files that end in {ending}")
        return names

    def _text(self, field: str, name: str) -> str:
        try:
            return decoded(self._place.read_bytes(name)).removeprefix("\ufeff")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise SettingError(field, name, f"a file in {self.folder}") from error

    def _plain(self, record: VideoRecord, found: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
        """The record as JSON, with the path of its file."""
        try:
            path = self._file.format_map(record.values)
        except (KeyError, IndexError, ValueError) as error:
            raise SettingError("file", self._file, "values of the list: " + ", ".join(record.values)) from error
        if path not in found:
            path = known.get(path.rpartition(".")[0]) or known.get(path) or path
        return {**asdict(record), "path": path, "values": None}

    def _row(self, record: dict[str, Any]) -> Row:
        path, start, end = record["path"], record["start"], record["end"]
        caption = next(iter(record["captions"]), "")
        if self.label_caption:
            caption = self.label_caption.format(record["label"])
        cells: dict[str, Cell] = {**record, "timed_captions": record["timed"]}
        cells["video_name"] = path.rpartition("/")[2].rpartition(".")[0]
        columns = {name: cells[name] for name in self.schema()}
        url = path if start is None else with_segment(path, start, end)
        try:
            if path.startswith("/") or ".." in path.split("/"):
                raise SampleError("failed_to_download", "unreadable", "the path leaves the folder")
            if start is not None and not (0 <= start < (math.inf if end is None else end) and math.isfinite(start)):
                raise SampleError("failed_to_resize", "segment", "the segment ends before it begins")
            seconds = None if start is None or end is None else end - start
            parts = read_video(self._place, path, start, seconds)
            return Row(url=url, caption=caption, parts=parts, columns=columns)
        except SampleError as problem:
            return Row(url=url, caption=caption, columns=columns, problem=problem)
