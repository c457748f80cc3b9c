#!/usr/bin/env python
"""Tune a trained GLIP on another data set with boxes: all weights, a prompt, or the last layers.

    ray job submit --working-dir . -- python jobs/finetune_glip.py prompt --start-from s3://bucket/runs/glip \
        --data s3://bucket/aquarium --shots 5 --detection aquarium=s3://bucket/aquarium-test --output-folder s3://bucket/runs/tuned

--shots takes a few images of every class. --start-from is a run, a checkpoint or a file of released weights; the flags
of its network are those of jobs/pretrain_glip.py. Prompts name all classes of the data in their order.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import require, run_job, writable_folder
from pipeline.loaders.classes import OF_DATA, dataset_classes
from pipeline.loaders.grounding import GroundingOptions
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models.glip import Config
from pipeline.models.glip.config import SMALL as SMALL_NETWORK
from pipeline.models.glip.tuning import check_names
from pipeline.runs.few_shot_boxes import few_shot_snapshot
from pipeline.runs.grounding import SMALL, SMOKE, TINY
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import resolved
from pipeline.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Finetune(Pretraining):
    """A trained GLIP, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)
    card: str = ""
    """Dataset card with the classes of data that do not name theirs."""
    shots: int = 0
    """Images of every class to train on; 0 for all images. Few images need more epochs or --steps."""
    shot_seed: int = 3
    """Seed of the choice of images."""


FIXED = GroundingOptions(fixed_prompts=True)
FULL = replace(
    TINY,
    workers=4,
    batch_size=4,
    epochs=24,
    warmup_steps=0,
    ema_decay=None,
    optimizer=replace(TINY.optimizer, first_learning_rate=0.0, weight_decay=0.05),
    evaluate_every_steps=None,
)
PROMPT = replace(FULL, optimizer=replace(FULL.optimizer, learning_rate=0.05, weight_decay=0.25, text_rate=None))
LINEAR = replace(FULL, optimizer=replace(FULL.optimizer, text_rate=None))
FEW = replace(SMALL, batch_size=4, epochs=40, warmup_steps=0, log_every_steps=10)


def drawn(run: Run, **settings: Any) -> Finetune:
    """The tuning of a small GLIP of drawn data, with the rates of ``run``."""
    return Finetune(
        method=Config(**SMALL_NETWORK, grounding=FIXED, **settings),
        run=replace(FEW, optimizer=run.optimizer),
        card="drawn",
    )


PRESETS = {
    "full": (
        "All weights but the lowest two stages of the backbone.",
        Finetune(method=Config(grounding=FIXED, frozen_stages=2), run=FULL),
    ),
    "prompt": (
        "A table that is added to the text's features; for models with fusion.",
        Finetune(method=Config(grounding=FIXED, tuning="prompt"), run=PROMPT),
    ),
    "linear": (
        "The last layers: boxes, centerness, and the product of pixels and tokens.",
        Finetune(method=Config(grounding=FIXED, tuning="linear"), run=LINEAR),
    ),
    "drawn-full": ("Full tuning of a small GLIP of drawn data.", drawn(FULL, frozen_stages=2)),
    "drawn-prompt": ("Prompt tuning of a small GLIP of drawn data.", drawn(PROMPT, tuning="prompt")),
    "drawn-linear": ("Linear tuning of a small GLIP of drawn data.", drawn(LINEAR, tuning="linear")),
    "smoke": (
        "Three steps of a prompt for a small GLIP with random weights, on 2 shots of 32 drawn samples.",
        replace(
            drawn(PROMPT, tuning="prompt"),
            run=replace(SMOKE, batch_size=4, warmup_steps=0, optimizer=PROMPT.optimizer),
            draw=32,
            shots=2,
        ),
    ),
}


def main(job: Finetune) -> None:
    """Resolve classes, initial weights and the few images, then tune."""
    require(job.shots >= 0, "shots", job.shots, "0 or more")
    known = bool(job.method.start_from) or bool(job.draw)
    require(known, "start_from", "", "a run, a checkpoint or a file of weights: only a trained GLIP is tuned")
    with in_place(job) as placed:
        settled = replace(placed, method=with_classes(placed))
        pretrain(with_shots(settled), keeps=bool(job.run.output_folder))


def with_classes(job: Finetune) -> Config:
    """The method with the names of the classes, its initial weights resolved."""
    require(bool(job.run.data), "data", job.run.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
    listed = dataset_classes(job.card or OF_DATA, job.run.data)
    names = job.method.class_names or tuple(dict.fromkeys(name for some in listed for name in some))
    require(bool(names), "class_names", names, "names of the classes, or a --card with them: the data have none")
    if job.method.tuning == "prompt":
        check_names(job.method, names, SpanTokenizer.load(job.method.text))
    return replace(job.method, class_names=names, start_from=resolved(job.method.start_from))


def with_shots(job: Finetune) -> Finetune:
    """The job on a snapshot of few images in its output folder, if it has shots."""
    if not job.shots:
        return job
    stored = job.method.grounding.pseudo_boxes
    require(not stored, "pseudo_boxes", stored, "none with shots")
    output = Folder(writable_folder("output_folder", job.run.output_folder))
    few = few_shot_snapshot(job.run.data, job.method.class_names, job.shots, job.shot_seed, output)
    return replace(job, run=replace(job.run, data=few.uri))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on from the last checkpoint, or from the beginning if there is none")
