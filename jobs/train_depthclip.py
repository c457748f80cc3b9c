#!/usr/bin/env python
"""Train the distances of words for DepthCLIP: a few numbers on a frozen CLIP, in minutes.

    python jobs/train_depthclip.py nyu --data data/nyu-train --depth nyu_depth_v2,crop=eigen --output-folder runs/depth
    python jobs/train_depthclip.py nyu --data data/nyu-train --scenes bathroom kitchen office \
        --output-folder runs/depth-by-scene

The paper trains nothing: `jobs/evaluate.py sets --checkpoint RN50-quickgelu:openai --depth nyu_depth_v2,crop=eigen` is
its result. jobs/estimate_depth.py shows the depth of an image.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.depth_words import DepthWords
from pipeline.models.depthclip import Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A DepthCLIP, its training data, and its evaluations."""

    drawn_options = {"depth": True}

    method: Config = field(default_factory=Config)


# Recipes of our own: the paper has no training. A step moves each number by about the learning rate, in metres.
NYU = Run(
    workers=1,
    batch_size=32,
    epochs=20,
    warmup_steps=10,
    optimizer=AdamW(learning_rate=0.02, weight_decay=0.0),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=8),
    loader=LoaderConfig(loader_workers=6),
)
DRAWN = replace(
    NYU,
    workers=0,
    batch_size=16,
    epochs=6,
    log_every_steps=25,
    cluster=Cluster(),
    loader=LoaderConfig(loader_workers=0),
)
PROJECTED = DepthWords(mode="projected", word_temperature=0.02, pixels="model")
SMALL = Config(architecture="clipmill-small-vit", pretrained=None, words=PROJECTED)
PRESETS = {
    "nyu": (
        "The training images of NYUv2, with OpenAI's RN50 in projected mode.",
        Train(method=Config(words=PROJECTED, input_size=(416, 544), input_crop=(56, 472, 60, 604)), run=NYU),
    ),
    "nyu-released": (
        "The same with the map of the authors' code and their bins as a start.",
        Train(method=Config(input_size=(416, 544), input_crop=(56, 472, 60, 604)), run=NYU),
    ),
    "drawn": (
        "For drawn rooms; --pretrained RUN is a CLIP that was trained on their captions.",
        Train(method=SMALL, run=DRAWN),
    ),
    "smoke": (
        "Three steps on 32 drawn rooms, in this process.",
        Train(
            method=replace(SMALL, architecture="clipmill-tiny"),
            run=replace(DRAWN, batch_size=8, epochs=1, steps=3, warmup_steps=1, log_every_steps=1),
            draw=32,
        ),
    ),
}

if __name__ == "__main__":
    run_job(PRESETS, run_pretraining, "the same command goes on from the last checkpoint")
