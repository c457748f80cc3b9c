#!/usr/bin/env python
"""Train GLIP, a detector of anything that words describe, on boxes with class names and on captions with boxes.

    ray job submit --working-dir . -- python jobs/pretrain_glip.py c --output-folder s3://bucket/runs/glip-c \
        --data s3://bucket/objects365=0.5,s3://bucket/flickr30k=0.2,s3://bucket/gqa=0.3

Data with classes, data with phrases and data with pseudo boxes mix in one run: see docs/grounding.md. --base CARD
leaves out the card's novel classes. --start-from FILE begins with released weights or with another run.
jobs/detect.py draws what the detector finds, jobs/evaluate.py measures it.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import base_classes
from pipeline.models.glip.config import LARGE, SMALL, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.training.checkpoint import resolved
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A GLIP, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)
    base: str = ""
    """Card whose classes, except the novel ones, are trained on, or `data` for those of the data without its novel
    ones; if empty, all classes of the data. --class-names take precedence."""


TINY = Run(
    workers=32,
    precision="bf16",
    batch_size=64,
    epochs=30,
    warmup_steps=2000,
    clip_grad_norm=1.0,
    ema_decay=0.999,
    checkpoint_activations=True,
    optimizer=AdamW(
        learning_rate=1e-4,
        first_learning_rate=1e-7,
        weight_decay=1e-4,
        beta2=0.999,
        epsilon=1e-8,
        text_rate=0.1,
        drops=(0.67, 0.89),
    ),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
    evaluate_every_steps=20_000,
)
BIG = replace(TINY, workers=64, steps=1_000_000, ema_decay=None, optimizer=replace(TINY.optimizer, weight_decay=0.01))
DRAWN = Run(
    batch_size=8,
    epochs=5,
    warmup_steps=30,
    clip_grad_norm=1.0,
    optimizer=AdamW(learning_rate=1e-3, weight_decay=1e-4, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMOKE = replace(DRAWN, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
START = Config(pretrained_backbone=True)
PRESETS = {
    "a": (
        "GLIP-T (A): no fusion; boxes with classes (Objects365).",
        Train(method=replace(START, fusion=False), run=TINY),
    ),
    "b": ("GLIP-T (B): deep fusion; boxes with classes (Objects365).", Train(method=START, run=TINY)),
    "c": ("GLIP-T (C): the same, with gold captions (Objects365, GoldG).", Train(method=START, run=TINY)),
    "t": (
        "GLIP-T: the same, with pseudo boxes of captioned images as well (the sidecar boxes).",
        Train(method=replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes")), run=TINY),
    ),
    "l": (
        "GLIP-L: Swin-L, eight blocks; more of everything.",
        Train(method=replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes"), **LARGE), run=BIG),
    ),
    "drawn": ("A small one in minutes on a core, for drawn data.", Train(method=Config(**SMALL), run=DRAWN)),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        Train(method=Config(**SMALL), run=SMOKE, base="drawn_base", draw=32),
    ),
}


def main(job: Train) -> None:
    """Resolve classes and initial weights."""
    method = replace(
        job.method,
        class_names=job.method.class_names or base_classes(job.base, job.run.data),
        start_from=resolved(job.method.start_from),
    )
    with in_place(replace(job, method=method)) as placed:
        pretrain(placed, keeps=bool(job.run.output_folder))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on from the last checkpoint, or from the beginning if there is none")
