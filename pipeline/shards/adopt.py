"""Publish a snapshot of tars made by other tools, in place.

Tars of img2dataset and plain WebDataset tars are read once, for digests and counts. No file is copied or changed; only
``_snapshots/`` is added. So img2dataset can continue in the folder, and a later run adopts the new shards. The stats of
each tar are stored in ``_snapshots/adopted.parquet``, so no tar is read twice.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import DataError, SettingError, SnapshotError, StorageError
from pipeline.shards.lease import lease
from pipeline.shards.manifest import MOST_BYTES
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.snapshot import SNAPSHOTS, Shard, Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import BLOCK, Folder, file_stamp
from pipeline.shards.tar import iterate_tar
from pipeline.shards.writer import STATS, ShardStats

logger = logging.getLogger(__name__)

ENGINE = "adopted"
KNOWN = "adopted.parquet"  # name, stamp and counts of every tar adopted so far
PROGRESS = "adopting"  # folder with one small file per tar that a running adoption has read
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """The tars of ``folder`` to adopt; ``unfinished`` are those that img2dataset has not marked as done.

    ``known`` maps a tar's name to its version stamp and its stats from an earlier adoption.
    """

    folder: Folder
    names: tuple[str, ...]
    unfinished: tuple[str, ...]
    known: Mapping[str, tuple[str, str]]

    def read_tar(self, number: int) -> str:
        """Read tar ``number``: the JSON of :class:`~pipeline.shards.writer.ShardStats`, or of ``{"problem": ...}``."""
        name = self.names[number]
        stamp = _stamp(self.folder, name)
        progress = _progress(self.folder)
        if name in self.known and self.known[name][0] == stamp:
            return self.known[name][1]
        before = _before(progress, name)
        if before is not None and before[0] == stamp:
            return before[1]
        try:
            stats = json.dumps(vars(describe(self.folder, name)))
        except DataError as error:
            return json.dumps({"shard": name, "problem": str(error)})
        progress.write_atomic(f"{name}.json", json.dumps({"stamp": stamp, "stats": stats}).encode())
        return stats

    def publish(self, described: Iterable[str], card: str | None, skip_damaged: bool) -> Snapshot:
        """Publish the tars that :meth:`read_tar` described as the folder's newest snapshot.

        Raises:
            DataError: some tars are damaged, and ``skip_damaged`` is off.
            SnapshotError: no tar contains a sample.
            StorageError: the file system or store failed.
        """
        plain = {entry["shard"]: (entry, text) for text in described for entry in (json.loads(text),)}
        problems = [entry["problem"] for _, (entry, _) in sorted(plain.items()) if "problem" in entry]
        if problems and not skip_damaged:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            listed = "; ".join(problems[:3]) + more
            raise DataError(f"{listed}; make them again or leave them out with --skip-damaged")
        for problem in problems:
            logger.warning("left out: %s", problem)
        good = {name: (entry, text) for name, (entry, text) in plain.items() if "problem" not in entry}
        stats = [ShardStats(**{**entry, "fields": tuple(entry["fields"])}) for _, (entry, _) in sorted(good.items())]
        with lease(self.folder, "an adoption") as held:
            guarded = replace(self, folder=held.folder)
            snapshot = guarded._publish(stats, card)
            guarded._remember({name: text for name, (_, text) in good.items()})
        return snapshot

    def _publish(self, stats: list[ShardStats], card: str | None) -> Snapshot:
        """Tars of the latest snapshot keep their sidecars and selections."""
        latest = read_snapshot(self.folder.uri) if snapshot_ids(self.folder) else None
        before = {(shard.name, shard.sha256): shard for shard in latest.shards} if latest else {}
        new = [Shard(name=one.shard, samples=one.successes, bytes=one.bytes, sha256=one.sha256) for one in stats]
        dropped: Counter[str] = Counter()
        for one in stats:
            dropped.update(one.reasons)
        shards = tuple(before.get((shard.name, shard.sha256), shard) for shard in new if shard.samples)
        if not shards:
            raise SnapshotError(f"{self.folder.uri}: no tar holds a sample")
        return publish_shards(
            self.folder,
            shards,
            fields=tuple(sorted({name for one in stats for name in one.fields})),
            card=card or (latest.card if latest else None),
            options={"engine": ENGINE},
            rows=sum(one.count for one in stats),
            dropped=dict(dropped),
        )

    def _remember(self, stats: Mapping[str, str]) -> None:
        rows = [{"name": name, "stamp": _stamp(self.folder, name), "stats": text} for name, text in stats.items()]
        content = BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), content)
        self.folder.folder(SNAPSHOTS).write_atomic(KNOWN, content.getvalue())
        self.folder.folder(SNAPSHOTS).delete_folder(PROGRESS)


def find_shards(folder: Folder) -> Adoption:
    """The tars to adopt. If the folder has marks of img2dataset (``_stats.json``), a tar without one is unfinished.

    Raises:
        SettingError: no tar, or a folder made by clipmill itself.
        StorageError: the folder cannot be written.
    """
    tars = [name.removesuffix(".tar") for name in folder.names(".tar")]
    require(bool(tars), "folder", folder.uri, "a folder with .tar files directly in it")
    marks = {name.removesuffix(STATS) for name in folder.names(STATS)}
    for name in sorted(marks)[:1]:
        ours = "unit" in _stats(folder, name)
        require(
            not ours, "folder", folder.uri, "shards made elsewhere; jobs/refresh_dataset.py made and publishes these"
        )
    names = tuple(name for name in tars if name in marks or not marks)
    _check_writable(folder)
    return Adoption(
        folder=folder,
        names=names,
        unfinished=tuple(name for name in tars if name not in names),
        known=_known(folder),
    )


def describe(folder: Folder, name: str) -> ShardStats:
    """Counts, digest and fields of the tar ``name``, in one sequential read, with img2dataset's own counts.

    Raises:
        DataError: a damaged, hostile or compressed tar, or one whose number of samples differs from its mark.
    """
    uri = folder.join(f"{name}.tar")
    members: set[str] = set()
    samples = 0
    with folder.open(f"{name}.tar") as file:
        hashed = _Hashed(file)
        for sample in iterate_tar(hashed, uri):  # type: ignore[arg-type]
            members.update(sample.fields)
            samples += 1
        while hashed.read(BLOCK):
            pass
    if hashed.compression:
        raise DataError(
            f"{uri} is compressed with {hashed.compression}; jobs/refresh_dataset.py webdataset reads those"
        )
    mark = read_mark(folder, name)
    if mark.successes is not None and mark.successes != samples:
        raise DataError(f"{uri} holds {samples} samples, {name}{STATS} says {mark.successes}")
    failures = {"failed_to_download": mark.failed_to_download, "failed_to_resize": mark.failed_to_resize}
    return ShardStats(
        shard=name,
        count=samples if mark.count is None else mark.count,
        successes=samples,
        failed_to_download=failures["failed_to_download"],
        failed_to_resize=failures["failed_to_resize"],
        duration=mark.duration,
        start_time=mark.start_time,
        end_time=mark.end_time,
        status_dict={},
        unit="",
        bytes=hashed.count,
        sha256=hashed.digest.hexdigest(),
        fields=tuple(sorted(members)),
        reasons=dict(+Counter(failures)),
    )


@dataclass(frozen=True, kw_only=True)
class TarMark:
    """The counts in ``_stats.json`` beside a tar, as img2dataset writes them; other keys are ignored."""

    count: int | None = None
    successes: int | None = None
    failed_to_download: int = 0
    failed_to_resize: int = 0
    duration: float = 0
    start_time: float = 0
    end_time: float = 0
    status_dict: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= MOST_BYTES, name, value, "0 or more")


def read_mark(folder: Folder, name: str) -> TarMark:
    """The mark of the tar ``name``; an empty one where there is none.

    Raises:
        DataError: no JSON object, or a count that is none.
    """
    known = {one.name for one in fields(TarMark)}
    plain = {key: value for key, value in _stats(folder, name).items() if key in known}
    try:
        return from_plain(TarMark, plain, name + STATS)
    except SettingError as error:
        raise DataError(f"{folder.join(name + STATS)} has no counts of a tar ({error})") from error


class _Hashed:
    """A sequentially read file that hashes and counts the bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.count, self.compression = file, hashlib.sha256(), 0, ""

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        if not self.count:
            self.compression = COMPRESSIONS.get(content[:2], "")
        self.digest.update(content)
        self.count += len(content)
        return content


def _stats(folder: Folder, name: str) -> dict[str, Any]:
    try:
        plain = parse_json(folder.read_bytes(name + STATS))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder.join(name + STATS)} is not JSON ({error})") from error
    if not isinstance(plain, dict):
        raise DataError(f"{folder.join(name + STATS)} is no JSON object with the counts of a tar")
    return plain


def _stamp(folder: Folder, name: str) -> str:
    """Version stamp of the tar: its size with its modification time, or the store's ETag."""
    return file_stamp(folder.info(f"{name}.tar"))


def _progress(folder: Folder) -> Folder:
    return folder.folder(SNAPSHOTS).folder(PROGRESS)


def _known(folder: Folder) -> dict[str, tuple[str, str]]:
    """The tars adopted so far; entries that are not whole are left out, so their tars are read again."""
    try:
        rows = parse_parquet(folder.folder(SNAPSHOTS).read_bytes(KNOWN)).select(["name", "stamp", "stats"]).to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError):
        return {}
    return {row["name"]: (row["stamp"], row["stats"]) for row in rows if _describes(row["stats"], row["name"])}


def _before(progress: Folder, name: str) -> tuple[str, str] | None:
    """Stamp and stats of a tar that an interrupted adoption has read."""
    try:
        plain = parse_json(progress.read_bytes(f"{name}.json"))
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(plain, dict) and _describes(plain.get("stats"), name)
    return (str(plain.get("stamp")), str(plain["stats"])) if whole else None


def _describes(stats: object, name: object) -> bool:
    """Whether ``stats`` is the JSON of a :class:`ShardStats` of the tar ``name``."""
    try:
        return isinstance(stats, str) and from_plain(ShardStats, parse_json(stats)).shard == name
    except ValueError:
        return False


def _check_writable(folder: Folder) -> None:
    """Check this before reading terabytes."""
    place = _progress(folder)
    try:
        place.write_atomic("started", b"")
    except StorageError as error:
        raise StorageError(
            f"{folder.uri} cannot be written, but the snapshot is stored there, in {SNAPSHOTS}/ ({error}); get write "
            f"access, or copy the samples with jobs/refresh_dataset.py webdataset --tars {folder.uri}"
        ) from error
