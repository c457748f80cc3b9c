#!/usr/bin/env python
"""Train ViLD, an open-vocabulary detector, on boxes of base classes and on CLIP's features of stored regions.

    ray job submit --working-dir . -- python jobs/train_vild.py lvis --data s3://bucket/lvis-train \
        --teacher ViT-B-32-quickgelu:openai --output-folder s3://bucket/runs/vild

jobs/extract_region_features.py computes the regions' features, with the same teacher; --mode text and --mode supervised
do not need them. --start-from RUN initialises the network with a proposer (jobs/train_proposer.py); the paper starts
from random weights. jobs/detect.py draws detections, jobs/evaluate.py measures them.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.dataset import load_card
from pipeline.evaluation.classes import read_templates
from pipeline.evaluation.regions import LoadRegionModel, ProposerOptions
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import OF_DATA, base_classes
from pipeline.models.proposals import SMALL
from pipeline.models.vild import DISTILLED, SMALL_HEADS, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.snapshot import read_snapshot
from pipeline.stages.annotate.regions import RegionOptions, extract_regions
from pipeline.stages.shard_tasks import Workers
from pipeline.training.checkpoint import clip_address, resolved
from pipeline.training.optimizer import AdamW, Sgd
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A ViLD, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)
    base: str = ""
    """Card whose classes, except the novel ones, are the base classes, or `data` for the snapshot's own classes;
    --class-names take precedence."""
    prompt_file: str = ""
    """File of templates with {} for a class name, such as the paper's 63; auto for the card's, else open_clip's."""


LVIS = Run(
    workers=64,
    precision="bf16",
    batch_size=256,
    steps=180_000,
    warmup_steps=1000,
    optimizer=Sgd(learning_rate=0.32, first_learning_rate=0.0032, weight_decay=4e-5, drops=(0.9, 0.95)),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
    evaluate_every_steps=20_000,
)
COCO = replace(LVIS, steps=45_000)
DRAWN = Run(
    batch_size=16,
    epochs=5,
    warmup_steps=30,
    clip_grad_norm=5.0,
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMALL_VILD = Config(**SMALL, **SMALL_HEADS)
SMOKE = replace(DRAWN, batch_size=8, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
PRESETS = {
    "lvis": ("The paper's ResNet-50 on LVIS: base 866, novel 337.", Train(run=LVIS, base=OF_DATA)),
    "lvis-ensemble": ("The same, ViLD-ensemble.", Train(method=Config(mode="ensemble"), run=LVIS, base=OF_DATA)),
    "coco": ("COCO's 48 base and 17 novel classes.", Train(run=COCO, base="coco_ovd_base")),
    "drawn": (
        "A small one in minutes on a core, for drawn data.",
        Train(method=SMALL_VILD, run=DRAWN, base="drawn_base", prompt_file="auto"),
    ),
    "smoke": (
        "Three steps on 32 drawn samples and their own boxes, in this process.",
        Train(
            method=replace(SMALL_VILD, mode="ensemble", teacher="clipmill-tiny:untrained"),
            run=SMOKE,
            base="drawn_base",
            prompt_file="auto",
            draw=32,
        ),
    ),
}


def main(job: Train) -> None:
    """Resolve classes, prompts and initial weights; a smoke test makes its own regions."""
    card = load_card(job.base) if job.base not in ("", OF_DATA) else None
    method = replace(
        job.method,
        class_names=job.method.class_names or base_classes(job.base, job.run.data),
        prompts=read_templates(job.prompt_file, card, job.base) if job.prompt_file else job.method.prompts,
        teacher=clip_address(job.method.teacher),
        start_from=resolved(job.method.start_from),
    )
    with in_place(replace(job, method=method)) as placed:
        if job.draw and method.mode in DISTILLED:
            model = LoadRegionModel(teacher=method.teacher, proposer=ProposerOptions())
            options = RegionOptions(name=method.regions, floor=0.0)
            extract_regions(read_snapshot(placed.run.data), model, (), options, Workers(processes_count=0))
        pretrain(placed, keeps=bool(job.run.output_folder))


if __name__ == "__main__":
    run_job(PRESETS, main)
