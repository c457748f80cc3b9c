#!/usr/bin/env python
"""Compute CLIP features of the regions of every image, as a sidecar for the training of ViLD's image branch.

    ray job submit --working-dir . -- python jobs/extract_region_features.py proposals \
        --data s3://bucket/lvis-train --teacher ViT-B-32-quickgelu:openai --proposer s3://bucket/runs/rpn

Each shard gets its own file and is processed once: the same command resumes. The job checks the features of regions
that cover an annotated object against the class names (--classes: a card, the data's classes, or none). It logs the
part that is right for every shard and as a metric. Below --floor, or if hardly any object is covered, the job stops.
"""

import getpass
import tempfile
from dataclasses import asdict, dataclass, field

import tyro

from pipeline.config import require, run_job
from pipeline.evaluation.regions import LoadRegionModel, ProposerOptions
from pipeline.loaders.classes import NO_CLASSES, OF_DATA, base_classes
from pipeline.models.detections import check_words
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.regions import RegionOptions, extract_regions, judge, read_found, together
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking, open_tracker

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/regions"


@dataclass(frozen=True, kw_only=True)
class Extract:
    """One snapshot, one teacher, one proposer."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    model: LoadRegionModel
    classes: str = OF_DATA
    """Card whose class names, except the novel ones, check the features; `data` for the snapshot's own classes, `none`
    for no check."""
    options: RegionOptions = field(default_factory=RegionOptions)
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Log the results to MLflow."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(
            experiment="clipmill-data", primary_metric="regions/accuracy", system_metrics=False
        )
    )

    def __post_init__(self) -> None:
        require(bool(self.data), "data", self.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
        require(bool(self.classes), "classes", self.classes, f"a card, `{OF_DATA}` or `{NO_CLASSES}`")


@dataclass(frozen=True, kw_only=True)
class Smoke(Extract):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, Extract]] = {
    "boxes": (
        "Features of the boxes in the data.",
        Extract(data=tyro.MISSING, model=LoadRegionModel(teacher=tyro.MISSING)),
    ),
    "proposals": (
        "Features of 300 proposals per image: ViLD's setting.",
        Extract(
            data=tyro.MISSING,
            model=LoadRegionModel(teacher=tyro.MISSING, proposer=ProposerOptions(proposer=tyro.MISSING)),
        ),
    ),
    "smoke": (
        "Sixty-four drawn samples by an untrained model, in this process.",
        Smoke(
            data=f"{SMOKE}/data",
            model=LoadRegionModel(teacher="clipmill-tiny:untrained"),
            classes="drawn_base",
            options=RegionOptions(floor=0.0),
            workers=Workers(processes_count=0),
            track=False,
        ),
    ),
}


def main(run: Extract) -> None:
    """Wire snapshot, models, check and tracker."""
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    classes, options = base_classes(run.classes, run.data, "classes"), run.options
    if classes:
        check_words(classes)
    use_gpu = None if run.model.device == "auto" else run.model.device == "cuda"
    with open_tracker(run.tracking, run, new=run.track) as tracker:
        snapshot = extract_regions(read_snapshot(run.data), run.model, classes, options, run.workers, use_gpu)
        tracker.log_dataset(snapshot, "regions")
        shards = [shard for shard in snapshot.shards if options.name in shard.sidecars]
        found = [read_found(Folder(snapshot.folder), shard, options.name) for shard in shards]
        for number, one in enumerate(found):
            checked = {"accuracy": one.check.accuracy, "matched": one.check.matched}
            tracker.log({f"regions/shard_{name}": value for name, value in checked.items()}, number)
        whole, count = together(found, classes), sum(one.regions for one in found)
        metrics = {"accuracy": whole.accuracy, **asdict(whole), "count": count}
        tracker.log({f"regions/{name}": value for name, value in metrics.items()}, len(found))
        print(f"{snapshot.uri}: {count} regions of {sum(shard.stored for shard in shards)} images")
        if whole.objects:
            print(whole)
        judge(whole, options, snapshot.uri)


if __name__ == "__main__":
    run_job(PRESETS, main)
