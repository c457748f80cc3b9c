#!/usr/bin/env python
"""Pre-train GroupViT, which segments by words, on images and captions alone.

    python jobs/extract_phrases.py snapshot --data s3://bucket/captions
    ray job submit --working-dir . -- python jobs/pretrain_groupvit.py paper-yfcc --data s3://bucket/captions \
        --output-folder s3://bucket/runs/groupvit --segmentation s3://bucket/voc

The first command finds the nouns of the captions for the prompts; --prompts 0 needs none. The same command resumes from
the last complete checkpoint.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.phrases import ReadSampleCaptions
from pipeline.models.groupvit import TINY, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.snapshot import read_snapshot
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.phrases import NAME, LoadPhraseMaker
from pipeline.stages.shard_tasks import Workers
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Pretrain(Pretraining):
    """A GroupViT, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


RECIPE = AdamW(
    learning_rate=1.6e-3,
    first_learning_rate=4e-6,
    final_learning_rate=4e-5,
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.05,
)


def paper(samples: int) -> Run:
    """The authors' recipe: 30 epochs over ``samples`` image-text pairs, two of them warm-up."""
    return Run(
        workers=16,
        precision="bf16",
        batch_size=4096,
        epochs=30,
        warmup_steps=2 * samples // 4096,
        optimizer=RECIPE,
        clip_grad_norm=5.0,
        evaluate_every_steps=7000,
        cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
        loader=LoaderConfig(loader_workers=8),
    )


# CC3M 2,891,445, CC12M 11,156,203, YFCC14M 14,615,499 pairs; RedCaps 11,866,987.
YFCC, REDCAPS = paper(28_663_147), paper(25_914_635)
CC = paper(14_047_648)
DRAWN = Run(
    batch_size=64,
    epochs=16,
    warmup_steps=100,
    clip_grad_norm=5.0,
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, beta2=0.98, epsilon=1e-8),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMALL = Config(
    image_size=64,
    patch_size=8,
    width=64,
    heads=2,
    depths=(2, 1, 1),
    group_tokens=(16, 8),
    drop_path=0.0,
    text_width=64,
    text_layers=1,
    text_heads=1,
    text_start="bag_of_words",
    dimension=128,
    projection_hidden=256,
    crop_scale=(0.6, 1.0),
    augment="",  # it changes colours, which captions name
    erase=0.0,
    window=64,
)
SMOKE = replace(
    DRAWN, batch_size=16, steps=3, epochs=1, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
FEW = Evaluations(zero_shot=("drawn_shapes",), evaluation_samples=32)
PRESETS = {
    "paper-yfcc": ("The paper's model: CC3M, CC12M and YFCC14M.", Pretrain(run=YFCC)),
    "paper-redcaps": (
        "The authors' second model: CC3M, CC12M and RedCaps.",
        Pretrain(method=Config(prompts=0), run=REDCAPS),
    ),
    "paper-cc": ("The paper's model on CC3M and CC12M alone.", Pretrain(run=CC)),
    "one-node": (
        "The paper's model on eight GPUs, with batches of 2,048.",
        Pretrain(
            run=replace(
                CC,
                workers=8,
                batch_size=2048,
                warmup_steps=2 * CC.warmup_steps,
                optimizer=replace(RECIPE, learning_rate=8e-4),
            )
        ),
    ),
    "drawn": ("A small one in minutes on a core, for drawn data.", Pretrain(method=SMALL, run=DRAWN)),
    "smoke": (
        "Three steps on 48 drawn samples, in this process.",
        Pretrain(method=Config(**TINY), run=SMOKE, evaluations=FEW, draw=48),
    ),
}


def main(job: Pretrain) -> None:
    """Train; find the phrases of samples that this job has drawn."""
    with in_place(job) as placed:
        if job.draw and not job.run.data and job.method.prompts:
            load = LoadPhraseMaker(extractor="rules", caption="txt", captions=ReadSampleCaptions(caption="txt"))
            workers = Workers(processes_count=0)
            annotate(read_snapshot(placed.run.data), load, Annotation(name=NAME), workers, use_gpu=False)
        pretrain(placed, keeps=bool(job.run.output_folder))


if __name__ == "__main__":
    run_job(
        PRESETS,
        main,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
