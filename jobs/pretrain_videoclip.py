#!/usr/bin/env python
"""Train VideoCLIP on stored features of frames and timed captions, or fine-tune one for retrieval.

    python jobs/embed_dataset.py frames --data s3://bucket/howto100m --checkpoint ViT-B-32-quickgelu:openai
    ray job submit --working-dir . -- python jobs/pretrain_videoclip.py paper --data s3://bucket/howto100m \
        --output-folder s3://bucket/runs/videoclip
    python jobs/pretrain_videoclip.py fine-tune --pretrained s3://bucket/runs/videoclip --data s3://bucket/msrvtt \
        --output-folder s3://bucket/runs/videoclip-msrvtt

Each epoch begins with a stage that finds similar videos, whose clips are read together; --batches random leaves it out.
With --features "" the features are members frames.npy of the samples, such as S3D's. The same command resumes from the
last complete checkpoint, also in the middle of an epoch.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import require, run_job
from pipeline.evaluation.frame_embedder import FrameRate, LoadFrameEmbedder
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.frames import feature_width
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.models.videoclip import Config, Overlap
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.snapshot import read_snapshot
from pipeline.stages.annotate.embeddings import EmbedOptions
from pipeline.stages.annotate.frame_features import NAME, embed_frames
from pipeline.stages.shard_tasks import Workers
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """A VideoCLIP, its training data, and its evaluations."""

    drawn_options = {"video": True}

    method: Config = field(default_factory=Config)
    frame_model: str = "clipmill-small:untrained"
    """Model whose features of frames are made for videos that the job draws itself; see jobs/embed_dataset.py."""


# Adam, and a rate that falls linearly: the authors' polynomial decay of power 1.
RECIPE = AdamW(learning_rate=5e-5, beta2=0.98, epsilon=1e-6, weight_decay=0.0, decay_power=1.0)
PAPER = Run(
    workers=8,
    batch_size=256,
    epochs=25,
    warmup_steps=1000,
    optimizer=RECIPE,
    clip_grad_norm=2.0,
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
WHOLE = Config(positives="whole", pairs=1, objective="text_to_video", batches="random")
SMALL = Config(bert="drawn", video_layers=2, batches="retrieved", cluster=8, candidates=16, pairs=4)
DRAWN = replace(
    PAPER,
    workers=0,
    batch_size=32,
    epochs=20,
    warmup_steps=50,
    optimizer=replace(RECIPE, learning_rate=1e-3),
    cluster=Cluster(),
    loader=LoaderConfig(loader_workers=1),
)
PRESETS = {
    "paper": ("The paper's pre-training: clusters of 32 videos on each of eight GPUs.", Train(run=PAPER)),
    "fine-tune": (
        "The paper's fine-tuning on MSR-VTT: whole videos of each text; --pretrained is the checkpoint.",
        Train(method=WHOLE, run=replace(PAPER, workers=1, batch_size=224, epochs=10, warmup_steps=122)),
    ),
    "drawn": ("A small one in minutes on a core, for drawn videos.", Train(method=SMALL, run=DRAWN)),
    "smoke": (
        "Three steps on 16 drawn videos, in this process.",
        Train(
            method=replace(
                SMALL,
                small_bert=(32, 1, 2),
                video_layers=1,
                cluster=4,
                candidates=8,
                overlap=Overlap(budget=(2, 16)),
            ),
            run=replace(
                DRAWN, batch_size=8, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
            ),
            draw=16,
            frame_model="clipmill-tiny:untrained",
        ),
    ),
}


def main(job: Train) -> None:
    """Train; drawn videos get their features first."""
    with in_place(job) as placed:
        if not job.run.data and placed.run.data:
            model = LoadFrameEmbedder(checkpoint=job.frame_model, rate=FrameRate(frames_per_second=4.0))
            embed_frames(read_snapshot(placed.run.data), model, EmbedOptions(name=NAME), Workers(processes_count=0))
        pretrain(with_width(placed), keeps=bool(job.run.output_folder))


def with_width(job: Train) -> Train:
    """The job with the width of the features of its data."""
    require(bool(job.run.data), "data", job.run.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
    reader = replace(job.method, feature_width=0).frame_reader()
    width, given = feature_width(parts_of(read_data(job.run.data))[0], reader), job.method.feature_width
    require(given in (0, width), "feature_width", given, f"{width}, the width of the features of the data, or 0")
    return replace(job, method=replace(job.method, feature_width=width))


if __name__ == "__main__":
    run_job(
        PRESETS,
        main,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
