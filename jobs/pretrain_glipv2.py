#!/usr/bin/env python
"""Train GLIPv2, a detector that also compares regions with the words of other images, and draws masks.

    ray job submit --working-dir . -- python jobs/pretrain_glipv2.py t --output-folder s3://bucket/runs/glipv2-t \
        --data s3://bucket/objects365=0.4,s3://bucket/goldg=0.3,s3://bucket/cap4m=0.3
    ray job submit --working-dir . -- python jobs/pretrain_glipv2.py masks --output-folder s3://bucket/runs/glipv2-m \
        --start-from s3://bucket/runs/glipv2-t --data s3://bucket/coco

The data are GLIP's: see docs/grounding.md. --start-from begins with released weights of GLIP, a run of GLIP or a run of
GLIPv2; `masks` trains the mask head alone. jobs/finetune_glipv2.py goes on with captions and questions.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import base_classes
from pipeline.models.glipv2.config import BASE, DRAWN, HUGE, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.training.checkpoint import resolved
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class TrainGlipv2(Pretraining):
    """A GLIPv2, its training data, and its evaluations."""

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
LARGER = replace(TINY, workers=64, ema_decay=None, optimizer=replace(TINY.optimizer, weight_decay=0.01))
SEGMENTING = replace(TINY, workers=8, batch_size=32, epochs=12, ema_decay=None, warmup_steps=500)
SMALL = Run(
    batch_size=8,
    epochs=5,
    warmup_steps=30,
    clip_grad_norm=1.0,
    optimizer=AdamW(learning_rate=1e-3, weight_decay=1e-4, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMOKE = replace(SMALL, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
START = Config(pretrained_backbone=True)
START = replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes"))
PRESETS = {
    "t": (
        "GLIPv2-T: Swin-T; Objects365, GoldG and captions with pseudo boxes. The schedule is GLIP-T's.",
        TrainGlipv2(method=START, run=TINY),
    ),
    "b": (
        "GLIPv2-B (recalled): Swin-B; BERT instead of CLIP's text tower. The schedule is GLIP-L's.",
        TrainGlipv2(method=replace(START, **BASE), run=LARGER),
    ),
    "h": (
        "GLIPv2-H (recalled): Swin-L, since CoSwin-H is not public. The schedule is GLIP-L's.",
        TrainGlipv2(method=replace(START, **HUGE), run=LARGER),
    ),
    "masks": (
        "The mask head of a trained GLIPv2-T, on data with masks (COCO, LVIS).",
        TrainGlipv2(method=Config(masks="head"), run=SEGMENTING),
    ),
    "drawn": (
        "A small one with masks, in minutes on a core, for drawn data.",
        TrainGlipv2(method=Config(**DRAWN), run=SMALL),
    ),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        TrainGlipv2(method=Config(**DRAWN), run=SMOKE, base="drawn_base", draw=32),
    ),
}


def main(job: TrainGlipv2) -> None:
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
