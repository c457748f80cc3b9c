"""What a manifest says of a snapshot: its shards, its samples' fields, and how it was made.

Plain records without input or output; ``snapshot.py`` publishes and reads them, ``interchange.py`` describes them to
other tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a snapshot. ``sidecars`` maps a sidecar's name (``regions``) to the SHA-256 hex of its file.

    ``samples`` counts what readers see, ``stored`` what the tar holds. They differ where ``selection``, the SHA-256
    hex of a file of positions, hides or repeats some (see ``selection.py``); ``bytes`` and ``sha256`` are the tar's.
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
        """File name of the tar in the data set's folder."""
        return f"{self.name}.tar"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What readers see of a data set.

    ``rows`` counts input rows, ``dropped`` those that became no sample, by error class; ``changes`` tells what differs
    from the parent, by kind. ``digest`` is the SHA-256 hex of shards, selections and sidecars, so two snapshots with
    the same samples have the same digest wherever they lie.
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
        """Number of samples that readers see."""
        return sum(shard.samples for shard in self.shards)

    @property
    def uri(self) -> str:
        """What :func:`~pipeline.shards.snapshot.read_snapshot` takes to read this very snapshot again."""
        return f"{self.folder}@{self.id}"
