#!/usr/bin/env python
"""Train and evaluate a linear classifier on the frozen features of a checkpoint's image tower.

    ray job submit --working-dir . -- python jobs/linear_probe.py drawn --checkpoint s3://bucket/runs/first
    python jobs/linear_probe.py imagenet --checkpoint FOLDER --data imagenet=s3://bucket/train --test s3://bucket/val
    python jobs/linear_probe.py sets --checkpoint FOLDER --data SHARDS --label cls

For checkpoint addresses see jobs/evaluate.py. Without --test a part of each class is held out. Metrics are named
linear_probe/SET/top1; with --run-id they are added to that MLflow run, --track creates a new run.
"""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_file
from pipeline.evaluation.linear_probe import REPORT, Probe, ProbeSets, linear_probe
from pipeline.evaluation.models import load_any, trained_steps, usable_device
from pipeline.evaluation.report import table, write_result
from pipeline.tracking.runs import Tracking, open_tracker

DRAWN = (
    *("drawn_shapes", "drawn_colours", "drawn_textures", "drawn_styles", "drawn_fine_grained", "drawn_counting"),
    *("drawn_relations", "drawn_aerial", "drawn_digits", "drawn_digits_real"),
)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """One model, some sets."""

    checkpoint: str
    """Folder of a checkpoint or a run (path or URI), ARCHITECTURE:TAG, ARCHITECTURE:FILE, or ARCHITECTURE:untrained."""
    sets: ProbeSets = field(default_factory=ProbeSets)
    probe: Probe = field(default_factory=Probe)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""
    output: str = ""
    """JSON file for the metrics: a path or a URI."""
    run_id: str = ""
    """MLflow run to which the metrics are added."""
    step: int | None = None
    """Step of the logged metrics; none for the checkpoint's own."""
    track: bool = False
    """Create a new MLflow run for this probe."""
    tracking: Tracking = field(default_factory=lambda: Tracking(system_metrics=False))

    def __post_init__(self) -> None:
        require(not (self.track and self.run_id), "run_id", self.run_id, "either --run-id or --track")
        require(self.step is None or self.step >= 0, "step", self.step, "0 or more")


PRESETS: dict[str, tuple[str, LinearProbe]] = {
    "drawn": (
        "The small sets of the embedded world, each with its labelled pool.",
        LinearProbe(checkpoint=tyro.MISSING, sets=ProbeSets(data=DRAWN)),
    ),
    "imagenet": (
        "SLIP's protocol, for the sets that --data and --test name.",
        LinearProbe(checkpoint=tyro.MISSING, probe=Probe(protocol="slip")),
    ),
    "sets": ("CLIP's protocol, for the sets that --data and --test name.", LinearProbe(checkpoint=tyro.MISSING)),
    "smoke": (
        "An untrained model on a few drawn samples.",
        LinearProbe(
            checkpoint="clipmill-tiny:untrained",
            sets=ProbeSets(data=("drawn_colours",), train_samples=64, test_samples=32),
            probe=Probe(iterations=30),
        ),
    ),
}


def main(run: LinearProbe) -> None:
    """Wire model, sets and tracker; checks all settings before the model is loaded."""
    require(bool(run.sets.data), "data", (), "at least one set: --data with a dataset card or a folder")
    output = writable_file("output", run.output) if run.output else ""
    prepared = run.sets.prepare()
    usable_device(run.device)
    step = trained_steps(run.checkpoint) if run.step is None else run.step
    with open_tracker(run.tracking, run, run_id=run.run_id, new=run.track) as tracker:
        metrics = linear_probe(load_any(run.checkpoint, run.device), prepared, run.sets.settings(), run.probe)
        tracker.log(metrics, step or 0)
        tracker.describe(table(metrics, [REPORT]), run.checkpoint)
    print(table(metrics, [REPORT]))
    if output:
        write_result(output, metrics, {"checkpoint": run.checkpoint, "step": step})


if __name__ == "__main__":
    run_job(PRESETS, main)
