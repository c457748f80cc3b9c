"""The Tux Paint stamps: images with alpha and captions in dozens of languages, from a Debian package.

    apt-get install tuxpaint-stamps-default                                  # /usr/share/tuxpaint/stamps
    apt-get download tuxpaint-stamps-default && dpkg-deb -x *.deb unpacked   # or without root: folder "unpacked"

A stamp is ``animals/birds/crow.png`` with ``crow.txt`` beside it: the first line is English, further lines read
``de.utf8=Eine Krähe.`` Some stamps have a second image, ``crow_mirror.png``, with the same text. Vector images
(``crow.svg``) are not decoded: without a ``.png`` of the same name, the row has a problem and is counted.

``crow.ogg`` or ``crow.wav`` is what the stamp sounds like, ``crow_desc.ogg`` and ``crow_desc_fr.ogg`` are its text
spoken in English and in French. With ``sound`` they are parts of the rows: image, sound and text.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import require
from pipeline.errors import SampleError
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.storage import Folder
from pipeline.sources.record_slices import record_slices, slice_records
from pipeline.sources.source import Cell, Part, Row, Slice

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = "/usr/share/tuxpaint/stamps"
MOST_PIXELS = 1 << 26
"""Largest PNG to decode, by the size in its header."""

_TRANSLATION = re.compile(r"([A-Za-z]+(?:[_@-][A-Za-z]+)*)\.utf8=(.*)")
_PNG_HEADER = b"\x89PNG\r\n\x1a\n"
_MIRROR = "_mirror"
_WORD = re.compile(r"[^\W\d_]+")
ASKED_VERSION = 1
"""Version of the questions: another one makes shards anew."""
_ALLOWED = f"the folder of the Debian package {PACKAGE} (apt-get install {PACKAGE}), installed or unpacked"


@dataclass(frozen=True, kw_only=True)
class TuxPaintStamps:
    """The images below ``folder``, in the order of their paths; label = top folder."""

    kind: ClassVar[str] = "stamps"
    summary: ClassVar[str] = "The Tux Paint stamps of the Debian package tuxpaint-stamps-default."
    has_captions: ClassVar[bool] = True

    folder: str = INSTALLED
    """Folder of the stamps on every worker: the installed or the unpacked Debian package."""
    language: str = "en"
    """Language of the captions: `en`, or a code of the package such as `de`, `pt_BR`, `sr@latin`."""
    fall_back_to_english: bool = False
    """Use the English caption where there is no translation; otherwise the caption is empty."""
    split: Literal["all", "train", "held_out"] = "all"
    """All stamps, or one split by the hash of the path; a stamp and its mirror image are in the same split."""
    held_out_share: float = 0.2
    """Fraction of held-out stamps, between 0 and 1 (exclusive)."""
    sound: Literal["none", "effect", "spoken"] = "none"
    """none; effect: what the stamp sounds like, where it has such a sound; spoken: its text, recorded."""
    sound_language: str = "fr"
    """Language of spoken texts: `en` (few), or a code of the package; bg, ca, es, fr, ro and ru have most."""
    translations: bool = False
    """Store the captions of all languages as the list `captions`, and their codes as the list `languages`."""
    questions: bool = False
    """Ask about each stamp what kind it is (its top folder), what it is (the name of its file), and whether it is of a
    kind, of its own or of another one; in `questions.json`."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_share < 1, "held_out_share", self.held_out_share, "a number between 0 and 1")
        require(self.sound in ("none", "effect", "spoken"), "sound", self.sound, "none, effect or spoken")

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """See :class:`~pipeline.sources.source.Source`; the digest covers options, names and the files' content.

        Raises:
            SettingError: the folder has no stamps, or none with a caption in the language.
        """
        paths = self._images()
        self._check_language(paths)
        yield from record_slices(paths, rows_per_shard, scratch, f"stamps-{self.split}", digest=self._digest)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; an image that cannot be read is a row with a problem."""
        for path in slice_records(piece):
            yield self._row(path)

    def schema(self) -> Mapping[str, type]:
        """``label`` is the top folder, ``category`` all folders, as in ``animals/birds``."""
        lists: dict[str, type] = {"captions": list, "languages": list} if self.translations else {}
        return {"label": str, "category": str, **lists}

    @property
    def media(self) -> tuple[str, ...]:
        """Images; with ``sound`` sounds, too."""
        return ("image",) if self.sound == "none" else ("image", "audio")

    @cached_property
    def _root(self) -> Path:
        return stamps_root(self.folder)

    def _images(self) -> list[str]:
        """Sorted paths of this split's images, relative to the root."""
        files = {file.relative_to(self._root).as_posix() for file in self._root.rglob("*") if file.is_file()}
        raster = {path for path in files if path.endswith(".png")}
        vector = {path for path in files if path.endswith(".svg") and path.removesuffix(".svg") + ".png" not in raster}
        require(bool(raster), "folder", self.folder, _ALLOWED)
        chosen = sorted(path for path in raster | vector if self.split in ("all", self._side(path)))
        require(bool(chosen), "held_out_share", self.held_out_share, f"a share that leaves {self.split} not empty")
        return chosen

    def _side(self, path: str) -> str:
        """The split of an image: the SHA-256 of the stamp's path, as a fraction, compared with the held-out share."""
        fraction = int.from_bytes(hashlib.sha256(_stamp(path).encode()).digest()[:8], "big") / 2**64
        return "held_out" if fraction < self.held_out_share else "train"

    def _check_language(self, paths: list[str]) -> None:
        if self.language == "en":
            return
        known = {code for path in paths for code in self._captions(path)}
        require(self.language in known, "language", self.language, "one of " + ", ".join(sorted(known | {"en"})))

    def _digest(self, part: list[str]) -> str:
        options: list[object] = [self.language, self.fall_back_to_english]
        options += [self.sound, self.sound_language] if self.sound != "none" else []
        options += ["translations"] if self.translations else []
        options += [f"questions {ASKED_VERSION}"] if self.questions else []
        digest = hashlib.sha256(json.dumps([options, part]).encode())
        for path in part:
            for file in (self._root / path, self._text_file(path), *self._sound_files(path)):
                digest.update(hashlib.sha256(_bytes_of(file) or b"").digest())
        return digest.hexdigest()

    def _row(self, path: str) -> Row:
        folders = path.split("/")[:-1]
        columns: dict[str, Cell] = {"label": folders[0] if folders else "", "category": "/".join(folders)}
        captions = self._captions(path)
        if self.translations:
            columns |= {"captions": list(captions.values()), "languages": list(captions)}
        caption = captions.get(self.language, captions.get("en", "") if self.fall_back_to_english else "")
        try:
            parts = (Part("image", self._image(path)), *self._sounds(path))
            members = {QUESTIONS: self._questions(path)} if self.questions else {}
            return Row(url=path, caption=caption, parts=parts, columns=columns, members=members)
        except SampleError as problem:
            return Row(url=path, caption=caption, columns=columns, problem=problem)

    def _questions(self, path: str) -> bytes:
        """``questions.json``: answers follow from the path, the same for a stamp and its mirror image."""
        kind, name = path.partition("/")[0], " ".join(_WORD.findall(_stamp(path).rpartition("/")[2].lower()))
        number = int.from_bytes(hashlib.sha256(f"asked {_stamp(path)}".encode()).digest()[:8], "big")
        others = [one for one in self._kinds if one != kind]
        own = number % 2 == 0 or not others
        named = kind if own else others[number // 2 % len(others)]
        asked = [
            {"kind": "what_kind", "question": "what kind of thing is this?", "answer": kind},
            {"kind": "which_kind", "question": f"does it belong to {named}?", "answer": "yes" if own else "no"},
            *([{"kind": "name", "question": "what is this?", "answer": name}] if name else []),
        ]
        return json.dumps({"questions": asked}).encode()

    @cached_property
    def _kinds(self) -> list[str]:
        """The top folders, sorted."""
        return sorted(folder.name for folder in self._root.iterdir() if folder.is_dir())

    def _sounds(self, path: str) -> tuple[Part, ...]:
        """The sound of a stamp, if it has one."""
        found = (_bytes_of(file) for file in self._sound_files(path))
        return tuple(Part("audio", body) for body in found if body is not None)[:1]

    def _sound_files(self, path: str) -> tuple[Path, ...]:
        """Where the sound of a stamp may be; a mirror image has that of its stamp."""
        name = _stamp(path)
        if self.sound == "spoken":
            ending = "" if self.sound_language == "en" else f"_{self.sound_language}"
            return (self._root / f"{name}_desc{ending}.ogg",)
        return (self._root / f"{name}.ogg", self._root / f"{name}.wav") if self.sound == "effect" else ()

    def _captions(self, path: str) -> dict[str, str]:
        """Captions by language code; empty without a text file."""
        lines = (_bytes_of(self._text_file(path)) or b"").decode("utf-8-sig", errors="replace").splitlines()
        captions = {"en": lines[0].strip()} if lines and not _TRANSLATION.match(lines[0]) else {}
        for line in lines:
            found = _TRANSLATION.match(line)
            if found:
                captions.setdefault(found[1], found[2].strip())
        return captions

    def _text_file(self, path: str) -> Path:
        own = (self._root / path).with_suffix(".txt")
        return own if own.is_file() else self._root / (_stamp(path) + ".txt")

    def _image(self, path: str) -> bytes:
        """The file of the image, which may have alpha.

        Raises:
            SampleError: a vector image, or an unreadable file.
        """
        if path.endswith(".svg"):
            raise SampleError("failed_to_resize", "vector_picture", "svg images are not decoded")
        return _image_file(self._root, path)


def stamps_root(folder: str) -> Path:
    """The folder of the stamps, given that folder or the one the package was unpacked in.

    Raises:
        SettingError: there is no such folder.
    """
    root = Path(folder).expanduser()
    inside = root / INSTALLED.lstrip("/")
    root = inside if inside.is_dir() else root
    require(root.is_dir(), "folder", folder, _ALLOWED)
    return root


def is_mirror(name: str) -> bool:
    """Whether an image is the mirrored copy of another one."""
    return name.rpartition(".")[0].endswith(_MIRROR)


def _stamp(path: str) -> str:
    """The stamp of an image: its path without extension and ``_mirror``."""
    return path.rpartition(".")[0].removesuffix(_MIRROR)


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _image_file(root: Path, path: str) -> bytes:
    data = _bytes_of(root / path)
    if data is None:
        raise SampleError("failed_to_download", "unreadable", f"cannot read the file {path}")
    return data


def read_stamp(root: Path, path: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read a PNG of any colour type: RGB float32 [H, W, 3], 0 to 255, and alpha float32 [H, W, 1], 0 to 1.

    Raises:
        SampleError: no such file, not a PNG, or a PNG that is too large.
    """
    image = _decoded(_image_file(root, path))
    peak = 255 if image.dtype == np.uint8 else 65535
    colour = np.atleast_3d(image).astype(np.float32) * np.float32(255 / peak)
    alpha = colour[:, :, -1:] / np.float32(255) if colour.shape[2] in (2, 4) else np.ones_like(colour[:, :, :1])
    colour = colour[:, :, 2::-1] if colour.shape[2] >= 3 else np.repeat(colour[:, :, :1], 3, axis=2)
    return colour, alpha


def _decoded(data: bytes) -> NDArray[Any]:
    if not data.startswith(_PNG_HEADER) or len(data) < 24:
        raise SampleError("failed_to_resize", "not_a_png", "the file does not begin as a PNG does")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    if width * height > MOST_PIXELS:
        raise SampleError("failed_to_resize", "too_large", f"{width} x {height} pixels, at most {MOST_PIXELS} in all")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise SampleError("failed_to_resize", "undecodable", str(error)) from error
    if image is None:
        raise SampleError("failed_to_resize", "undecodable", "the PNG is damaged")
    return image
