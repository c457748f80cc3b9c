"""Records of a manifest: a snapshot's shards, the fields of its samples, and its provenance.

This module does no I/O: ``snapshot.py`` publishes and reads the records, ``interchange.py`` exports them to other
tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
