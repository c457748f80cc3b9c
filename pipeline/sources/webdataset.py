"""Existing WebDataset tars, including img2dataset's output: each tar becomes one shard with the same fields."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from braceexpand import braceexpand

from pipeline.config import parse_json, require
from pipeline.errors import DataError, SampleError, missing, unreadable
from pipeline.shards.media import IMAGE, MEDIA, check_media, medium_of
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder, file_stamp, split_file
from pipeline.shards.tar import iterate_tar
from pipeline.shards.text import decoded
from pipeline.shards.writer import reserved_columns
from pipeline.sources.source import SOUND_UNCHANGED, UNCHANGED, Part, Row, Slice
from pipeline.sources.tables import AS_WRITTEN, first_text, stored_text

logger = logging.getLogger(__name__)

JSON_KEY = "json:"  # before the key of the json member that holds the caption
CAPTIONS = ("txt", "text", "caption", "captions", "cap")  # members that usually hold one
CAPTION_KEYS = ("caption", "captions", "text", "txt", "alt", "alt_text", "title", "description")


@dataclass(frozen=True, kw_only=True)
class WebDatasetTars:
    """The samples of existing tars.

    A part is the first member with an ending of its medium (jpg, png, webp, ...; flac, wav, mp3, ...). The caption is
    the member ``caption_field``. A sample without a part of one of the ``media`` has only the others. The keys
    ``json_columns`` of the json member become columns. Other members are copied unless ``keep_members`` is off.
    """

    kind: ClassVar[str] = "webdataset"
    summary: ClassVar[str] = (
        "Existing WebDataset tars, including img2dataset's; images and sounds are stored byte for byte by default."
    )
    image_options: ClassVar[Mapping[str, Any]] = UNCHANGED
    audio_options: ClassVar[Mapping[str, Any]] = SOUND_UNCHANGED

    tars: str
    """Folder, tar, or brace pattern such as `s3://bucket/{00000..00123}.tar` or `{train,val}/{0..9}.tar`; join several
    by `::`."""
    media: tuple[str, ...] = ("image",)
    """Media of the samples: one or more of image, audio and video."""
    image_field: str | None = None
    """Member with the image, such as `input.jpg`; None = the first member with the ending of an image."""
    caption_field: str | None = "txt"
    """Member with the caption, or `json:KEY` for a key of the json member; None = no captions."""
    json_columns: tuple[str, ...] = ()
    """Keys of the json member to store as columns, as text."""
    keep_members: bool = True
    """Copy members other than images, sounds, captions and json unchanged."""

    def __post_init__(self) -> None:
        require(
            bool(self.tars),
            "tars",
            self.tars,
            "a folder, a tar or a brace pattern of tars",
        )
        check_media(self.media)
        reserved = sorted(set(self.json_columns) & set(reserved_columns(self.media)))
        require(not reserved, "json_columns", reserved, "keys with names that the shards do not use themselves")
        once = len(set(self.json_columns)) == len(self.json_columns)
        require(once, "json_columns", self.json_columns, "each key once")

    @property
    def has_captions(self) -> bool:
        """Whether the samples get a ``txt`` field."""
        return self.caption_field is not None

    def slices(self, rows_per_shard: int, scratch: Folder) -> Iterator[Slice]:
        """One slice per tar, of at most ``rows_per_shard`` samples, so that keys stay unique.

        Warns where no sample of any tar has a caption, and names the members that could be it.
        """
        seen = _Seen()
        for uri in self._uris():
            count = 0
            digest = hashlib.sha256()
            for sample in _samples(uri):
                sizes = [(name, len(value)) for name, value in sample.fields.items()]
                digest.update(json.dumps([sample.key, sizes]).encode())
                if not seen.captions:
                    seen.add(sample, self._caption(sample, _json(sample, self._reads_json)))
                count += 1
            enough = count <= rows_per_shard
            require(
                enough,
                "number_sample_per_shard",
                rows_per_shard,
                f"{count} or more, the samples of {uri}",
            )
            digest.update(_stamp(uri).encode())
            yield Slice(count=count, digest=digest.hexdigest(), where={"uri": uri})
        if self.caption_field is not None:
            seen.warn(self.caption_field)

    def rows(self, piece: Slice) -> Iterator[Row]:
        """See :class:`~pipeline.sources.source.Source`; samples without any part are rows with a problem."""
        for sample in _samples(str(piece.where["uri"])):
            yield self._row(sample)

    def schema(self) -> Mapping[str, type]:
        """The json columns, as strings."""
        return {name: str for name in self.json_columns}

    def _row(self, sample: Sample) -> Row:
        plain = _json(sample, self._reads_json)
        record: Mapping[str, Any] = {} if isinstance(plain, SampleError) else plain
        parts = self._parts(sample)
        used = {*parts.values(), "json", "" if self.caption_field is None else self.caption_field}
        members = {name: value for name, value in sample.fields.items() if name not in used}
        problem = self._problem(plain) if parts else self._no_part(sample)
        return Row(
            url=stored_text(record.get("url")) or sample.key,
            caption=None if self.caption_field is None else self._caption(sample, plain) or "",
            parts=tuple(Part(medium, sample.fields[field]) for medium, field in parts.items()),
            columns={name: stored_text(record.get(name)) for name in self.json_columns},
            members=members if self.keep_members else {},
            problem=problem,
        )

    @property
    def _reads_json(self) -> bool:
        return bool(self.json_columns) or (self.caption_field or "").startswith(JSON_KEY)

    def _problem(self, plain: "dict[str, Any] | SampleError") -> SampleError | None:
        if isinstance(plain, SampleError):
            return plain
        wanted = self.caption_field or ""
        if wanted.startswith(JSON_KEY) and isinstance(first_text(plain.get(wanted.removeprefix(JSON_KEY))), dict):
            return _malformed(f"{wanted} is an object, not a text")
        return None

    def _parts(self, sample: Sample) -> dict[str, str]:
        """The fields of the parts, by medium."""
        found = {medium: MEDIA[medium].field_of(sample.fields) for medium in self.media}
        if self.image_field is not None and IMAGE.name in found:
            named = self.image_field.lower()
            found[IMAGE.name] = named if named in sample.fields else None
        return {medium: field for medium, field in found.items() if field is not None}

    def _no_part(self, sample: Sample) -> SampleError:
        has = ", ".join(f".{name}" for name in sample.fields)
        if self.media == (IMAGE.name,) and self.image_field is not None:
            return SampleError(
                "failed_to_download", "no_picture", f"no member .{self.image_field}; the sample has {has}"
            )
        media = [MEDIA[medium] for medium in self.media]
        nouns = " or ".join(medium.noun for medium in media)
        message = f"no member with the ending of {nouns}; the sample has {has}"
        for name in sample.fields:
            ending = name.rpartition(".")[2]
            other = medium_of(name)
            if other is not None:
                message += f" (.{name} is {other.noun}: --media {other.name})"
            elif "." in name and any(ending in medium.endings for medium in media):
                # webdataset's rule: a key ends at its first dot.
                advice = f"--image-field {name}, or names" if ending in IMAGE.endings else "names"
                message += f" (.{name} follows the first dot of the name: {advice} without that dot)"
            else:
                continue
            break
        return SampleError("failed_to_download", "no_picture" if IMAGE in media else "no_sound", message)

    def _caption(self, sample: Sample, plain: "dict[str, Any] | SampleError") -> str | None:
        wanted = self.caption_field
        if wanted is None:
            return None
        if wanted.startswith(JSON_KEY):
            value = None if isinstance(plain, SampleError) else first_text(plain.get(wanted.removeprefix(JSON_KEY)))
            return None if isinstance(value, dict) else stored_text(value)
        content = sample.fields.get(wanted.lower())
        return None if content is None else decoded(content).rstrip("\r\n")

    def _uris(self) -> list[str]:
        uris = [uri for part in self.tars.split("::") for place in _expanded(part) for uri in _tars_at(place)]
        require(bool(uris), "tars", self.tars, "a place with at least one .tar")
        return uris


def _expanded(pattern: str) -> list[str]:
    """The places that ``pattern`` names, as bash and webdataset expand braces."""
    if "{" not in pattern:
        return [pattern]
    if os.path.exists(os.path.expanduser(pattern)):
        return [pattern]  # a name with braces
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        require(False, "tars", pattern, f"braces that are closed ({error})")
        raise


def _tars_at(uri: str) -> list[str]:
    place = Folder(uri)
    kind = place.kind()
    if kind is None:
        raise missing("tars", uri)
    return [place.join(name) for name in place.names(".tar")] if kind == "directory" else [place.uri]


def _samples(uri: str) -> Iterator[Sample]:
    place, name = split_file(uri)
    try:
        with place.open(name) as file:
            yield from iterate_tar(file, uri)
    except (FileNotFoundError, DataError) as error:
        raise unreadable("tars", uri, "a whole tar", error) from error


def _stamp(uri: str) -> str:
    place, name = split_file(uri)
    return file_stamp(place.info(name))


def _json(sample: Sample, asked: bool) -> dict[str, Any] | SampleError:
    """The object of the json member, empty without one; or the reason why the row cannot be used.

    JSON that is no object matters only where something of it was ``asked`` for.
    """
    try:
        plain = parse_json(decoded(sample.fields.get("json", b"{}")), **AS_WRITTEN)
    except ValueError as error:
        return _malformed(f"the member .json is no JSON: {error}")
    if isinstance(plain, dict):
        return plain
    return _malformed("the member .json is no JSON object") if asked else {}


def _malformed(message: str) -> SampleError:
    return SampleError("failed_to_download", "malformed_row", message)


@dataclass
class _Seen:
    """What the samples of all tars have: captions, and what could be a caption."""

    samples: int = 0
    captions: int = 0
    candidates: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample, caption: str | None) -> None:
        self.samples += 1
        if caption:
            self.captions += 1
        if self.captions or self.samples > 1000:
            return
        self.candidates.update(name for name in sample.fields if name.rpartition(".")[2] in CAPTIONS)
        plain = _json(sample, False)
        if not isinstance(plain, SampleError):
            texts = (name for name in CAPTION_KEYS if isinstance(first_text(plain.get(name)), str))
            self.candidates.update(JSON_KEY + name for name in texts)

    def warn(self, wanted: str) -> None:
        if self.captions or not self.samples:
            return
        names = [name for name, _ in self.candidates.most_common() if name != wanted]
        could = f"could be {' or '.join(names)}" if names else "None stands for no captions"
        logger.warning("none of %d samples has a caption in %s: --caption-field %s", self.samples, wanted, could)
