"""Snapshots: immutable manifests of a dataset's folder.

``{folder}/_snapshots/{id}.shards.parquet`` lists the shards with counts, bytes and digests. ``{id}.json`` holds the
other metadata; it is written last and is the commit mark. A reader sees a whole snapshot or none. The id starts with a
number, so the latest is the last in order, and ends with the digest of its content.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SnapshotError
from pipeline.shards.interchange import delete_indexes, write_indexes
from pipeline.shards.manifest import SNAPSHOT_ID, parse_manifest
from pipeline.shards.manifest import Shard as Shard
from pipeline.shards.manifest import Snapshot as Snapshot
from pipeline.shards.parquet import parse_parquet
from pipeline.shards.storage import Folder
from pipeline.shards.writer import ShardStats

SNAPSHOTS = "_snapshots"
ID_DIGITS = 5
DIGEST_LENGTH = 12


def publish(
    folder: Folder,
    stats: Iterable[ShardStats],
    *,
    card: str | None,
    options: Mapping[str, Any],
) -> Snapshot:
    """Publish the shards that ``stats`` describe as the folder's newest snapshot; the latest one becomes its parent.

    If any snapshot, even an older one, has the same content, nothing is written: later snapshots made from it (by a
    refresh, a filter) stay the newest. The index files for other tools are written with it (see ``interchange.py``).

    Raises:
        SnapshotError: no sample in any shard.
        StorageError: the file system or store failed, or another job took the folder's lease.
    """
    folder.check()
    done = sorted(stats, key=lambda one: one.shard)
    shards = tuple(
        Shard(name=one.shard, samples=one.successes, bytes=one.bytes, sha256=one.sha256)
        for one in done
        if one.successes
    )
    dropped: Counter[str] = Counter()
    for one in done:
        dropped.update(one.reasons)
    if not shards:
        messages: Counter[str] = Counter()
        for one in done:
            messages.update({text: times for text, times in one.status_dict.items() if text != "success"})
        often = "".join(f"; most often: {text}" for text, _ in messages.most_common(1))
        raise SnapshotError(f"{folder.uri}: no row became a sample: {reasons_in_words(dropped)}{often}")
    published = _with_digest(folder, _digest(shards))
    if published is not None:
        return published
    fields = sorted({name for one in done for name in one.fields})
    return publish_shards(
        folder,
        shards,
        fields=tuple(fields),
        card=card,
        options=options,
        rows=sum(one.count for one in done),
        dropped=dict(dropped),
    )


def reasons_in_words(dropped: Mapping[str, int]) -> str:
    """``dns 12, policy 1``, the most frequent first; for no rows at all, that there were none."""
    most = sorted(dropped.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{reason} {count}" for reason, count in most) or "the source has no rows"


def publish_shards(
    folder: Folder,
    shards: tuple[Shard, ...],
    *,
    fields: tuple[str, ...],
    card: str | None,
    options: Mapping[str, Any],
    rows: int,
    dropped: Mapping[str, int],
    changes: Mapping[str, int] | None = None,
    parent: str | None = None,
    always: bool = False,
) -> Snapshot:
    """Publish a list of shards, for jobs that add sidecars or hide samples; otherwise as :func:`publish`.

    ``parent`` is the id of the snapshot that they were made from, if not the latest. Nothing is written if the latest
    snapshot has the same content. With ``always`` a snapshot is written anyway, for changes that are not in the shards,
    such as rows that failed again.
    """
    folder.check()
    digest = _digest(shards)
    ids = snapshot_ids(folder)
    if ids and ids[-1].endswith(digest[:DIGEST_LENGTH]) and not always:
        return read_snapshot(folder.uri)
    number = int(ids[-1].split("-")[0]) + 1 if ids else 0
    snapshot = Snapshot(
        id=f"{number:0{ID_DIGITS}d}-{digest[:DIGEST_LENGTH]}",
        digest=digest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parent=parent or (ids[-1] if ids else None),
        folder=folder.uri,
        shards=shards,
        fields=fields,
        card=card,
        options=dict(options),
        rows=rows,
        dropped=dict(dropped),
        changes=dict(changes or {}),
    )
    _write(folder, snapshot)
    return snapshot


def snapshot_ids(folder: Folder) -> list[str]:
    """The ids of a folder's whole snapshots, oldest first; other JSON files are left out."""
    names = (name.removesuffix(".json") for name in folder.folder(SNAPSHOTS).names(".json"))
    return [name for name in names if SNAPSHOT_ID.fullmatch(name)]


def read_snapshot(uri: str) -> Snapshot:
    """The latest snapshot of the folder ``uri``, or the one pinned by ``folder@id``.

    Raises:
        SnapshotError: there is none, or its manifest is broken.
    """
    place, _, wanted = uri.rpartition("@") if "@" in uri.rsplit("/", 1)[-1] else (uri, "", "")
    folder = Folder(place)
    ids = snapshot_ids(folder)
    if not ids:
        raise SnapshotError(f"{place} has no snapshot; make one with jobs/refresh_dataset.py --output-folder {place}")
    name = wanted or ids[-1]
    if name not in ids:
        raise SnapshotError(f"{place} has no snapshot {name}; it has {', '.join(ids[-5:])}")
    return _read(folder, name)


def _with_digest(folder: Folder, digest: str) -> Snapshot | None:
    ids = [name for name in snapshot_ids(folder) if name.endswith(digest[:DIGEST_LENGTH])]
    return _read(folder, ids[-1]) if ids else None


def delete_snapshot(folder: Folder, name: str) -> None:
    """Delete the manifest of one snapshot, commit mark first; does nothing where it is missing."""
    manifests = folder.folder(SNAPSHOTS)
    manifests.delete(f"{name}.json")
    manifests.delete(f"{name}.shards.parquet")
    delete_indexes(folder, name)


def _digest(shards: tuple[Shard, ...]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        parts = [shard.name, str(shard.samples), shard.sha256]
        parts += [f"selection={shard.selection}"] if shard.selection else []
        parts += [f"{name}={value}" for name, value in sorted(shard.sidecars.items())]
        digest.update(("\t".join(parts) + "\n").encode())
    return digest.hexdigest()


def _write(folder: Folder, snapshot: Snapshot) -> None:
    manifests = folder.folder(SNAPSHOTS)
    plain = [{**vars(shard), "sidecars": json.dumps(shard.sidecars)} for shard in snapshot.shards]
    table = BytesIO()
    pq.write_table(pa.Table.from_pylist(plain), table)
    manifests.write_atomic(f"{snapshot.id}.shards.parquet", table.getvalue())
    write_indexes(folder, snapshot, table.getvalue())
    rest = {name: value for name, value in vars(snapshot).items() if name not in ("shards", "folder")}
    rest["samples"] = snapshot.samples
    manifests.write_atomic(f"{snapshot.id}.json", json.dumps(rest, indent=2).encode())


def _read(folder: Folder, name: str) -> Snapshot:
    manifests = folder.folder(SNAPSHOTS)
    try:
        rows = parse_parquet(manifests.read_bytes(f"{name}.shards.parquet")).to_pylist()
        snapshot = parse_manifest(name, folder.uri, manifests.read_bytes(f"{name}.json"), rows)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{manifests.join(name + '.json')} is not a whole snapshot ({error})") from error
    if _digest(snapshot.shards) != snapshot.digest:
        raise SnapshotError(f"{manifests.join(name + '.json')}: the list of shards does not match its digest")
    return snapshot
