#!/usr/bin/env python
"""Pre-train CLIP on the shards of a snapshot.

    ray job submit --working-dir . -- python jobs/pretrain_clip.py paper-vit-b-32 --data s3://bucket/laion \
        --workers 64 --output-folder s3://bucket/runs/first --zero-shot imagenet=s3://bucket/imagenet-val

The same command resumes from the last complete checkpoint, also with another number of workers. --workers 0 trains in
this process, without Ray. The sets of --zero-shot and --retrieval are evaluated beside the training.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Pretrain(Pretraining):
    """A CLIP, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


GPUS = Cluster(accelerator="gpu", cpus_per_worker=10)
PAPER = Run(
    workers=128, precision="bf16", evaluate_every_steps=5000, cluster=GPUS, loader=LoaderConfig(loader_workers=8)
)
ONE_NODE = replace(PAPER, workers=8, batch_size=4096, optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1))
DEMO = Run(
    workers=1, batch_size=256, epochs=4, warmup_steps=30, optimizer=AdamW(learning_rate=1.5e-3), log_every_steps=25
)
SMALL = Config(architecture="clipmill-small", text_start="bag_of_words")
SMOKE = replace(
    DEMO, workers=0, batch_size=16, steps=4, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
FEW = Evaluations(zero_shot=("drawn_shapes",), retrieval=("drawn_val",), evaluation_samples=48)
PRESETS = {
    "paper-vit-b-32": ("The paper's ViT-B/32: 32 epochs in batches of 32,768.", Pretrain(run=PAPER)),
    "paper-vit-b-16": ("The paper's ViT-B/16.", Pretrain(method=Config(architecture="ViT-B-16"), run=PAPER)),
    "paper-rn50": (
        "The paper's ResNet-50.",
        Pretrain(method=Config(architecture="RN50"), run=replace(PAPER, optimizer=AdamW(beta2=0.999, epsilon=1e-8))),
    ),
    "one-node": ("ViT-B/32 on eight GPUs and some million samples.", Pretrain(run=ONE_NODE)),
    "demo": ("A small CLIP in minutes on two cores, for drawn data.", Pretrain(method=SMALL, run=DEMO)),
    "smoke": (
        "Four steps of a tiny CLIP on 64 drawn samples, in this process.",
        Pretrain(method=Config(architecture="clipmill-tiny"), run=SMOKE, evaluations=FEW, draw=64),
    ),
}


if __name__ == "__main__":
    run_job(PRESETS, run_pretraining)
