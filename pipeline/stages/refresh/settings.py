"""The settings of a refresh, as one object for all its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import flatten
from pipeline.shards.snapshot import snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.sources.source import Classed, Source, media_of
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.plan import FIRST, read_plan
from pipeline.stages.refresh.progress import Floor
from pipeline.stages.refresh.revalidation import Which
from pipeline.stages.shard_tasks import Workers

LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """Options for a refresh of the folder's newest snapshot."""

    parent: str | None = None
    """Snapshot to refresh: `latest`, or folder@id of the newest one; only new and changed rows are fetched."""
    opt_out: str | None = None
    """List (.txt or .parquet) of urls, url prefixes, hosts, digests or keys to hide and never to fetch again."""
    retry_failed: bool = False
    """Fetch rows with transient failures again (time-outs, resets, 429, 5xx, names that did not resolve)."""
    revalidate: Which = "none"
    """Check whether stored images have changed at their urls: `known` sends conditional requests for images with
    validators (ETag or date); `all` also downloads images without validators, to compare them."""
    purge: bool = False
    """Delete hidden samples from disk, and the older snapshots that show them."""

    @property
    def asked(self) -> bool:
        """Whether an option requires an existing snapshot."""
        return self != Renewal()

    def begins(self, folder: Folder) -> bool:
        """Whether there is neither a parent snapshot nor an opt-out list."""
        opted_out = self.opt_out is not None or read_plan(folder, FIRST) is not None
        return self.parent in (None, LATEST) and not opted_out and not snapshot_ids(folder)


FROM_NOTHING = Renewal()
NO_FLOOR = Floor()


@dataclass(frozen=True, kw_only=True)
class RefreshJob:
    """One refresh: source, output folder and options."""

    source: Source
    folder: Folder
    options: ShardOptions
    workers: Workers
    card: str | None = None
    renewal: Renewal = FROM_NOTHING
    floor: Floor = NO_FLOOR

    @property
    def shaping(self) -> dict[str, Any]:
        """The options that change the content of a shard."""
        return shaping_options(self.options, media_of(self.source))

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The options recorded in the snapshot."""
        classes = {"classes": dict(self.source.classes)} if isinstance(self.source, Classed) else {}
        return {"source": flatten(self.source), **self.shaping, **classes}


def shaping_options(options: ShardOptions, media: Sequence[str]) -> dict[str, Any]:
    """The options that change the content of a shard with parts of ``media``, without rate limits and retries.

    Options of images are always among them, as in snapshots that were made before there were other media.
    """
    several = {"failed_part": options.failed_part} if len(media) > 1 else {}
    found = {name: value for medium in ("image", *media) for name, value in flatten(options.media.of(medium)).items()}
    return {**found, "compute_hash": options.downloads.compute_hash, **several}
