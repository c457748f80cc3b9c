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
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import require
from pipeline.errors import DataError, SnapshotError, StorageError
from pipeline.shards.lease import lease
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.snapshot import SNAPSHOTS, Shard, Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import BLOCK, Folder, file_stamp
from pipeline.shards.tar import iterate_tar
from pipeline.shards.text import parse_json
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
        if progress.exists(f"{name}.json"):
            before = json.loads(progress.read_bytes(f"{name}.json"))
            if before["stamp"] == stamp:
                return str(before["stats"])
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
        with lease(self.folder, "an adoption"):
            snapshot = self._publish(stats, card)
            self._remember({name: text for name, (_, text) in good.items()})
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
        progress = _progress(self.folder)
        if progress.fs.exists(progress.path):
            progress.fs.rm(progress.path, recursive=True)


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
    fields: set[str] = set()
    samples = 0
    with folder.open(f"{name}.tar") as file:
        hashed = _Hashed(file)
        for sample in iterate_tar(hashed, uri):  # type: ignore[arg-type]
            fields.update(sample.fields)
            samples += 1
        while hashed.read(BLOCK):
            pass
    if hashed.compression:
        raise DataError(
            f"{uri} is compressed with {hashed.compression}; jobs/refresh_dataset.py webdataset reads those"
        )
    plain = _stats(folder, name)
    if plain.get("successes", samples) != samples:
        raise DataError(f"{uri} holds {samples} samples, {name}{STATS} says {plain['successes']}")
    failures = {status: int(plain.get(status, 0)) for status in ("failed_to_download", "failed_to_resize")}
    return ShardStats(
        shard=name,
        count=int(plain.get("count", samples)),
        successes=samples,
        **failures,
        duration=float(plain.get("duration", 0)),
        start_time=float(plain.get("start_time", 0)),
        end_time=float(plain.get("end_time", 0)),
        status_dict={},
        unit="",
        bytes=hashed.count,
        sha256=hashed.digest.hexdigest(),
        fields=tuple(sorted(fields)),
        reasons=dict(+Counter(failures)),
    )


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
    return plain if isinstance(plain, dict) else {}


def _stamp(folder: Folder, name: str) -> str:
    """Version stamp of the tar: its size with its modification time, or the store's ETag."""
    return file_stamp(folder.info(f"{name}.tar"))


def _progress(folder: Folder) -> Folder:
    return folder.folder(SNAPSHOTS).folder(PROGRESS)


def _known(folder: Folder) -> dict[str, tuple[str, str]]:
    try:
        rows = parse_parquet(folder.folder(SNAPSHOTS).read_bytes(KNOWN)).to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}
    return {row["name"]: (row["stamp"], row["stats"]) for row in rows}


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
