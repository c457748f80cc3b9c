"""What a refresh is asked to do, as one object that every layer of it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import flatten
from pipeline.shards.snapshot import snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.sources.source import Classed, Source
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.plan import FIRST, read_plan
from pipeline.stages.refresh.progress import Floor
from pipeline.stages.refresh.revalidation import Which
from pipeline.stages.shard_tasks import Workers

LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What a refresh takes over from the folder's newest snapshot, and what has to go."""

    parent: str | None = None
    """Snapshot to go on from: `latest`, or folder@id of the newest one; only new and changed rows are fetched."""
    opt_out: str | None = None
    """List (.txt or .parquet) of urls, url prefixes, hosts, digests or keys: hidden at once and never fetched again."""
    retry_failed: bool = False
    """Fetch again the rows whose failure may pass (time-outs, resets, 429, 5xx, names that did not resolve)."""
    revalidate: Which = "none"
    """Ask again for stored images, whose bytes may have changed behind the same url: of `known` validators (ETag or
    date) on the condition that they differ, or `all`, which fetches what has none in order to compare it."""
    purge: bool = False
    """Delete hidden samples from disk; older snapshots that show them go too."""

    @property
    def asked(self) -> bool:
        """Whether this is more than a first refresh; each of these says that the newest snapshot counts."""
        return self != Renewal()

    def begins(self, folder: Folder) -> bool:
        """Whether there is nothing to go on from, nor an opt-out list: a refresh from nothing, then."""
        opted_out = self.opt_out is not None or read_plan(folder, FIRST) is not None
        return self.parent in (None, LATEST) and not opted_out and not snapshot_ids(folder)


FROM_NOTHING = Renewal()
NO_FLOOR = Floor()


@dataclass(frozen=True, kw_only=True)
class RefreshJob:
    """One refresh: what is read, where it goes, and how."""

    source: Source
    folder: Folder
    options: ShardOptions
    workers: Workers
    card: str | None = None
    renewal: Renewal = FROM_NOTHING
    floor: Floor = NO_FLOOR

    @property
    def shaping(self) -> dict[str, Any]:
        """The options that change what a shard holds."""
        return shaping_options(self.options)

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What the snapshot records of how it was made."""
        classes = {"classes": dict(self.source.classes)} if isinstance(self.source, Classed) else {}
        return {"source": flatten(self.source), **self.shaping, **classes}


def shaping_options(options: ShardOptions) -> dict[str, Any]:
    """The options that change what a shard holds; how fast and how often to try are left out."""
    return {**flatten(options.images), "compute_hash": options.downloads.compute_hash}
