#!/usr/bin/env python
"""Train VQGAN, images as grids of codes, on the shards of a snapshot.

    ray job submit --working-dir . -- python jobs/train_vqgan.py imagenet-f16 --data s3://bucket/imagenet \
        --workers 8 --output-folder s3://bucket/runs/vqgan --reconstruction imagenet=s3://bucket/imagenet-val
    python jobs/train_vqgan.py drawn --data data/drawn --output-folder runs/vqgan

The same command resumes from the last complete checkpoint. jobs/import_vqgan.py reads the authors' released weights.
--perceptual-linear FILE gives the weights of LPIPS; --perceptual RUN compares features of a CLIP.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.vqgan import Config, Vqgan
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.checkpoint import network_address, resolved
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A VQGAN, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


def recipe(batch_size: int) -> AdamW:
    """The authors' Adam: a constant rate of 4.5e-6 for each image of a batch."""
    return AdamW(
        learning_rate=4.5e-6 * batch_size, beta1=0.5, beta2=0.9, epsilon=1e-8, weight_decay=0.0, exponential=1.0
    )


def main(job: Train) -> None:
    """Resolve runs to checkpoints, then train."""
    method = job.method
    placed = replace(method, start_from=resolved(method.start_from), perceptual=network_address(method.perceptual))
    run_pretraining(replace(job, method=placed))


# The authors give 12 images a GPU; 8 GPUs are an assumption.
PAPER = Run(
    workers=8,
    precision="fp32",
    batch_size=96,
    epochs=40,
    warmup_steps=0,
    optimizer=recipe(96),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
DRAWN = Run(
    batch_size=16,
    steps=1500,
    warmup_steps=20,
    precision="fp32",
    optimizer=replace(recipe(16), learning_rate=1e-3, beta2=0.99),
    log_every_steps=25,
)
SMALL = Config(
    resolution=64,
    image_size=64,
    channels=32,
    multipliers=(1, 1, 2, 2),
    residual_blocks=1,
    attention_at=(8,),
    latent_channels=64,
    codes=256,
    code_width=32,
    restart_after=50,
    perceptual="clipmill-small:untrained",
    perceptual_layers=("trunk.blocks.0", "trunk.blocks.1", "trunk.blocks.2"),
    perceptual_weight=0.1,
    discriminator_start=1200,
    discriminator_channels=32,
    discriminator_layers=2,
)
SMOKE = replace(DRAWN, batch_size=8, steps=4, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
FEW = Evaluations(reconstruction=("drawn_val",), evaluation_samples=16)
PRESETS = {
    "imagenet-f16": ("The authors' ImageNet model: 16 pixels a code, 1024 codes.", Train(run=PAPER)),
    "imagenet-f16-16384": ("The same with 16,384 codes.", Train(method=Config(codes=16_384), run=PAPER)),
    "drawn": (
        "Images of 64 pixels in half an hour of a core; features of a network with random weights.",
        Train(method=SMALL, run=DRAWN),
    ),
    "smoke": (
        "Four steps of a tiny VQGAN on 32 drawn samples, in this process.",
        Train(method=replace(Vqgan.smallest(), discriminator_start=2), run=SMOKE, evaluations=FEW, draw=32),
    ),
}

if __name__ == "__main__":
    run_job(
        PRESETS,
        main,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
