"""A folder of images with captions: ``cat.jpg`` beside ``cat.txt``, or a csv, tsv or jsonl that names the files."""

import hashlib
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from pipeline.config import require
from pipeline.errors import SampleError, missing
from pipeline.shards.media import IMAGE
from pipeline.shards.storage import Folder, file_stamp, split_file
from pipeline.shards.text import decoded
from pipeline.sources.source import Part, Row, Slice, is_hidden

logger = logging.getLogger(__name__)

IMAGES = tuple(f".{ending}" for ending in IMAGE.endings)
OTHERS_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below ``folder``, in the order of their paths; files of other kinds are counted and logged.

    The caption of ``a/cat.jpg`` is the text of ``a/cat.txt``, or empty without that file; upper and lower case of the
    ending are the same. With ``label_from_folder`` the first folder of the path becomes the column ``label``, as in
    torchvision's ImageFolder.
    """

    kind: ClassVar[str] = "folder"
    summary: ClassVar[str] = "A folder of images with captions."
    has_captions: ClassVar[bool] = True

    folder: str
    """Folder of the images: a path or fsspec URI that every worker can read."""
    caption_suffix: str = ".txt"
    """Extension of the caption files; replaces the image's extension."""
    label_from_folder: bool = True
    """Store the first folder of an image's path in the column `label`."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder", self.folder, "a folder or an fsspec URI")
        dotted = self.caption_suffix.startswith(".") and self.caption_suffix.lower() not in IMAGES
        require(
            dotted,
            "caption_suffix",
            self.caption_suffix,
            "an ending like .txt that is no image's",
        )

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files."""
        files = self._files()
        for start in range(0, len(files), rows_per_shard):
            part = files[start : start + rows_per_shard]
            name = f"files-{start:09d}.json"
            digest = hashlib.sha256(json.dumps([file[:3] for file in part]).encode()).hexdigest()
            scratch.write_atomic(name, json.dumps([[path, caption] for path, _, _, caption in part]).encode())
            yield Slice(count=len(part), digest=digest, where={"list": scratch.join(name)})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that cannot be read is a row with a problem."""
        place, name = split_file(str(piece.where["list"]))
        for path, caption in json.loads(place.read_bytes(name)):
            yield self._row(path, caption)

    def schema(self) -> Mapping[str, type]:
        """``label`` with ``label_from_folder``, otherwise no columns."""
        return {"label": str} if self.label_from_folder else {}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    def _files(self) -> list[tuple[str, str, str, str | None]]:
        """Relative path of the image, version stamps of the image and of its caption, path of the caption."""
        kind = self._place.kind()
        if kind is None:
            raise missing("folder", self.folder)
        require(kind == "directory", "folder", self.folder, "a folder")
        found = self._place.find()
        known = [path for path in found if path.lower().endswith(IMAGES)]
        images = [path for path in known if not is_hidden(path)]
        if len(images) < len(known):
            logger.info("%s: %d images in hidden folders are left out", self.folder, len(known) - len(images))
        require(
            bool(images),
            "folder",
            self.folder,
            "a folder with images (" + " ".join(IMAGES) + ")",
        )
        captions = self._captions(found)
        self._report(images, found, captions)
        files = []
        for path in images:
            caption = captions.get(path.rpartition(".")[0])
            files.append((path, file_stamp(found[path]), file_stamp(found.get(caption or "", {})), caption))
        return files

    def _captions(self, found: Iterable[str]) -> dict[str, str]:
        """The caption file by path without ending; the one in the case of ``caption_suffix`` if there are two."""
        suffix = self.caption_suffix
        files = [path for path in found if path.lower().endswith(suffix.lower())]
        return {path[: -len(suffix)]: path for path in sorted(files, key=lambda path: path.endswith(suffix))}

    def _report(self, images: list[str], found: Iterable[str], captions: Mapping[str, str]) -> None:
        """Log once what is left out, and that there are no captions."""
        stems = {path.rpartition(".")[0] for path in images}
        used = {*images, *(captions[stem] for stem in stems & captions.keys())}
        unused = (path for path in found if path not in used and not is_hidden(path))
        others = Counter(posixpath.splitext(path)[1].lower() or "no ending" for path in unused)
        if others:
            most = ", ".join(f"{count} {ending}" for ending, count in others.most_common(OTHERS_NAMED))
            logger.warning("%d files are left out, as no images of a known kind (%s)", others.total(), most)
        if stems & captions.keys():
            return
        beside = Counter(path[len(path.rpartition(".")[0]) :] for path in found if path.rpartition(".")[0] in stems)
        endings = [ending for ending, _ in beside.most_common() if ending.lower() not in IMAGES]
        could = f": --caption-suffix could be {' or '.join(endings[:OTHERS_NAMED])}" if endings else ""
        logger.warning("none of %d images has a caption file (%s)%s", len(images), self.caption_suffix, could)

    def _row(self, path: str, caption_file: str | None) -> Row:
        label = path.split("/")[0] if "/" in path else ""
        columns = {"label": label} if self.label_from_folder else {}
        caption = ""
        try:
            caption = decoded(self._place.read_bytes(caption_file)).strip() if caption_file else ""
            image = self._place.read_bytes(path)
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
            return Row(url=path, caption=caption, columns=columns, problem=problem)
        return Row(url=path, caption=caption, parts=(Part("image", image),), columns=columns)
