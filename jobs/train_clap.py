#!/usr/bin/env python
"""Train CLAP, sounds and texts, from a checkpoint in transformers' layout.

    python jobs/train_clap.py fine-tune --pretrained hf-hub:laion/clap-htsat-unfused --data s3://bucket/clotho \
        --output-folder s3://bucket/runs/clap
    python jobs/export_model.py hugging-face --checkpoint s3://bucket/runs/clap --output exported/clap

The second command writes the layout again. To train HTSAT from random weights, with a text tower of open_clip, see the
preset clap of jobs/train_audioclip.py. The same command resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clap import Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A CLAP, its training data, and its evaluations."""

    drawn_options = {"sound": "alone"}

    method: Config = field(default_factory=Config)


RECIPE = AdamW(learning_rate=1e-4, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
PAPER = Run(
    workers=24,
    precision="fp32",
    batch_size=2304,
    epochs=45,
    warmup_steps=3200,
    optimizer=RECIPE,
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
SMOKE = Run(
    batch_size=8, steps=2, warmup_steps=1, log_every_steps=1, optimizer=RECIPE, loader=LoaderConfig(loader_workers=0)
)
PRESETS = {
    "paper": ("LAION's recipe: 45 epochs in batches of 2,304.", Train(run=PAPER)),
    "fine-tune": (
        "A few epochs on one GPU, from a checkpoint.",
        Train(
            run=replace(
                PAPER,
                workers=1,
                batch_size=96,
                epochs=5,
                warmup_steps=200,
                optimizer=replace(RECIPE, learning_rate=1e-5),
            )
        ),
    ),
    "smoke": (
        "Two steps of a tiny model on 24 drawn sounds, in this process.",
        Train(method=Config(size="tiny", audio_seconds=1.0), run=SMOKE, draw=24),
    ),
}

if __name__ == "__main__":
    run_job(
        PRESETS,
        run_pretraining,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
