"""Records of a manifest: a snapshot's shards, the fields of its samples, and its provenance.

This module does no I/O: ``snapshot.py`` publishes and reads the records, ``interchange.py`` exports them to other
tools. A manifest may come from anyone: :func:`parse_manifest` checks it once, so its names are names of files in the
folder and its counts are counts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import from_plain, parse_json, require

SNAPSHOT_ID = re.compile(r"\d{5,}-[0-9a-f]{1,64}")
MOST_SAMPLES = 10**9  # in one tar
MOST_BYTES = 2**53
LONGEST_NAME = 251  # bytes; with `.tar` the 255 that file systems allow
_DIGEST = re.compile(r"[0-9a-f]{1,128}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a snapshot. ``sidecars`` maps a sidecar's name (``regions``) to the SHA-256 hex of its file.

    ``samples`` counts visible samples, ``stored`` the samples in the tar. They differ where ``selection``, the SHA-256
    (hex) of a file of positions, hides or repeats samples (see ``selection.py``). ``bytes`` and ``sha256`` are the
    tar's.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    sidecars: Mapping[str, str] = field(default_factory=dict)
    selection: str = ""
    stored: int = 0

    def __post_init__(self) -> None:
        if not self.selection:
            object.__setattr__(self, "stored", self.samples)

    @property
    def tar(self) -> str:
        """File name of the tar in the dataset's folder."""
        return f"{self.name}.tar"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An immutable version of a dataset.

    ``rows`` counts input rows, ``dropped`` the rows without a sample, by error class; ``changes`` counts differences to
    the parent, by kind. ``digest`` is the SHA-256 (hex) of shards, selections and sidecars, so two snapshots with the
    same samples have the same digest in any folder.
    """

    id: str
    digest: str
    created: str
    parent: str | None
    folder: str
    shards: tuple[Shard, ...]
    fields: tuple[str, ...]
    card: str | None
    options: Mapping[str, Any]
    rows: int
    dropped: Mapping[str, int]
    changes: Mapping[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of visible samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def uri(self) -> str:
        """The argument of :func:`~pipeline.shards.snapshot.read_snapshot` that reads exactly this snapshot."""
        return f"{self.folder}@{self.id}"


def is_file_name(name: object) -> bool:
    """Whether ``name`` is the name of a file in a folder, without a path."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME


def parse_manifest(name: str, folder: str, text: bytes, rows: Iterable[Mapping[str, Any]]) -> Snapshot:
    """The snapshot called ``name`` from the text of its json file, and from the rows of its list of shards.

    Raises:
        ValueError: a missing or unknown key, a wrong type, a count out of range, or a name that is a path.
    """
    plain = parse_json(text)
    if not isinstance(plain, dict):
        raise ValueError("no JSON object")
    plain.pop("samples", None)
    shards = tuple(_parse_shard(row) for row in rows)
    snapshot = from_plain(Snapshot, {**plain, "folder": folder, "shards": shards}, "manifest")
    require(snapshot.id == name, "id", snapshot.id, name)
    parent = snapshot.parent
    older = parent is None or (SNAPSHOT_ID.fullmatch(parent) is not None and parent < name)
    require(older, "parent", parent, "an older snapshot")
    for field_name, count in {"rows": snapshot.rows, **snapshot.dropped, **snapshot.changes}.items():
        require(0 <= count <= MOST_BYTES, field_name, count, "0 or more")
    repeated = [file for file, times in Counter(shard.tar for shard in shards).items() if times > 1]
    require(not repeated, "shards", repeated[:1], "each shard once")
    return snapshot


def _parse_shard(row: Mapping[str, Any]) -> Shard:
    """One row of the list of shards; raises ``ValueError`` as :func:`parse_manifest`."""
    texts, counts = ("name", "sha256", "sidecars", "selection"), ("samples", "bytes", "stored")
    require({*row} == {*texts, *counts}, "columns", sorted(row), ", ".join((*texts, *counts)))
    for key in texts:
        require(isinstance(row[key], str), key, row[key], "a text")
    for key in counts:
        most = MOST_BYTES if key == "bytes" else MOST_SAMPLES
        require(isinstance(row[key], int) and 0 <= row[key] <= most, key, row[key], f"0 to {most}")
    require(is_file_name(row["name"]), "name", row["name"], "the name of a file in the folder")
    sidecars = parse_json(row["sidecars"])
    require(isinstance(sidecars, dict), "sidecars", sidecars, "an object")
    for key in sidecars:
        require(key.isidentifier(), "sidecar", key, "a plain word")
    for key, digest in {"sha256": row["sha256"], "selection": row["selection"] or "0", **sidecars}.items():
        require(isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None, key, digest, "a digest in hex")
    return Shard(**{**row, "sidecars": sidecars})
