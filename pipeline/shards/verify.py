"""Check a snapshot's files against its manifest: digests, counts, keys, members, and foreign files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.config import parse_json
from pipeline.errors import DataError, SnapshotError
from pipeline.shards.adopt import ENGINE, PROGRESS
from pipeline.shards.interchange import FOREIGN_ENGINES, SIZES, shard_sizes
from pipeline.shards.media import MEDIA
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_selection
from pipeline.shards.sidecar import TAR_DIGEST, sidecar_file
from pipeline.shards.snapshot import SNAPSHOTS, Shard, Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import BLOCK, TEMPORARY, Folder
from pipeline.shards.tar import iterate_tar
from pipeline.shards.text import decoded
from pipeline.shards.writer import STATS

LEFT = "left by a killed run (or one is at work now)"
Decode = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The checks of one snapshot, per shard. ``decode`` raises where a part cannot be decoded, by medium."""

    snapshot: Snapshot
    decode: Mapping[str, Decode] = field(default_factory=dict)

    def check(self, number: int) -> str:
        """The JSON list of problems of shard ``number``, as text; empty where there are none."""
        shard = self.snapshot.shards[number]
        return json.dumps(list(self.problems(shard)))

    def problems(self, shard: Shard) -> Iterator[str]:
        """The problems of the files of ``shard``; each file is read once, sequentially."""
        folder = Folder(self.snapshot.folder)
        content = _Content(self.snapshot.fields, self.decode)
        yield from _tar(folder, shard, content)
        yield from _selection(folder, shard)
        keys = content.keys if content.whole else None
        for name, digest in sorted(shard.sidecars.items()):
            yield from _sidecar(folder, shard, name, digest, keys)
        yield from _table(folder, shard, keys, self._made_by_rows)

    @property
    def _made_by_rows(self) -> bool:
        """Whether each tar must have parquet and stats files beside it."""
        options = self.snapshot.options
        return options.get("engine") != ENGINE and ("source" in options or "engine" in options)


class _Content:
    """Facts about the samples of a tar, collected in one pass."""

    def __init__(self, fields: tuple[str, ...], decode: Mapping[str, Decode]) -> None:
        self._fields, self._decode = set(fields), decode
        self._media = [medium for medium in MEDIA.values() if medium.field_of(dict.fromkeys(fields))]
        self.keys: list[str] = []
        self.whole = False
        self._wrong: dict[str, list[str]] = {}

    def add(self, sample: Sample) -> None:
        self.keys.append(sample.key)
        unknown = sorted(set(sample.fields) - self._fields)
        if unknown:
            self._note(f"with members that the snapshot does not name ({', '.join(unknown)})", sample)
        parts = {medium.name: body for medium in self._media if (body := sample.body(medium)) is not None}
        if self._media and not parts:
            self._note("without " + " or ".join(medium.noun for medium in self._media), sample)
        if "json" in sample.fields and not _is_json(sample.fields["json"]):
            self._note("whose json cannot be parsed", sample)
        for medium, body in parts.items():
            if medium in self._decode and not _decodes(self._decode[medium], body):
                self._note(f"whose {medium} cannot be decoded", sample)

    def wrong(self) -> Iterator[str]:
        for what, keys in self._wrong.items():
            yield f"{len(keys)} samples {what}, the first {keys[0]}"

    def _note(self, what: str, sample: Sample) -> None:
        self._wrong.setdefault(what, []).append(sample.key)


def _decodes(decode: Decode, body: bytes) -> bool:
    try:
        decode(body)
    except Exception:
        # The sample boundary: decoders raise arbitrary exceptions on damaged input.
        return False
    return True


def _tar(folder: Folder, shard: Shard, content: _Content) -> Iterator[str]:
    try:
        size = folder.size(shard.tar)
    except FileNotFoundError:
        yield f"{shard.tar} is missing"
        return
    if size != shard.bytes:
        short = "is truncated" if size < shard.bytes else "has grown"
        yield f"{shard.tar} {short}: {size} bytes, the snapshot says {shard.bytes}"
    digest = hashlib.sha256()
    with folder.open(shard.tar) as file:
        try:
            for sample in iterate_tar(_Tee(file, digest), folder.join(shard.tar)):  # type: ignore[arg-type]
                content.add(sample)
            content.whole = True
        except DataError as error:
            yield str(error)
        while block := file.read(BLOCK):
            digest.update(block)
    if size == shard.bytes and digest.hexdigest() != shard.sha256:
        yield f"{shard.tar} has other bytes than the snapshot says (SHA-256 differs)"
    if content.whole and len(content.keys) != shard.stored:
        yield f"{shard.tar} holds {len(content.keys)} samples, the snapshot says {shard.stored}"
    yield from content.wrong()


class _Tee:
    """A sequentially read file that hashes its bytes."""

    def __init__(self, file: Any, digest: Any) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int) -> bytes:
        content: bytes = self._file.read(size)
        self._digest.update(content)
        return content


def _selection(folder: Folder, shard: Shard) -> Iterator[str]:
    try:
        read_selection(folder, shard)
    except DataError as error:
        yield str(error)


def _sidecar(folder: Folder, shard: Shard, name: str, digest: str, keys: list[str] | None) -> Iterator[str]:
    file = sidecar_file(shard, name)
    try:
        content = folder.read_bytes(file)
    except FileNotFoundError:
        yield f"{file} is missing"
        return
    try:
        table = parse_parquet(content)
    except (pa.ArrowInvalid, OSError) as error:
        yield f"{file} is damaged ({_line(error)})"
        return
    if (table.schema.metadata or {}).get(TAR_DIGEST) != shard.sha256.encode():
        yield f"{file} is stale: it was made from another {shard.tar}"
    elif hashlib.sha256(content).hexdigest() != digest:
        yield f"{file} has other bytes than the snapshot says (SHA-256 differs)"
    if keys is not None and "key" in table.column_names:
        foreign = {str(key) for key in table["key"].to_pylist()} - set(keys)
        if foreign:
            yield f"{file} has {len(foreign)} keys that {shard.tar} has not, such as {min(foreign)}"


def _table(folder: Folder, shard: Shard, keys: list[str] | None, expected: bool) -> Iterator[str]:
    stats, problem = _stats(folder, shard)
    if problem:
        yield problem
    if stats is None and expected and not problem:
        yield f"{shard.name}{STATS} is missing"
    if stats is not None:
        yield from _counts(shard, stats)
    file = f"{shard.name}.parquet"
    try:
        table = parse_parquet(folder.read_bytes(file))
    except FileNotFoundError:
        if expected or stats is not None:
            yield f"{file} is missing"
        return
    except (pa.ArrowInvalid, OSError) as error:
        yield f"{file} is damaged ({_line(error)})"
        return
    if stats is not None and table.num_rows != stats.get("count", table.num_rows):
        yield f"{file} has {table.num_rows} rows, {shard.name}{STATS} says {stats['count']}"
    if keys is not None and {"key", "status"} <= set(table.column_names):
        rows = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
        listed = {key for key, status in rows if status == "success"}
        # A key may be a path in a tar; the parquet file has its last component.
        stored = {key.rsplit("/", 1)[-1] for key in keys}
        if listed != stored:
            more, fewer = len(listed - stored), len(stored - listed)
            yield f"{file} lists {more} samples that {shard.tar} lacks, and lacks {fewer} that it holds"


def _stats(folder: Folder, shard: Shard) -> tuple[dict[str, Any] | None, str]:
    file = shard.name + STATS
    try:
        plain = parse_json(folder.read_bytes(file))
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        return None, f"{file} is damaged ({_line(error)})"
    return (plain, "") if isinstance(plain, dict) else (None, f"{file} is no JSON object")


def _counts(shard: Shard, stats: dict[str, Any]) -> Iterator[str]:
    if stats.get("successes", shard.stored) != shard.stored:
        yield f"{shard.name}{STATS} says {stats['successes']} samples, the snapshot {shard.stored}"
    elif stats.get("sha256", shard.sha256) != shard.sha256:
        yield f"{shard.name}{STATS} is of another {shard.tar}"


def folder_problems(folder: Folder, snapshot: Snapshot) -> list[str]:
    """Problems of the folder itself: broken manifests, a wrong ``sizes.json``, files of unfinished runs."""
    return [*_manifests(folder), *_sizes(folder, snapshot), *_strays(folder)]


def _manifests(folder: Folder) -> Iterator[str]:
    for name in snapshot_ids(folder):
        try:
            read_snapshot(f"{folder.uri}@{name}")
        except SnapshotError as error:
            yield str(error)


def _sizes(folder: Folder, snapshot: Snapshot) -> Iterator[str]:
    latest = snapshot_ids(folder)[-1] == snapshot.id
    if not latest or snapshot.options.get("engine") in FOREIGN_ENGINES or not folder.exists(SIZES):
        return
    try:
        same = parse_json(folder.read_bytes(SIZES)) == shard_sizes(snapshot.shards)
    except ValueError:
        same = False
    if not same:
        yield f"{SIZES} does not have the sizes of the snapshot's shards"


def _strays(folder: Folder) -> Iterator[str]:
    names = [*_all_names(folder)]
    for place in ("", SNAPSHOTS, "_plan", "_selections"):
        inside = names if not place else [*_all_names(folder.folder(place))]
        for name in inside:
            if name.startswith(TEMPORARY):
                yield f"{place}/{name} was {LEFT}".lstrip("/")
    manifests = set(snapshot_ids(folder))
    for name in folder.folder(SNAPSHOTS).names(".shards.parquet"):
        if name.removesuffix(".shards.parquet") not in manifests:
            yield f"{SNAPSHOTS}/{name} was {LEFT}"
    if folder.exists(f"{SNAPSHOTS}/{PROGRESS}"):
        yield f"{SNAPSHOTS}/{PROGRESS} was {LEFT}"
    yield from _unlisted(folder, names, [*_readable(folder, manifests)])


def _unlisted(folder: Folder, names: list[str], snapshots: list[Snapshot]) -> Iterator[str]:
    """Tars and sidecars that belong to no snapshot. Shards without samples are correctly in none."""
    shards = [shard for snapshot in snapshots for shard in snapshot.shards]
    listed = {shard.tar for shard in shards}
    sidecars = {sidecar_file(shard, name) for shard in shards for name in shard.sidecars}
    for name in names:
        stem, _, ending = name.partition(".")
        if ending == "tar" and name not in listed:
            stats, _ = _stats(folder, Shard(name=stem, samples=0, bytes=0, sha256=""))
            if stats is None:
                yield f"{name} has no {stem}{STATS} and is in no snapshot: {LEFT}"
            elif stats.get("successes"):
                yield f"{name} is in no snapshot; the job that made it has not finished"
        elif ending.endswith(".parquet") and f"{stem}.tar" in listed and name not in sidecars:
            yield f"{name} is in no snapshot; the job that made it has not finished"


def _readable(folder: Folder, ids: Iterable[str]) -> Iterator[Snapshot]:
    for name in ids:
        try:
            yield read_snapshot(f"{folder.uri}@{name}")
        except SnapshotError:
            continue  # reported by _manifests


def _all_names(folder: Folder) -> Iterator[str]:
    """All files, also temporary ones, which :meth:`Folder.names` leaves out."""
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return
    yield from sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")


def _is_json(content: bytes) -> bool:
    try:
        parse_json(decoded(content))
    except ValueError:
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
