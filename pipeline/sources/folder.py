"""A folder of images with captions: ``cat.jpg`` beside ``cat.txt``, or a csv, tsv or jsonl that names the files."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import fsspec

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.storage import Folder, split_file
from pipeline.sources.source import Row, Slice, is_hidden

logger = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below ``folder``, in the order of their paths.

    The caption of ``a/cat.jpg`` is the text of ``a/cat.txt``, or empty without that file. With ``label_from_folder``
    the first folder of the path becomes the column ``label``, as in torchvision's ImageFolder.
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
            digest = hashlib.sha256(json.dumps(part).encode()).hexdigest()
            scratch.write_atomic(name, json.dumps([file[0] for file in part]).encode())
            yield Slice(count=len(part), digest=digest, where={"list": scratch.join(name)})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that cannot be read is a row with a problem."""
        place, name = split_file(str(piece.where["list"]))
        for path in json.loads(place.read_bytes(name)):
            yield self._row(path)

    def schema(self) -> Mapping[str, type]:
        """``label`` with ``label_from_folder``, otherwise no columns."""
        return {"label": str} if self.label_from_folder else {}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    def _files(self) -> list[tuple[str, str, str]]:
        """Path relative to the folder, version stamp of the image, version stamp of its caption."""
        fs, root = fsspec.core.url_to_fs(self._place.uri)
        require(fs.isdir(root), "folder", self.folder, "an existing folder")
        found = {path[len(root) :].lstrip("/"): info for path, info in fs.find(root, detail=True).items()}
        known = [path for path in found if path.lower().endswith(IMAGES)]
        images = sorted(path for path in known if not is_hidden(path))
        if len(images) < len(known):
            logger.info("%s: %d images in hidden folders are left out", self.folder, len(known) - len(images))
        require(
            bool(images),
            "folder",
            self.folder,
            "a folder with images (" + " ".join(IMAGES) + ")",
        )
        return [(path, file_stamp(found[path]), file_stamp(found.get(self._caption_file(path), {}))) for path in images]

    def _caption_file(self, path: str) -> str:
        return path.rpartition(".")[0] + self.caption_suffix

    def _row(self, path: str) -> Row:
        label = path.split("/")[0] if "/" in path else ""
        columns = {"label": label} if self.label_from_folder else {}
        caption = self._caption(path)
        try:
            return Row(
                url=path,
                caption=caption,
                image=self._place.read_bytes(path),
                columns=columns,
            )
        except OSError as error:
            problem = SampleError("failed_to_download", "unreadable", f"cannot read the file: {error}")
            return Row(url=path, caption=caption, columns=columns, problem=problem)

    def _caption(self, path: str) -> str:
        try:
            return self._place.read_bytes(self._caption_file(path)).decode("utf-8", errors="replace").strip()
        except OSError:
            return ""


def file_stamp(info: Mapping[str, Any]) -> str:
    """Size and modification time or ETag of a file, from fsspec's ``info``."""
    changed = next(
        (info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if name in info),
        "",
    )
    return f"{info.get('size', '')}/{changed}"
