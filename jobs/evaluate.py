#!/usr/bin/env python
"""Evaluate a checkpoint: zero-shot classification, image-text retrieval, and detection.

    ray job submit --working-dir . -- python jobs/evaluate.py drawn --checkpoint s3://bucket/runs/first
    python jobs/evaluate.py imagenet --checkpoint ViT-B-32:laion2b_s34b_b79k --zero-shot imagenet=s3://bucket/val
    python jobs/evaluate.py sets --checkpoint FOLDER --retrieval SHARDS --output result.json
    python jobs/evaluate.py sets --checkpoint VILD --detection coco=SHARDS --detection-words coco_ovd_all

A checkpoint is one of our folders (for a run: its newest checkpoint), an open_clip architecture with a pretrained tag
or file, or ARCHITECTURE:untrained for random weights. A set is a dataset card or the folder of a snapshot. With
--run-id the metrics are added to that MLflow run, at the checkpoint's step or --step; --track creates a new run for
them.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.evaluation.models import trained_steps
from pipeline.evaluation.report import table, write_result
from pipeline.evaluation.suite import Evaluations
from pipeline.runs.evaluate import evaluate_checkpoint
from pipeline.tracking.runs import Tracking, open_tracker

DRAWN = (
    *("drawn_shapes", "drawn_unseen_style", "drawn_rare", "drawn_novel", "drawn_seen_pairs", "drawn_held_out_pairs"),
    *("drawn_colours", "drawn_textures", "drawn_styles", "drawn_fine_grained", "drawn_counting", "drawn_relations"),
    *("drawn_aerial", "drawn_digits", "drawn_digits_real"),
)
STAMPS = ("tuxpaint_stamps",)
FEW = Evaluations(zero_shot=("drawn_shapes",), retrieval=("drawn_val",), evaluation_samples=48)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """One model, some sets."""

    checkpoint: str
    """Folder of a checkpoint or a run (path or URI), ARCHITECTURE:TAG, ARCHITECTURE:FILE, or ARCHITECTURE:untrained."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses a GPU if available."""
    output: str = ""
    """JSON file for the metrics: a path or a URI."""
    run_id: str = ""
    """MLflow run to which metrics and figures are added."""
    step: int | None = None
    """Step of the logged metrics; none for the checkpoint's own."""
    track: bool = False
    """Create a new MLflow run for this evaluation."""
    tracking: Tracking = field(default_factory=lambda: Tracking(system_metrics=False))

    def __post_init__(self) -> None:
        require(not (self.track and self.run_id), "run_id", self.run_id, "either --run-id or --track")
        require(self.step is None or self.step >= 0, "step", self.step, "0 or more")


PRESETS: dict[str, tuple[str, Evaluate]] = {
    "drawn": (
        "The small sets of the embedded world, 500 samples of each.",
        Evaluate(
            checkpoint=tyro.MISSING,
            evaluations=Evaluations(zero_shot=DRAWN, retrieval=("drawn_val",), evaluation_samples=500),
        ),
    ),
    "stamps": (
        "The Tux Paint stamps: their folders as classes, their sentences for retrieval.",
        Evaluate(checkpoint=tyro.MISSING, evaluations=Evaluations(zero_shot=STAMPS, retrieval=STAMPS)),
    ),
    "imagenet": (
        "ImageNet's 1,000 classes with CLIP's 80 prompts; --zero-shot imagenet=FOLDER names the shards.",
        Evaluate(checkpoint=tyro.MISSING, evaluations=Evaluations(classes="imagenet", templates="imagenet")),
    ),
    "sets": ("The sets that --zero-shot, --retrieval and --detection name.", Evaluate(checkpoint=tyro.MISSING)),
    "smoke": (
        "An untrained model on a few drawn samples.",
        Evaluate(checkpoint="clipmill-tiny:untrained", evaluations=FEW),
    ),
}


def main(run: Evaluate) -> None:
    """Wire model, sets and tracker; checks all settings before the model is loaded."""
    run = replace(run, evaluations=with_used_settings(run.evaluations))
    sets = run.evaluations.sets()
    require(
        bool(sets),
        "sets",
        (),
        "at least one set: --zero-shot, --retrieval or --detection with a dataset card or a folder",
    )
    output = writable_folder("output", run.output) if run.output else ""
    prepared = run.evaluations.prepare()
    step = trained_steps(run.checkpoint) if run.step is None else run.step
    with open_tracker(run.tracking, run, run_id=run.run_id, new=run.track) as tracker:
        metrics = evaluate_checkpoint(
            run.checkpoint, run.evaluations, tracker.handle, step or 0, device=run.device, prepared=prepared
        )
    print(table(metrics))
    if output:
        write_result(output, metrics, {"checkpoint": run.checkpoint, "step": step})


def with_used_settings(evaluations: Evaluations) -> Evaluations:
    """Drop the settings of the preset `imagenet` that its sets do not use: the user did not type them."""
    takers = {"templates": ("zero_shot",), "classes": ("zero_shot", "classification")}
    unused = [
        name
        for name, kinds in takers.items()
        if getattr(evaluations, name) == "imagenet" and not any(getattr(evaluations, kind) for kind in kinds)
    ]
    return replace(evaluations, **dict.fromkeys(unused, "auto"))


if __name__ == "__main__":
    run_job(PRESETS, main)
