"""A small drawn snapshot, for the smoke presets of the jobs that read one."""

from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.stages.crawl.images import ImageOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers


def drawn_snapshot(folder: Folder, samples: int = 64, rows_per_shard: int = 16) -> Snapshot:
    """``samples`` drawn images of 64 pixels a side in ``folder``, made in this process; what is there is kept."""
    as_it_is = ImageOptions(resize_mode="no", skip_reencode=True)
    options = ShardOptions(images=as_it_is, number_sample_per_shard=rows_per_shard)
    source = open_source({"kind": "drawn", "samples": samples, "size": 64})
    return refresh(source, folder, options, Workers(processes_count=0), card="drawn")
