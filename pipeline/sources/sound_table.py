"""Sounds or videos that a table names, in the layouts in which data sets are published.

A table is a csv or tsv in the folder of the files. Columns give the path of the file, its captions, labels, fold, and
the segment of it. Rows of one segment are joined: their captions and labels become lists. See the cards ``esc50``,
``urbansound8k``, ``clotho``, ``audiocaps`` and ``audioset``.
"""

import csv
import io
import logging
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.errors import DataError, SampleError, SettingError
from pipeline.shards.storage import Folder, file_stamp
from pipeline.shards.text import decoded
from pipeline.sources.cut_clips import read_clip
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import Cell, Row, Slice

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SoundTable:
    """One row for each segment in the table, in its order. A file that is missing or broken is a row with a problem."""

    kind: ClassVar[str] = "sound-table"
    summary: ClassVar[str] = "Sounds or videos named by a table: ESC-50, UrbanSound8K, Clotho, AudioCaps, AudioSet."

    folder: str
    """Folder of the data set: a path or fsspec URI that every worker can read."""
    table: str
    """Table in the folder: csv, or tsv by its ending."""
    header: tuple[str, ...] = ()
    """Names of the columns of a table without a line of names; lines that begin with # are then left out."""
    file: str = "{file_name}"
    """Path of a file in the folder; {column} stands for a value of the table."""
    captions: tuple[str, ...] = ()
    """Columns of the captions. The first caption of a segment is its text, all are the list `captions`."""
    label: str = ""
    """Column of the class, or of several separated by commas; stored as `label` (the first) and the list `labels`."""
    label_names: str = ""
    """Table in the folder with the names of the classes: columns `mid` and `display_name`, as AudioSet's."""
    label_caption: str = ""
    """Caption made of the labels in place of {}, such as `the sounds of {}`, for tables without captions."""
    fold: str = ""
    """Column of the number of the fold."""
    folds: tuple[int, ...] = ()
    """Folds to read; empty = all."""
    start: str = ""
    """Column of the begin of the segment in its file, in seconds; empty where the files are cut already."""
    end: str = ""
    """Column of the end of the segment, in seconds."""
    segment_seconds: float = 10.0
    """Length of the segments where only their begin is known."""
    frames: bool = False
    """Also store the frame at the middle of each segment; the files are videos."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        require(bool(self.table), "table", self.table, "a table in the folder")
        require(bool(self._placeholders), "file", self.file, "a path with a column in braces, such as {file_name}")
        require(not self.folds or bool(self.fold), "folds", self.folds, "a column --fold with it")
        require(not self.end or bool(self.start), "end", self.end, "a column --start with it")
        require(0 < self.segment_seconds <= 600, "segment_seconds", self.segment_seconds, "more than 0, at most 600")
        made = self.label_caption
        require(
            not made or (made.count("{}") == 1 and bool(self.label)), "label_caption", made, "one {}, and a --label"
        )
        require(not (made and self.captions), "label_caption", made, "empty with --captions")
        require(not self.label_names or bool(self.label), "label_names", self.label_names, "a column --label with it")

    @property
    def has_captions(self) -> bool:
        """Whether the table has captions, or captions are made of labels."""
        return bool(self.captions or self.label_caption)

    @property
    def media(self) -> tuple[str, ...]:
        """Sounds; with ``frames`` images, too."""
        return ("image", "audio") if self.frames else ("audio",)

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers table, sizes and times of the files.

        Raises:
            SettingError: no table, or one without the named columns or rows.
        """
        records = self._records()
        found = self._place.find()
        absent = sum(record["path"] not in found for record in records)
        require(absent < len(records), "file", self.file, f"files of the table, such as {records[0]['path']}")
        if absent:
            logger.warning("%s: %d of %d files of the table are not there", self.folder, absent, len(records))

        def digest(part: list[dict[str, Any]]) -> str:
            stamps = [file_stamp(found.get(record["path"], {})) for record in part]
            return json_digest([[self.label_caption, self.frames], part, stamps])

        yield from record_slices(records, rows_per_shard, scratch, "sounds", digest)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        for record in slice_records(piece):
            yield self._row(record)

    def schema(self) -> Mapping[str, type]:
        """``label`` and ``labels``, ``captions``, ``fold``, ``start`` and ``end``, where the table has them."""
        found: dict[str, type] = {"label": str, "labels": list} if self.label else {}
        found |= {"captions": list} if self.captions else {}
        found |= {"fold": int} if self.fold else {}
        return found | ({"start": float, "end": float} if self.start else {})

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @property
    def _placeholders(self) -> list[str]:
        try:
            return [name for _, name, _, _ in string.Formatter().parse(self.file) if name]
        except ValueError:
            return []

    def _records(self) -> list[Record]:
        """The segments in the order of their first row."""
        names = self._names() if self.label_names else {}
        joined: dict[tuple[str, float | None], Record] = {}
        for line in self._lines():
            record = self._record(line, names)
            if self.folds and record["fold"] not in self.folds:
                continue
            known = joined.setdefault((record["path"], record["start"]), record)
            if known is not record:
                known["captions"] += [text for text in record["captions"] if text not in known["captions"]]
                known["labels"] += [text for text in record["labels"] if text not in known["labels"]]
        require(bool(joined), "folds" if self.folds else "table", self.folds or self.table, "some rows of the table")
        return list(joined.values())

    def _record(self, line: Mapping[str, str], names: Mapping[str, str]) -> Record:
        labels = line[self.label].split(",") if self.label_names else [line[self.label]] if self.label else []
        start = self._number(line, self.start) if self.start else None
        if self.end:
            end: float | None = self._number(line, self.end)
        else:
            end = None if start is None else start + self.segment_seconds
        return {
            "path": self.file.format_map(line),
            "captions": [line[name] for name in self.captions if line[name]],
            "labels": [names.get(label.strip(), label.strip()) for label in labels],
            "fold": int(self._number(line, self.fold)) if self.fold else None,
            "start": start,
            "end": end,
        }

    def _number(self, line: Mapping[str, str], column: str) -> float:
        try:
            return float(line[column])
        except ValueError as error:
            place = self._place.join(self.table)
            raise DataError(f"{place}: {line[column]!r} in the column {column} is no number") from error

    def _lines(self) -> list[dict[str, str]]:
        wanted = {*self._placeholders, *self.captions, self.label, self.fold, self.start, self.end} - {""}
        lines = self._read(self.table, "table", self.header)
        has = set(lines[0]) if lines else set(self.header)
        lacking = sorted(wanted - has)
        require(
            not lacking, "table", self.table, f"a table with the columns {', '.join(lacking)}; it has {sorted(has)}"
        )
        return lines

    def _names(self) -> dict[str, str]:
        lines = self._read(self.label_names, "label_names", ())
        complete = bool(lines) and {"mid", "display_name"} <= set(lines[0])
        require(complete, "label_names", self.label_names, "a table with the columns mid and display_name")
        return {line["mid"]: line["display_name"] for line in lines}

    def _read(self, name: str, field: str, header: tuple[str, ...]) -> list[dict[str, str]]:
        try:
            text = decoded(self._place.read_bytes(name))
        except FileNotFoundError as error:
            raise SettingError(field, name, f"a table in {self.folder}") from error
        lines = io.StringIO(text.removeprefix("\ufeff"))
        kept = (line for line in lines if not (header and line.startswith("#")))
        delimiter = "\t" if name.lower().endswith(".tsv") else ","
        reader = csv.DictReader(kept, header or None, delimiter=delimiter, skipinitialspace=True, restval="")
        return [{key: value for key, value in line.items() if isinstance(key, str)} for line in reader]

    def _row(self, record: Record) -> Row:
        path, start, end, labels = (record[name] for name in ("path", "start", "end", "labels"))
        caption = next(iter(record["captions"]), "")
        if self.label_caption:
            caption = self.label_caption.format(_listed(labels))
        known: dict[str, Cell] = {**record, "label": next(iter(labels), "")}
        columns = {name: known[name] for name in self.schema()}
        url = path if start is None else f"{path}#t={start:g},{end:g}"
        try:
            if path.startswith("/") or ".." in path.split("/"):
                raise SampleError("failed_to_download", "unreadable", "the path leaves the folder")
            if start is not None and not 0 <= start < end:
                raise SampleError("failed_to_resize", "segment", "the segment ends before it begins")
            parts = read_clip(self._place, path, start, None if start is None else end - start, self.frames)
            return Row(url=url, caption=caption, parts=parts, columns=columns)
        except SampleError as problem:
            return Row(url=url, caption=caption, columns=columns, problem=problem)


def _listed(names: list[str]) -> str:
    """
    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
