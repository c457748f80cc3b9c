"""Long sounds and videos of a folder, cut into clips: a sound, with a frame if wanted, or a video, and a text."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

from pipeline.config import require
from pipeline.errors import SampleError, missing
from pipeline.shards.media import AUDIO, VIDEO
from pipeline.shards.segments import with_segment
from pipeline.shards.storage import Folder, file_stamp
from pipeline.shards.text import decoded
from pipeline.sources.cut_clips import read_clip, read_video
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import Cell, Row, Slice, is_hidden

ENDINGS = tuple(f".{ending}" for ending in (*AUDIO.endings, *VIDEO.endings))

Clip = tuple[str, str | None, float, float]
"""Path of the file, path of its caption file, and begin and end of the clip in seconds."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips of every sound file and video below ``folder``, in the order of their paths.

    The caption of all clips of ``a/street.mp4`` is the text of ``a/street.txt``, or empty without that file. The first
    folder of the path is the column ``label``. A file that cannot be read is one row with a problem.
    """

    kind: ClassVar[str] = "clips"
    summary: ClassVar[str] = "Long sounds and videos, cut into clips: sound, frame and sound, or video, with text."
    has_captions: ClassVar[bool] = True

    folder: str
    """Folder of the files: a path or fsspec URI that every worker can read."""
    clip_seconds: float = 10.0
    """Length of a clip, more than 0, at most 600."""
    hop_seconds: float = 0.0
    """Time from the begin of a clip to that of the next one; 0 = the length of a clip."""
    shortest: float = 1.0
    """Shortest last clip of a file in seconds; a shorter one is left out, unless it is the only one."""
    frames: bool = False
    """Also store the frame at the middle of each clip; only videos are read then."""
    video: bool = False
    """Store the clips as videos; their sound with --video-keep-sound."""
    cuts: bool = False
    """With --video: begin a clip at every change of shot, and cut longer shots to --clip-seconds. All frames of all
    files are decoded to plan."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        require(0 < self.clip_seconds <= 600, "clip_seconds", self.clip_seconds, "more than 0, at most 600")
        hop = self.hop_seconds
        require(hop == 0 or 0.01 <= hop <= 86_400, "hop_seconds", hop, "0, or 0.01 to 86,400 seconds")
        require(0 <= self.shortest <= self.clip_seconds, "shortest", self.shortest, "0 to clip_seconds")
        require(not (self.video and self.frames), "frames", self.frames, "false with --video")
        require(self.video or not self.cuts, "cuts", self.cuts, "false without --video")
        require(not (self.cuts and hop), "hop_seconds", hop, "0 with --cuts")

    @property
    def media(self) -> tuple[str, ...]:
        """Sounds, with ``frames`` images, too; or videos."""
        if self.video:
            return ("video",)
        return ("image", "audio") if self.frames else ("audio",)

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; reads the headers of all files.

        The digest covers names, sizes and times of the files. A slice may end within a file.
        """
        stamps = self._files()
        clips = [clip for path, (_, caption, _) in stamps.items() for clip in self._clips(path, caption)]
        kind = "video" if self.video else self.frames
        yield from record_slices(
            clips,
            rows_per_shard,
            scratch,
            "clips",
            digest=lambda part: json_digest([kind, [(clip, stamps[clip[0]][0], stamps[clip[0]][2]) for clip in part]]),
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`."""
        for path, caption_file, start, end in slice_records(piece):
            yield self._row((path, caption_file, start, end))

    def schema(self) -> Mapping[str, type]:
        """The first folder of the path, and the clip's begin and end in its file."""
        return {"label": str, "start": float, "end": float}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    def _files(self) -> dict[str, tuple[str, str | None, str]]:
        """By path: version stamp, caption file, and the stamp of the caption file."""
        kind = self._place.kind()
        if kind is None:
            raise missing("folder", self.folder)
        require(kind == "directory", "folder", self.folder, "a folder")
        found = self._place.find()
        endings = tuple(f".{ending}" for ending in VIDEO.endings) if self.frames or self.video else ENDINGS
        paths = [path for path in found if path.lower().endswith(endings) and not is_hidden(path)]
        require(bool(paths), "folder", self.folder, "a folder with files of the kinds " + " ".join(endings))
        files = {}
        for path in paths:
            caption = path.rpartition(".")[0] + ".txt"
            known = caption if caption in found else None
            files[path] = (file_stamp(found[path]), known, file_stamp(found.get(caption, {})))
        return files

    def _clips(self, path: str, caption: str | None) -> list[Clip]:
        """The clips of a file; the first one alone where its length is unknown."""
        shots = self._shots(path)
        if shots is None:
            return [(path, caption, 0.0, self.clip_seconds)]
        found: list[Clip] = []
        for begin, end in shots:
            found += [(path, caption, start, stop) for start, stop in self._pieces(begin, end, not found)]
        return found

    def _pieces(self, begin: float, end: float, needed: bool) -> Iterator[tuple[float, float]]:
        """Begin and end of the clips of a shot; at least one where it is ``needed``."""
        hop = self.hop_seconds or self.clip_seconds
        count = math.floor((end - begin - self.shortest) / hop + 1e-9) + 1
        for number in range(max(count, int(needed))):
            start = begin + number * hop
            yield start, min(start + self.clip_seconds, end)

    def _shots(self, path: str) -> list[tuple[float, float]] | None:
        """Begin and end of each shot, or of the whole file; None where it cannot be read: its row will say why."""
        from pipeline.shards.waveforms import read_header

        try:
            with self._place.open(path) as file:
                if self.cuts:
                    from pipeline.shards.video_cut import shot_changes

                    changes, length = shot_changes(file)
                    return list(pairwise([0.0, *changes, length]))
                if self.video:
                    from pipeline.shards.video_frames import read_length

                    seconds = read_length(file)
                else:
                    seconds = read_header(file).seconds
        except (SampleError, OSError):
            return None
        return None if seconds is None else [(0.0, seconds)]

    def _row(self, clip: Clip) -> Row:
        path, caption_file, start, end = clip
        columns: dict[str, Cell] = {"label": path.split("/")[0] if "/" in path else "", "start": start, "end": end}
        url, caption = with_segment(path, start, end), ""
        try:
            caption = self._caption(caption_file) if caption_file else ""
            if self.video:
                parts = read_video(self._place, path, start, end - start)
            else:
                parts = read_clip(self._place, path, start, end - start, self.frames)
            return Row(url=url, caption=caption, parts=parts, columns=columns)
        except SampleError as problem:
            return Row(url=url, caption=caption, columns=columns, problem=problem)

    def _caption(self, path: str) -> str:
        try:
            return decoded(self._place.read_bytes(path)).strip()
        except OSError as error:
            raise SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}") from error
