"""Scenes of Tux Paint stamps: one to five cut-outs on a drawn ground, with boxes, masks and a caption that names all.

    jobs/refresh_dataset.py stamp-scenes --samples 8000 --truth base --output-folder stamps/train
    jobs/refresh_dataset.py stamp-scenes --split val --samples 500 --output-folder stamps/val

Made as the embedded world is made: sample i is a pure function of seed, split, i and the stamps' files. The classes
and which of them are novel are in ``stamp_classes.py``. The stamps of a class are shared out: those of ``val`` are in
no image of ``train``, so a detector finds classes there, not images that it has seen.
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
from pipeline.sources.source import UNCHANGED, Row, Slice
from pipeline.sources.stamp_classes import ALL, CLASSES, NOVEL, PLURALS
from pipeline.sources.stamps import INSTALLED, PACKAGE, is_mirror, read_stamp, stamps_root

VERSION = 1
"""Raised whenever the same options give other samples."""

SIZES = (64, 512)
MOST_THINGS = 5
VAL_SHARE = 0.3

_TRIES = 10
_FEWEST_PIXELS = 12
_LARGEST_STAMP = 512  # pixels; larger ones are kept at this

Mask = NDArray[np.bool_]
Cutout = NDArray[np.float32]
"""[H, W, 4]: red, green and blue already weighted by alpha, and alpha, all 0 to 255; nothing but the seen part."""


@dataclass(frozen=True, slots=True)
class PlacedStamp:
    """A stamp in a scene; ``whole`` and ``visible`` are bool [size, size], ``left`` and ``top`` where it begins."""

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
    """The stamps, at a path that every worker has: installed, or where the Debian package was unpacked."""
    split: Literal["train", "val"] = "train"
    """Which share of each class's stamps is shown."""
    samples: int = 8_000
    """How many samples; there is no end to them."""
    first: int = 0
    """Number of the first sample: make more of the same later."""
    size: int = 128
    """Width and height in pixels, 64 to 512."""
    seed: int = 0
    """Another seed gives other scenes of the same stamps."""
    truth: Literal["all", "base"] = "all"
    """What is told besides the caption: all, or nothing of the novel classes."""
    most_things: int = MOST_THINGS
    """Things in an image, 1 to 5 at most; 1 gives images to classify, with the column `label`."""
    only: tuple[str, ...] = ()
    """Classes to show; none named is all."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.first >= 0, "first", self.first, "0 or more")
        require(SIZES[0] <= self.size <= SIZES[1], "size", self.size, f"{SIZES[0]} to {SIZES[1]}")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        require(1 <= self.most_things <= MOST_THINGS, "most_things", self.most_things, f"1 to {MOST_THINGS}")
        require(set(self.only) <= set(CLASSES), "only", self.only, "some of " + ", ".join(CLASSES))

    @property
    def classes(self) -> Mapping[str, str]:
        """The classes by name, each base or novel."""
        return {name: "novel" if name in NOVEL else "base" for name in self.only or CLASSES}

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers the options and the stamps' content.

        Raises:
            SettingError: no stamps there, or none of some class.
        """
        content = self._content()
        end = self.first + self.samples
        for start in range(self.first, end, rows_per_shard):
            count = min(rows_per_shard, end - start)
            # As for the drawn world: where the range began is no part of a slice, nor is the folder's place.
            one = replace(self, first=start, samples=count, folder="")
            digest = hashlib.sha256(f"stamp scenes {VERSION} {to_json(one)} {content}".encode()).hexdigest()
            yield Slice(count=count, digest=digest, where={"start": start})

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; a row of which a stamp cannot be read has a problem."""
        start = int(piece.where["start"])
        album = _Album(self._root)
        for index in range(start, start + piece.count):
            yield self._row(index, album)

    def schema(self) -> Mapping[str, type]:
        """``label`` is the class that most is seen of, null where the truth must not be told."""
        return {"index": int, "split": str, "label": str, "objects": int}

    @cached_property
    def stamps(self) -> Mapping[str, tuple[str, ...]]:
        """The stamps of the split by class: sorted paths below the package's folder.

        Raises:
            SettingError: no stamps there, or none of some class.
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
        """The split's part of a class's stamps; a single one is in both."""
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
            things = self._things(self._draws(index, "scene"), album)
        except SampleError as problem:
            return Row(url=url, caption="", columns=columns, problem=problem)
        told = [place for place, thing in enumerate(things) if self.truth == "all" or thing.name not in NOVEL]
        main = max(things, key=lambda thing: int(thing.visible.sum())).name
        columns["objects"] = len(told)
        columns["label"] = main if self.truth == "all" or main not in NOVEL else None
        record = {"width": self.size, "height": self.size, "objects": [_told(place, things[place]) for place in told]}
        return Row(
            url=url,
            caption=_caption([thing.name for thing in things], self._draws(index, "words")),
            image=self._image(things, self._draws(index, "render")),
            columns=columns,
            members={FIELD: to_bytes(record)},
        )

    def _draws(self, index: int, purpose: str) -> Draws:
        return Draws(self.seed, f"stamp-scenes {self.split}", index, purpose)

    def _things(self, draws: Draws, album: "_Album") -> list[PlacedStamp]:
        """What stands where, from the back to the front: one thing at least."""
        names = list(self.classes)
        wanted = 1 + draws.integer(self.most_things)
        things: list[PlacedStamp] = []
        for number in range(wanted + _TRIES):
            if number >= wanted and things:
                break
            name = draws.pick(names)
            stamp = draws.pick(self.stamps[name])
            longest = self.size * draws.uniform(0.25, 0.8) / (1 + 0.2 * (wanted - 1))
            cutout = _scaled(album.cutout(stamp), longest)
            if draws.chance(0.5) and _may_flip(self._root / stamp):
                cutout = np.ascontiguousarray(cutout[:, ::-1])
            things = self._placed(things, name, stamp, cutout, draws)
        if not things:
            raise SampleError("failed_to_resize", "too_small", f"no stamp is seen at {self.size} pixels")
        return things

    def _placed(
        self, things: list[PlacedStamp], name: str, stamp: str, cutout: Cutout, draws: Draws
    ) -> list[PlacedStamp]:
        """The things with a new one in front, or as they were where it would hide too much of another."""
        height, width = cutout.shape[:2]
        for _ in range(_TRIES):
            left, top = draws.integer(self.size - width + 1), draws.integer(self.size - height + 1)
            whole = np.zeros((self.size, self.size), bool)
            whole[top : top + height, left : left + width] = cutout[:, :, 3] >= 127.5
            if np.count_nonzero(whole) < _FEWEST_PIXELS:
                return things
            behind = [replace(thing, visible=thing.visible & ~whole) for thing in things]
            if all(_hidden(thing) <= world.OCCLUSION_CAP for thing in behind):
                return [*behind, PlacedStamp(name, stamp, cutout, left, top, whole, whole)]
        return things

    def _image(self, things: list[PlacedStamp], draws: Draws) -> bytes:
        style = draws.pick(("photo", "flat"))
        image = paint_ground(draws.pick(world.GROUND_NAMES), style, self.size, draws)
        for thing in things:
            height, width = thing.cutout.shape[:2]
            area = image[thing.top : thing.top + height, thing.left : thing.left + width]
            seen = thing.cutout[:, :, 3:] / np.float32(255)
            area[:] = np.rint(area * (1 - seen) + thing.cutout[:, :, :3]).clip(0, 255).astype(np.uint8)
        return encode(finish(image, style, draws), draws)[0]


class _Album:
    """Stamps that were read, so that each is decoded once for a slice."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, Cutout] = {}

    def cutout(self, path: str) -> Cutout:
        """What is seen of a stamp.

        Raises:
            SampleError: it cannot be read, or all of it is transparent.
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
    """Sorted paths of the images that a class has; mirrored copies are left out, scenes flip by themselves."""
    found: list[str] = []
    for folder, names in places.items():
        wanted = (
            (root / folder).glob("*.png") if names == ALL else [root / folder / f"{one}.png" for one in names.split()]
        )
        found += [path.relative_to(root).as_posix() for path in wanted if path.is_file() and not is_mirror(path.name)]
    return sorted(found)


def _may_flip(image: Path) -> bool:
    """Whether left and right may change places: the package says where there is something to read."""
    options = image.with_suffix(".dat")
    return not options.is_file() or "nomirror" not in options.read_text(errors="replace").split()


def _scaled(cutout: Cutout, longest: float) -> Cutout:
    """With its longer side of ``longest`` pixels, rounded, the shorter one in proportion and at least 1."""
    scale = longest / max(cutout.shape[:2])
    height, width = (max(1, round(scale * side)) for side in cutout.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cutout, (width, height), interpolation=way), np.float32)


def _hidden(thing: PlacedStamp) -> float:
    return 1 - float(np.count_nonzero(thing.visible)) / float(np.count_nonzero(thing.whole))


def _told(place: int, thing: PlacedStamp) -> dict[str, Any]:
    """An entry of ``objects`` in boxes.json."""
    return {
        "id": place,
        "label": thing.name,
        "stamp": thing.stamp,
        "bbox": list(cv2.boundingRect(thing.visible.astype(np.uint8))),
        "area": int(np.count_nonzero(thing.visible)),
        "iscrowd": 0,
        "occlusion": round(_hidden(thing), 4),
        "segmentation": {"size": list(thing.visible.shape), "counts": run_lengths(thing.visible)},
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
