#!/usr/bin/env python
"""Train a class-agnostic region proposer on the boxes of base classes, for jobs/extract_region_features.py.

    ray job submit --working-dir . -- python jobs/train_proposer.py paper --data s3://bucket/lvis-train \
        --base data --output-folder s3://bucket/runs/proposer

Objects of other classes are ignored, but their images are used. This is as in the paper, and makes novel classes hard
to detect.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import OF_DATA, base_classes
from pipeline.models.proposals import SMALL, Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW, Sgd
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A proposer and its training data."""

    method: Config = field(default_factory=Config)
    base: str = ""
    """Card whose classes, except the novel ones, are the base classes, or `data` for the snapshot's own classes;
    --class-names take precedence; without either, objects of all classes."""


GPUS = Cluster(accelerator="gpu", cpus_per_worker=10)
PAPER = Run(
    workers=64,
    precision="bf16",
    batch_size=256,
    steps=180_000,
    warmup_steps=1000,
    optimizer=Sgd(learning_rate=0.32, first_learning_rate=0.0032, weight_decay=4e-5, drops=(0.9, 0.95)),
    cluster=GPUS,
    loader=LoaderConfig(loader_workers=8),
)
ONE_NODE = replace(
    PAPER,
    workers=8,
    batch_size=64,
    steps=36_000,
    optimizer=Sgd(learning_rate=0.08, weight_decay=4e-5, drops=(0.8, 0.95)),
)
DRAWN = Run(
    batch_size=16,
    epochs=4,
    warmup_steps=30,
    clip_grad_norm=5.0,
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMOKE = replace(DRAWN, batch_size=8, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
SMALLEST = Config(**SMALL)
PRESETS = {
    "paper": ("ViLD's recipe on LVIS: 180,000 steps of 256 images.", Train(run=PAPER, base=OF_DATA)),
    "coco": ("The same for COCO's 48 base classes.", Train(run=PAPER, base="coco_ovd_base")),
    "one-node": ("LVIS on eight GPUs.", Train(run=ONE_NODE, base=OF_DATA)),
    "drawn": (
        "A small proposer in minutes on a core, for drawn data.",
        Train(method=SMALLEST, run=DRAWN, base="drawn_base"),
    ),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        Train(method=SMALLEST, run=SMOKE, base="drawn_base", draw=32),
    ),
}


def main(job: Train) -> None:
    """Resolve the class names and train."""
    named = job.method.class_names or base_classes(job.base, job.run.data)
    run_pretraining(replace(job, method=replace(job.method, class_names=named)))


if __name__ == "__main__":
    run_job(PRESETS, main)
