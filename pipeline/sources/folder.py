"""A folder of images, sounds, videos or point clouds with captions: ``cat.jpg``, ``cat.flac`` and ``cat.txt`` are one
row."""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pipeline.config import require
from pipeline.errors import SampleError, missing
from pipeline.shards.media import IMAGE, MEDIA, POINTS, check_media, medium_of
from pipeline.shards.storage import Folder, file_stamp
from pipeline.shards.text import decoded
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import Part, Row, Slice, is_hidden

logger = logging.getLogger(__name__)

OTHERS_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one row: relative paths and version stamps by medium, path and stamp of the caption file."""

    paths: Mapping[str, str]
    stamps: Mapping[str, str]
    caption: str | None
    caption_stamp: str


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below ``folder``, in the order of their paths; files of other kinds are counted and logged.

    With several ``media`` a row has the files of one name without ending: ``dog.jpg`` and ``dog.flac``. A name without
    a file of one medium has only the other parts.

    The caption of ``a/cat.jpg`` is the text of ``a/cat.txt``, or empty without that file; upper and lower case of the
    ending are the same. With ``label_from_folder`` the first folder of the path becomes the column ``label``, as in
    torchvision's ImageFolder.
    """

    kind: ClassVar[str] = "folder"
    summary: ClassVar[str] = "A folder of images, sounds, videos or point clouds, with captions."
    has_captions: ClassVar[bool] = True

    folder: str
    """Folder of the files: a path or fsspec URI that every worker can read."""
    caption_suffix: str = ".txt"
    """Extension of the caption files; replaces the extension of the image, sound or video."""
    media: tuple[str, ...] = ("image",)
    """Media of the files to read: one or more of image, audio, video and points (.ply, .off, .npy)."""
    label_from_folder: bool = True
    """Store the first folder of an image's path in the column `label`."""
    within: str = ""
    """Read only the files below a folder of this name, such as train in ModelNet40's airplane/train; empty = all."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        check_media(self.media)
        dotted = self.caption_suffix.startswith(".") and medium_of(self.caption_suffix.lower()[1:]) is None
        require(
            dotted,
            "caption_suffix",
            self.caption_suffix,
            "an ending like .txt that is of no image, sound or video",
        )

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files."""
        yield from record_slices(
            self._files(),
            rows_per_shard,
            scratch,
            "files",
            digest=lambda part: json_digest([self._identity(row) for row in part]),
            stored=lambda row: [row.paths, row.caption],
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that cannot be read is a row with a problem."""
        for paths, caption in slice_records(piece):
            yield self._row(paths, caption)

    def schema(self) -> Mapping[str, type]:
        """``label`` with ``label_from_folder``, otherwise no columns."""
        return {"label": str} if self.label_from_folder else {}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    @property
    def _noun(self) -> str:
        return "images" if self.media == (IMAGE.name,) else "files"

    @property
    def _endings(self) -> tuple[str, ...]:
        media = [MEDIA[medium] for medium in self.media]
        return tuple(f".{ending}" for medium in media for ending in (*medium.endings, *medium.other_files))

    def _is_within(self, path: str) -> bool:
        return not self.within or self.within in path.split("/")[:-1]

    def _identity(self, row: "_Files") -> list[object]:
        """What the digest of a slice covers of a row."""
        if self.media == (IMAGE.name,):
            return [row.paths[IMAGE.name], row.stamps[IMAGE.name], row.caption_stamp]
        return [row.paths, row.stamps, row.caption_stamp]

    def _files(self) -> list["_Files"]:
        kind = self._place.kind()
        if kind is None:
            raise missing("folder", self.folder)
        require(kind == "directory", "folder", self.folder, "a folder")
        found = self._place.find()
        known = [path for path in found if path.lower().endswith(self._endings) and self._is_within(path)]
        images = [path for path in known if not is_hidden(path)]
        if len(images) < len(known):
            hidden = len(known) - len(images)
            logger.info("%s: %d %s in hidden folders are left out", self.folder, hidden, self._noun)
        require(
            bool(images),
            "folder",
            self.folder,
            f"a folder with {self._noun} (" + " ".join(self._endings) + ")",
        )
        captions = self._captions(found)
        self._report(images, found, captions)
        return [self._described(paths, found, captions) for paths in self._grouped(images)]

    def _grouped(self, files: Sequence[str]) -> list[dict[str, str]]:
        """The files of each row, by medium; of a single medium each file is a row."""
        if len(self.media) == 1:
            return [{self.media[0]: path} for path in files]
        by_name: dict[str, dict[str, list[str]]] = {}
        for path in files:
            by_name.setdefault(_stem(path), {}).setdefault(self._medium(path), []).append(path)
        return [
            {medium: paths[number] for medium, paths in of_name.items() if number < len(paths)}
            for of_name in by_name.values()
            for number in range(max(map(len, of_name.values())))
        ]

    def _medium(self, path: str) -> str:
        def fits(medium: str) -> bool:
            endings = (*MEDIA[medium].endings, *MEDIA[medium].other_files)
            return path.lower().endswith(tuple(f".{ending}" for ending in endings))

        return next(medium for medium in self.media if fits(medium))

    def _described(
        self, paths: Mapping[str, str], found: Mapping[str, Mapping[str, Any]], captions: Mapping[str, str]
    ) -> "_Files":
        ordered = {medium: paths[medium] for medium in self.media if medium in paths}
        caption = captions.get(_stem(next(iter(ordered.values()))))
        stamps = {medium: file_stamp(found[path]) for medium, path in ordered.items()}
        return _Files(ordered, stamps, caption, file_stamp(found.get(caption or "", {})))

    def _captions(self, found: Iterable[str]) -> dict[str, str]:
        """The caption file by path without ending; the one in the case of ``caption_suffix`` if there are two."""
        suffix = self.caption_suffix
        files = [path for path in found if path.lower().endswith(suffix.lower())]
        return {path[: -len(suffix)]: path for path in sorted(files, key=lambda path: path.endswith(suffix))}

    def _report(self, images: list[str], found: Iterable[str], captions: Mapping[str, str]) -> None:
        """Log once what is left out, and that there are no captions."""
        stems = {_stem(path) for path in images}
        used = {*images, *(captions[stem] for stem in stems & captions.keys())}
        unused = (path for path in found if path not in used and not is_hidden(path))
        others = Counter(posixpath.splitext(path)[1].lower() or "no ending" for path in unused)
        if others:
            most = ", ".join(f"{count} {ending}" for ending, count in others.most_common(OTHERS_NAMED))
            logger.warning("%d files are left out, as no %s of a known kind (%s)", others.total(), self._noun, most)
        if stems & captions.keys():
            return
        beside = Counter(path[len(_stem(path)) :] for path in found if _stem(path) in stems)
        endings = [ending for ending, _ in beside.most_common() if ending.lower() not in self._endings]
        could = f": --caption-suffix could be {' or '.join(endings[:OTHERS_NAMED])}" if endings else ""
        logger.warning("none of %d %s has a caption file (%s)%s", len(images), self._noun, self.caption_suffix, could)

    def _row(self, paths: Mapping[str, str], caption_file: str | None) -> Row:
        path = next(iter(paths.values()))
        label = path.split("/")[0] if "/" in path else ""
        columns = {"label": label} if self.label_from_folder else {}
        caption = ""
        try:
            caption = decoded(self._place.read_bytes(caption_file)).strip() if caption_file else ""
            parts = tuple(Part(medium, self._place.read_bytes(one), url=one) for medium, one in paths.items())
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
            return Row(url=path, caption=caption, columns=columns, problem=problem)
        return Row(url=path, caption=caption, parts=parts, columns=columns)


def _stem(path: str) -> str:
    """The path without its ending; ``.points.npy`` is one.

    >>> _stem("a/cat.v2.jpg"), _stem("a/cat.points.npy")
    ('a/cat.v2', 'a/cat')
    """
    last = POINTS.endings[0]
    return path[: -len(last) - 1] if path.lower().endswith(f".{last}") else path.rpartition(".")[0]
