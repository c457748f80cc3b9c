#!/usr/bin/env python
"""Train CLIP4Clip: a CLIP that finds videos by text.

    python jobs/train_clip4clip.py msrvtt --data s3://bucket/msrvtt-train --head seqTransf \
        --retrieval msrvtt=s3://bucket/msrvtt-test --output-folder s3://bucket/runs/clip4clip
    ray job submit --working-dir . -- python jobs/train_clip4clip.py activitynet --data s3://bucket/activitynet \
        --workers 8 --output-folder s3://bucket/runs/activitynet

With several captions of a video in the list `captions` of its json (--caption json:captions), each epoch reads one of
them. --frame-features NAME trains on stored features of frames (jobs/embed_dataset.py frames). The same command resumes
from the last complete checkpoint.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.frames import FrameSampling
from pipeline.models.clip4clip import Config
from pipeline.runs.train import Pretraining, run_pretraining
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A CLIP4Clip, its training data, and its evaluations."""

    drawn_options = {"video": True}

    method: Config = field(default_factory=Config)


# The authors' commands. Steps of warm-up are a tenth of five passes over the pairs of video and caption, whose numbers
# are recalled: MSR-VTT 9,000 x 20, MSVD 48,774, LSMDC 101,079, ActivityNet 10,009, DiDeMo 8,395. A pass over videos
# reads one caption of each, so five passes over the pairs are 100 and 200 passes over the videos of the first two.
PAPER = Run(
    workers=4,
    precision="bf16",
    batch_size=128,
    epochs=5,
    warmup_steps=390,
    optimizer=AdamW(learning_rate=1e-4, tower_rates={"image": 1e-3, "text": 1e-3}),
    clip_grad_norm=1.0,
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
SEVERAL = replace(PAPER, caption="json:captions")
LONG = replace(PAPER, workers=8)
PARAGRAPHS = Config(sampling=FrameSampling(frames=64), text_tokens=64)
SMALL = Config(
    architecture="clipmill-small",
    pretrained=None,
    text_start="bag_of_words",
    head="seqTransf",
    head_layers=2,
    sampling=FrameSampling(frames=8, rate=0),
    freeze_layers=None,
)
DRAWN = Run(
    batch_size=64,
    epochs=8,
    warmup_steps=60,
    optimizer=AdamW(learning_rate=1.5e-3),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMOKE = replace(
    DRAWN, batch_size=8, steps=3, epochs=1, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
TINY = replace(SMALL, architecture="clipmill-tiny", text_start="paper", sampling=FrameSampling(frames=3, rate=0))
PRESETS = {
    "msrvtt": (
        "MSR-VTT (train 9k): 12 frames, the mean of frames; --head for the other three.",
        Train(run=replace(SEVERAL, epochs=100, warmup_steps=703)),
    ),
    "msvd": (
        "MSVD, some 40 captions of each video.",
        Train(run=replace(SEVERAL, epochs=200, warmup_steps=190)),
    ),
    "lsmdc": ("LSMDC, one caption of each clip.", Train(run=PAPER)),
    "activitynet": (
        "ActivityNet: whole videos and paragraphs, 64 frames and 64 tokens.",
        Train(method=PARAGRAPHS, run=replace(LONG, warmup_steps=39)),
    ),
    "didemo": (
        "DiDeMo: whole videos and paragraphs, 64 frames and 64 tokens.",
        Train(method=PARAGRAPHS, run=replace(LONG, warmup_steps=33)),
    ),
    "drawn": ("A small one from random weights, for drawn videos.", Train(method=SMALL, run=DRAWN)),
    "smoke": (
        "Three steps on 24 drawn videos, in this process.",
        Train(method=TINY, run=SMOKE, evaluations=Evaluations(), draw=24),
    ),
}

if __name__ == "__main__":
    run_job(
        PRESETS,
        run_pretraining,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
