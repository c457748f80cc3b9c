#!/usr/bin/env python
"""Pre-train SLIP (CLIP with an additional self-supervised loss) on the shards of a snapshot.

    ray job submit --working-dir . -- python jobs/pretrain_slip.py paper-vit-b --data s3://bucket/yfcc15m \
        --workers 64 --output-folder s3://bucket/runs/slip --zero-shot imagenet=s3://bucket/imagenet-val

The same command resumes from the last complete checkpoint, as in jobs/pretrain_clip.py. Its model.safetensors also
loads there. With --self-supervision 0, SLIP differs from CLIP only by the augmentation of the first view.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.slip import Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Pretrain(Pretraining):
    """A SLIP, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


GPUS = Cluster(accelerator="gpu", cpus_per_worker=10)
RECIPE = AdamW(
    learning_rate=3e-3,
    first_learning_rate=1e-6,
    final_learning_rate=1e-5,
    beta2=0.98,
    epsilon=1e-8,
    weight_decay=0.1,
)
LOADER = LoaderConfig(loader_workers=8)


def paper(samples: int, epochs: int) -> Run:
    """The paper's recipe (section 4.1), with one epoch of warm-up over the data set's ``samples``."""
    return Run(
        workers=64,
        precision="bf16",
        batch_size=4096,
        epochs=epochs,
        warmup_steps=samples // 4096,
        optimizer=RECIPE,
        evaluate_every_steps=5000,
        cluster=GPUS,
        loader=LOADER,
    )


YFCC15M, CC3M, CC12M = paper(14_600_000, 25), paper(2_900_000, 40), paper(11_000_000, 35)
VIT_S, VIT_B, VIT_L = Config(architecture="clipmill-slip-small"), Config(), Config(architecture="clipmill-slip-large")
DEMO = Run(
    workers=1, batch_size=256, epochs=4, warmup_steps=30, optimizer=AdamW(learning_rate=1.5e-3), log_every_steps=25
)
SMALL = Config(
    architecture="clipmill-small", text_start="bag_of_words", crop_scale=(0.9, 1.0), ssl_hidden=512, ssl_width=128
)
SMOKE = replace(
    DEMO, workers=0, batch_size=16, steps=4, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
TINY = Config(architecture="clipmill-tiny", ssl_hidden=64, ssl_width=32)
FEW = Evaluations(zero_shot=("drawn_shapes",), retrieval=("drawn_val",), evaluation_samples=48)
PRESETS = {
    "paper-vit-s": ("The paper's ViT-S/16: 25 epochs of YFCC15M.", Pretrain(method=VIT_S, run=YFCC15M)),
    "paper-vit-b": ("The paper's ViT-B/16: 25 epochs of YFCC15M.", Pretrain(method=VIT_B, run=YFCC15M)),
    "paper-vit-l": ("The paper's ViT-L/16: 25 epochs of YFCC15M.", Pretrain(method=VIT_L, run=YFCC15M)),
    "cc3m-vit-s": ("ViT-S/16, which the paper has not: 40 epochs of CC3M.", Pretrain(method=VIT_S, run=CC3M)),
    "cc3m-vit-b": ("The paper's ViT-B/16: 40 epochs of CC3M.", Pretrain(method=VIT_B, run=CC3M)),
    "cc3m-vit-l": ("ViT-L/16, which the paper has not: 40 epochs of CC3M.", Pretrain(method=VIT_L, run=CC3M)),
    "cc12m-vit-s": ("ViT-S/16, which the paper has not: 35 epochs of CC12M.", Pretrain(method=VIT_S, run=CC12M)),
    "cc12m-vit-b": ("The paper's ViT-B/16: 35 epochs of CC12M.", Pretrain(method=VIT_B, run=CC12M)),
    "cc12m-vit-l": ("ViT-L/16, which the paper has not: 35 epochs of CC12M.", Pretrain(method=VIT_L, run=CC12M)),
    "demo": ("A small SLIP in minutes on two cores, for drawn data.", Pretrain(method=SMALL, run=DEMO)),
    "smoke": (
        "Four steps of a tiny SLIP on 64 drawn samples, in this process.",
        Pretrain(method=TINY, run=SMOKE, evaluations=FEW, draw=64),
    ),
}

if __name__ == "__main__":
    run_job(PRESETS, run_pretraining)
