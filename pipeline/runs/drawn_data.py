"""A small drawn snapshot and a drawn image, for smoke presets and for jobs without given data."""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.loaders.images import Pixels, decode, image_at
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.drawn.sample import draw_sample
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

DRAWN_IMAGE = "drawn://val/0/0"
IN_PROCESS = Workers(processes_count=0)


def drawn_snapshot(
    folder: Folder,
    samples: int = 64,
    rows_per_shard: int = 16,
    workers: Workers = IN_PROCESS,
    card: str | None = "drawn",
    more: Mapping[str, object] | None = None,
) -> Snapshot:
    """``samples`` drawn images of 64 pixels a side in ``folder``; existing data are kept.

    ``more`` are further options of the source ``drawn``, such as ``sound``.
    """
    options = replace(AS_IT_IS, number_sample_per_shard=rows_per_shard)
    source = open_source({"kind": "drawn", "samples": samples, "size": 64, **(more or {})})
    return refresh(source, folder, options, workers, card=card)


def read_image(place: str) -> Pixels:
    """The image at ``place``; ``DRAWN_IMAGE`` is drawn. Raises as :func:`pipeline.loaders.images.image_at`."""
    return decode(draw_sample("val", 0, 0, 128).image) if place == DRAWN_IMAGE else image_at(place)
