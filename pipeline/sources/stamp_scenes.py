"""Scenes of Tux Paint stamps: one to five cut-outs on a drawn background, with boxes, masks and a caption of all.

    jobs/refresh_dataset.py stamp-scenes --samples 8000 --truth base --output-folder stamps/train
    jobs/refresh_dataset.py stamp-scenes --split val --samples 500 --output-folder stamps/val

As in the embedded world, sample i is a pure function of seed, split, i and the stamps' files. ``stamp_classes.py``
lists the base and novel classes. Each class's stamps are divided between the splits: no stamp of ``val`` is in an image
of ``train``, so a detector has to generalise to unseen stamps.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import require, to_json
from pipeline.errors import SampleError
from pipeline.shards.objects import FIELD
from pipeline.shards.segmentation import run_lengths
from pipeline.shards.storage import Folder
from pipeline.sources.drawn import world
from pipeline.sources.drawn.draws import Draws
from pipeline.sources.drawn.render import encode, finish, paint_ground
from pipeline.sources.drawn.truth import to_bytes
from pipeline.sources.drawn.words import OPENINGS, article
from pipeline.sources.source import UNCHANGED, Part, Row, Slice
from pipeline.sources.stamp_classes import ALL, CLASSES, NOVEL, PLURALS
from pipeline.sources.stamps import INSTALLED, PACKAGE, is_mirror, read_stamp, stamps_root

VERSION = 1
"""Raise this when the same options give different samples."""

SIZES = (64, 512)
MOST_STAMPS = 5
VAL_SHARE = 0.3

_TRIES = 10
_FEWEST_PIXELS = 12
_LARGEST_STAMP = 512  # pixels; larger stamps are scaled down to this

Mask = NDArray[np.bool_]
Cutout = NDArray[np.float32]
"""[H, W, 4]: RGB premultiplied by alpha, and alpha, all 0 to 255; cropped to the visible part."""


@dataclass(frozen=True, slots=True)
class PlacedStamp:
    """A stamp in a scene; ``whole`` and ``visible`` are bool [size, size], ``left`` and ``top`` are its corner."""

    name: str
    stamp: str
    cutout: Cutout
    left: int
    top: int
    whole: Mask
    visible: Mask


@dataclass(frozen=True, kw_only=True)
class StampScenes:
    """Samples ``first`` to ``first + samples - 1`` of a split, as JPEG."""

    kind: ClassVar[str] = "stamp-scenes"
    summary: ClassVar[str] = "Scenes composed of these stamps, with boxes, masks and captions."
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    has_captions: ClassVar[bool] = True

    folder: str = INSTALLED
    """Folder of the stamps on every worker: the installed or the unpacked Debian package."""
    split: Literal["train", "val"] = "train"
    """Split of each class's stamps to use."""
    samples: int = 8_000
    """Number of samples, at least 1; unlimited."""
    first: int = 0
    """Index of the first sample, 0 or more; raise it to make further samples."""
    size: int = 128
    """Width and height in pixels, 64 to 512."""
    seed: int = 0
    """Random seed, 0 or more; another seed gives other scenes of the same stamps."""
    truth: Literal["all", "base"] = "all"
    """Annotations besides the caption: of all classes, or of the base classes only."""
    most_things: int = MOST_STAMPS
    """Largest number of stamps in an image, 1 to 5; 1 gives images for classification, by the column `label`."""
    only: tuple[str, ...] = ()
    """Classes to use; empty = all."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.first >= 0, "first", self.first, "0 or more")
        require(SIZES[0] <= self.size <= SIZES[1], "size", self.size, f"{SIZES[0]} to {SIZES[1]}")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        require(1 <= self.most_things <= MOST_STAMPS, "most_things", self.most_things, f"1 to {MOST_STAMPS}")
        require(set(self.only) <= set(CLASSES), "only", self.only, "some of " + ", ".join(CLASSES))

    @property
    def classes(self) -> Mapping[str, str]:
        """Class name to base or novel."""
        return {name: "novel" if name in NOVEL else "base" for name in self.only or CLASSES}

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the options and the stamps' content.

        Raises:
            SettingError: the folder has no stamps, or none of a class.
        """
        content = self._content()
        end = self.first + self.samples
        for start in range(self.first, end, rows_per_shard):
            count = min(rows_per_shard, end - start)
            # As for the drawn world, the digest leaves out the range of the request; the folder's path, too.
            one = replace(self, first=start, samples=count, folder="")
            digest = hashlib.sha256(f"stamp scenes {VERSION} {to_json(one)} {content}".encode()).hexdigest()
            yield Slice(count=count, digest=digest, where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a row with an unreadable stamp has a problem."""
        start = int(piece.where["start"])
        album = _Album(self._root)
        for index in range(start, start + piece.count):
            yield self._row(index, album)

    def schema(self) -> Mapping[str, type]:
        """``label`` is the class with the most visible pixels; null where ``truth`` hides it."""
        return {"index": int, "split": str, "label": str, "objects": int}

    @cached_property
    def stamps(self) -> Mapping[str, tuple[str, ...]]:
        """The stamps of the split by class: sorted paths relative to the package's folder.

        Raises:
            SettingError: the folder has no stamps, or none of a class.
        """
        shares = {name: self._share(_stamps_of(CLASSES[name], self._root)) for name in self.classes}
        missing = [name for name, share in shares.items() if not share]
        allowed = f"the folder of the Debian package {PACKAGE}; it has no {', '.join(missing)}"
        require(not missing, "folder", self.folder, allowed)
        return shares

    @cached_property
    def _root(self) -> Path:
        return stamps_root(self.folder)

    def _share(self, paths: list[str]) -> tuple[str, ...]:
        """The split's part of a class's stamps; a single stamp is in both splits."""
        shuffled = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
        held_out = max(1, round(VAL_SHARE * len(paths)))
        if len(paths) > 1:
            shuffled = shuffled[:held_out] if self.split == "val" else shuffled[held_out:]
        return tuple(sorted(shuffled))

    def _content(self) -> str:
        digest = hashlib.sha256()
        for paths in self.stamps.values():
            for path in paths:
                flips = _may_flip(self._root / path)
                digest.update(repr((path, flips, hashlib.sha256((self._root / path).read_bytes()).digest())).encode())
        return digest.hexdigest()

    def _row(self, index: int, album: "_Album") -> Row:
        url = f"stamp-scenes://{self.split}/{self.seed}/{index}"
        columns: dict[str, Any] = {"index": index, "split": self.split, "label": None, "objects": 0}
        try:
            objects = self._place_stamps(self._draws(index, "scene"), album)
        except SampleError as problem:
            return Row(url=url, caption="", columns=columns, problem=problem)
        annotated = [place for place, obj in enumerate(objects) if self.truth == "all" or obj.name not in NOVEL]
        main = max(objects, key=lambda obj: int(obj.visible.sum())).name
        columns["objects"] = len(annotated)
        columns["label"] = main if self.truth == "all" or main not in NOVEL else None
        records = [_object_record(place, objects[place]) for place in annotated]
        record = {"width": self.size, "height": self.size, "objects": records}
        return Row(
            url=url,
            caption=_caption([obj.name for obj in objects], self._draws(index, "words")),
            parts=(Part("image", self._image(objects, self._draws(index, "render"))),),
            columns=columns,
            members={FIELD: to_bytes(record)},
        )

    def _draws(self, index: int, purpose: str) -> Draws:
        return Draws(self.seed, f"stamp-scenes {self.split}", index, purpose)

    def _place_stamps(self, draws: Draws, album: "_Album") -> list[PlacedStamp]:
        """Sample and place the stamps of a scene, back to front: at least one."""
        names = list(self.classes)
        wanted = 1 + draws.integer(self.most_things)
        objects: list[PlacedStamp] = []
        for number in range(wanted + _TRIES):
            if number >= wanted and objects:
                break
            name = draws.pick(names)
            stamp = draws.pick(self.stamps[name])
            longest = self.size * draws.uniform(0.25, 0.8) / (1 + 0.2 * (wanted - 1))
            cutout = _scaled(album.cutout(stamp), longest)
            if draws.chance(0.5) and _may_flip(self._root / stamp):
                cutout = np.ascontiguousarray(cutout[:, ::-1])
            objects = self._placed(objects, name, stamp, cutout, draws)
        if not objects:
            raise SampleError("failed_to_resize", "too_small", f"no stamp is seen at {self.size} pixels")
        return objects

    def _placed(
        self, objects: list[PlacedStamp], name: str, stamp: str, cutout: Cutout, draws: Draws
    ) -> list[PlacedStamp]:
        """The objects with a new one in front; unchanged where it would hide too much of another one."""
        height, width = cutout.shape[:2]
        for _ in range(_TRIES):
            left, top = draws.integer(self.size - width + 1), draws.integer(self.size - height + 1)
            whole = np.zeros((self.size, self.size), bool)
            whole[top : top + height, left : left + width] = cutout[:, :, 3] >= 127.5
            if np.count_nonzero(whole) < _FEWEST_PIXELS:
                return objects
            behind = [replace(obj, visible=obj.visible & ~whole) for obj in objects]
            if all(_hidden(obj) <= world.OCCLUSION_CAP for obj in behind):
                return [*behind, PlacedStamp(name, stamp, cutout, left, top, whole, whole)]
        return objects

    def _image(self, objects: list[PlacedStamp], draws: Draws) -> bytes:
        style = draws.pick(("photo", "flat"))
        image = paint_ground(draws.pick(world.GROUND_NAMES), style, self.size, draws)
        for obj in objects:
            height, width = obj.cutout.shape[:2]
            area = image[obj.top : obj.top + height, obj.left : obj.left + width]
            seen = obj.cutout[:, :, 3:] / np.float32(255)
            area[:] = np.rint(area * (1 - seen) + obj.cutout[:, :, :3]).clip(0, 255).astype(np.uint8)
        return encode(finish(image, style, draws), draws)[0]


class _Album:
    """Cache of decoded stamps: each is decoded once per slice."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, Cutout] = {}

    def cutout(self, path: str) -> Cutout:
        """The visible part of a stamp.

        Raises:
            SampleError: the stamp is unreadable or fully transparent.
        """
        if path not in self._read:
            colour, alpha = read_stamp(self._root, path)
            left, top, width, height = cv2.boundingRect((alpha[:, :, 0] >= 0.5).astype(np.uint8))
            if not width:
                raise SampleError("failed_to_resize", "transparent", f"nothing is seen of {path}")
            whole = np.concatenate([colour * alpha, 255 * alpha], axis=2)[top : top + height, left : left + width]
            self._read[path] = whole if max(width, height) <= _LARGEST_STAMP else _scaled(whole, _LARGEST_STAMP)
        return self._read[path]


def _stamps_of(places: Mapping[str, str], root: Path) -> list[str]:
    """Sorted paths of a class's images, without mirrored copies: scenes flip stamps themselves."""
    found: list[str] = []
    for folder, names in places.items():
        wanted = (
            (root / folder).glob("*.png") if names == ALL else [root / folder / f"{one}.png" for one in names.split()]
        )
        found += [path.relative_to(root).as_posix() for path in wanted if path.is_file() and not is_mirror(path.name)]
    return sorted(found)


def _may_flip(image: Path) -> bool:
    """Whether the stamp may be mirrored: the package marks stamps with text."""
    options = image.with_suffix(".dat")
    return not options.is_file() or "nomirror" not in options.read_text(errors="replace").split()


def _scaled(cutout: Cutout, longest: float) -> Cutout:
    """Scale the longer side to ``longest`` pixels (rounded) and the shorter side in proportion, at least 1."""
    scale = longest / max(cutout.shape[:2])
    height, width = (max(1, round(scale * side)) for side in cutout.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cutout, (width, height), interpolation=way), np.float32)


def _hidden(obj: PlacedStamp) -> float:
    return 1 - float(np.count_nonzero(obj.visible)) / float(np.count_nonzero(obj.whole))


def _object_record(place: int, obj: PlacedStamp) -> dict[str, Any]:
    """An entry of ``objects`` in boxes.json."""
    return {
        "id": place,
        "label": obj.name,
        "stamp": obj.stamp,
        "bbox": list(cv2.boundingRect(obj.visible.astype(np.uint8))),
        "area": int(np.count_nonzero(obj.visible)),
        "iscrowd": 0,
        "occlusion": round(_hidden(obj), 4),
        "segmentation": {"size": list(obj.visible.shape), "counts": run_lengths(obj.visible)},
    }


def _caption(names: list[str], draws: Draws) -> str:
    """ "an image of two apples, a bird and an orange": every class once, in any order."""
    counts = Counter(names)
    parts = [_counted(name, counts[name]) for name in draws.shuffled(sorted(counts))]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"{draws.pick(OPENINGS)} {listed}" if draws.chance(0.6) else listed


def _counted(name: str, count: int) -> str:
    if count == 1:
        return f"{article(name)} {name}"
    return f"{world.NUMBER_WORDS[count]} {PLURALS.get(name) or world.plural(name)}"
