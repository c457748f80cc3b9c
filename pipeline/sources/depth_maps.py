"""Images with depth maps as published: pairs of an image and a grey PNG of 16 bits.

    jobs/refresh_dataset.py depth-maps --folder nyu --images test --depths test --image-name 'rgb_{}' \\
        --depth-name 'sync_depth_{}.png' --output-folder data/nyu
    jobs/refresh_dataset.py depth-maps --folder nyu/test --pairs nyudepthv2_test_files_with_gt.txt \\
        --output-folder data/nyu

    nyu     bathroom/rgb_00045.jpg                 bathroom/sync_depth_00045.png           1000 values per metre
    kitti   ..._drive_0002_sync/image_02/....png   ..._sync/proj_depth/groundtruth/...png   256 values per metre

Values become millimetres in ``depth.png`` (``shards/depth_values.py``); 0 is a pixel without a measurement, and so are
distances beyond 65.535 m, such as KITTI's farthest. The column ``scene`` is the class of the scene by the folder of the
image, without the number of a recording: ``kitchen_0028b`` is ``kitchen``.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from pipeline.config import require
from pipeline.errors import DataError, SampleError, missing
from pipeline.shards.depth_values import DEPTH_FIELD, PER_METRE, depth_size, depth_values, encode_depth
from pipeline.shards.media import IMAGE
from pipeline.shards.pixels import read_header
from pipeline.shards.storage import Folder, file_stamp
from pipeline.sources.record_slices import json_digest, record_slices, slice_records
from pipeline.sources.source import UNCHANGED, Part, Row, Slice, is_hidden

ENDINGS = tuple(f".{ending}" for ending in IMAGE.endings)
RECORDING = re.compile(r"_\d+[a-z]?$")


@dataclass(frozen=True, kw_only=True)
class DepthMaps:
    """The pairs of the list ``pairs``, in its order; without a list all pairs of the folder, sorted by path."""

    kind: ClassVar[str] = "depth-maps"
    summary: ClassVar[str] = "Pairs of an image and a PNG of 16 bits with the distance of each pixel: NYUv2, KITTI."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = False

    folder: str
    """Folder of the dataset: a path or fsspec URI that every worker can read."""
    pairs: str = ""
    """File in the folder with the paths of an image and its depth map in each line, relative to `images` and `depths`;
    further words are ignored. Empty = pairs by name."""
    images: str = ""
    """Subfolder of the images."""
    depths: str = ""
    """Subfolder of the depth maps, which have the relative folders of their images; the same folder is allowed."""
    image_name: str = "{}"
    """Name of an image without its ending; {} stands for what it shares with its depth map, such as rgb_{}."""
    depth_name: str = "{}.png"
    """Name of a depth map, such as sync_depth_{}.png."""
    values_per_metre: float = float(PER_METRE)
    """Values of a depth map per metre: 1000 where they are millimetres (NYUv2), 256 in KITTI, 5000 in TUM."""

    def __post_init__(self) -> None:
        for name in ("image_name", "depth_name"):
            value = getattr(self, name)
            require(value.count("{}") == 1 and "/" not in value, name, value, "a file name with one {}")
        require(self.depth_name.endswith(".png"), "depth_name", self.depth_name, "a name that ends in .png")
        require(0.1 <= self.values_per_metre <= 1e6, "values_per_metre", self.values_per_metre, "0.1 to 1,000,000")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers names, sizes and times of the files, and the
        unit.

        Raises:
            SettingError: no such folder or list, or no pair.
        """
        yield from record_slices(
            self._files(),
            rows_per_shard,
            scratch,
            "depth-maps",
            digest=lambda part: json_digest([self.values_per_metre, part]),
            stored=lambda file: file[:2],
        )

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a file that is missing or cannot be used is a problem."""
        for image, depth in slice_records(piece):
            yield self._row(image, depth)

    def schema(self) -> Mapping[str, type]:
        """``scene``: class of the scene; ``depth_digest`` shows a refresh which depth maps changed."""
        return {"scene": str, "depth_digest": str}

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.folder)

    def _files(self) -> list[tuple[str, str, str, str]]:
        """Paths of image and depth map in the folder, and the version stamps of both."""
        require(bool(self.folder), "folder", self.folder, "the folder of the dataset")
        if self._place.kind() != "directory":
            raise missing("folder", self.folder)
        found = {path: file_stamp(facts) for path, facts in self._place.find().items()}
        pairs = self._listed() if self.pairs else self._paired(found)
        some = any(image in found and depth in found for image, depth in pairs)
        allowed = f"pairs of files in {self.folder}"
        require(some, "pairs" if self.pairs else "depths", self.pairs or self.depths, allowed)
        return [(image, depth, found.get(image, ""), found.get(depth, "")) for image, depth in pairs]

    def _paired(self, found: Mapping[str, str]) -> list[tuple[str, str]]:
        """Images by their name, each with the path that its depth map has."""
        start, end = (re.escape(part) for part in self.image_name.split("{}"))
        name = re.compile(f"{start}(.+){end}")
        before, after = self.depth_name.split("{}")
        root = self.images.strip("/") + "/" if self.images else ""
        pairs = []
        for path in sorted(path for path in found if path.startswith(root) and not is_hidden(path)):
            stem, ending = posixpath.splitext(path.removeprefix(root))
            matched = name.fullmatch(posixpath.basename(stem))
            if matched and ending.lower() in ENDINGS:
                depth = before + matched[1] + after
                where = _joined(self.depths, posixpath.join(posixpath.dirname(stem), depth))
                pairs += [(path, where)] if where != path else []
        return [pair for pair in pairs if pair[0] not in {depth for _, depth in pairs}]

    def _listed(self) -> list[tuple[str, str]]:
        """The pairs of the list."""
        try:
            text = self._place.read_text(self.pairs)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise missing("pairs", self._place.join(self.pairs)) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self._place.join(self.pairs)} is no text ({error})") from error
        lines = [line.split() for line in text.splitlines() if line.strip()]
        bad = next((line for line in lines if len(line) < 2 or any(".." in word.split("/") for word in line[:2])), None)
        require(bad is None, "pairs", self.pairs, f"a file with two relative paths in each line, not {bad}")
        require(bool(lines), "pairs", self.pairs, "a file that is not empty")
        return [(_joined(self.images, image), _joined(self.depths, depth)) for image, depth, *_ in lines]

    def _row(self, image: str, depth: str) -> Row:
        columns = {"scene": scene_of(image), "depth_digest": ""}
        try:
            content, values = self._read(image, "unreadable"), self._read(depth, "no_depth")
            check_same_size(content, values, depth)
            metres = self._depth(values, depth)
        except SampleError as problem:
            return Row(url=image, columns=columns, problem=problem)
        columns["depth_digest"] = hashlib.sha256(metres).hexdigest()[:16]
        return Row(url=image, parts=(Part("image", content),), members={DEPTH_FIELD: metres}, columns=columns)

    def _read(self, path: str, reason: str) -> bytes:
        try:
            return self._place.read_bytes(path)
        except FileNotFoundError as error:
            raise SampleError("failed_to_download", reason, f"there is no file {path}") from error
        except OSError as error:
            raise SampleError("failed_to_download", "unreadable", f"cannot read {path}: {error}") from error

    def _depth(self, content: bytes, path: str) -> bytes:
        """A depth map as ``depth.png``: the file itself where it has millimetres; otherwise distances beyond 65.535 m
        are missing."""
        try:
            values = depth_values(content)
            if self.values_per_metre == PER_METRE:
                return content
            return encode_depth(values.astype(np.float64) / self.values_per_metre, unit_known=True)
        except DataError as error:
            raise SampleError("failed_to_resize", "bad_depth", f"{path}: {error}") from error


def check_same_size(image: bytes, depth: bytes, path: str) -> None:
    """Refuse a depth map of another size than its image by the headers, before it is decoded.

    The sides may be exchanged, since the image may be displayed turned. Files without a readable header pass: whatever
    decodes them gives the reason.

    Raises:
        SampleError: ``stale_annotation``.
    """
    try:
        header, (height, width) = read_header(image), depth_size(depth)
    except (SampleError, DataError):
        return
    if sorted((header.width, header.height)) != sorted((width, height)):
        sizes = f"{width} x {height} pixels, the image has {header.width} x {header.height}"
        raise SampleError("failed_to_resize", "stale_annotation", f"{path} has {sizes}")


def scene_of(image: str) -> str:
    """The class of a scene by the folder of its image; empty for an image without a folder."""
    return RECORDING.sub("", posixpath.basename(posixpath.dirname(image)))


def _joined(folder: str, path: str) -> str:
    return posixpath.join(folder.strip("/"), path.lstrip("/"))
