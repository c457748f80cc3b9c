"""A small drawn snapshot, a drawn image, and two optimised ones, for smoke presets and for jobs without data."""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.loaders.images import Pixels, decode, image_at
from pipeline.runs.drawing_report import SCORES, scores_parquet
from pipeline.runs.drawings import DrawingRunner, SubjectSource, parse_drawing_spec, plan_drawings, run_drawings
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


def drawn_drawings(folder: Folder) -> None:
    """Images of two prompts by an untrained CLIP in ``folder``, as jobs/draw_prompts.py leaves them; kept if there."""
    options = "clips=[clipmill-tiny:untrained],strokes=6,side=64,views=1,loop.steps=2,loop.evaluate_every=2"
    spec = parse_drawing_spec(f"clipdraw:{options}")
    subjects = {text: SubjectSource(text) for text in ("a red star", "a blue disc")}
    runner = DrawingRunner(
        specs={spec.text: spec}, subjects=subjects, judge="clipmill-small:untrained", output=folder.uri, device="cpu"
    )
    units = plan_drawings([spec], list(subjects.values()), [1])
    folder.write_atomic(SCORES, scores_parquet(run_drawings(runner, units, IN_PROCESS)))
