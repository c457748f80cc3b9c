#!/usr/bin/env python
"""Pre-train CLIP on the shards of a snapshot.

    ray job submit --working-dir . -- python jobs/pretrain_clip.py paper-vit-b-32 --data s3://bucket/laion \
        --workers 64 --output-folder s3://bucket/runs/first --zero-shot imagenet=s3://bucket/imagenet-val

The same command again goes on from the last whole checkpoint, also with another number of workers; --workers 0 trains
in this process, without Ray. The sets of --zero-shot and --retrieval are evaluated beside the training.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

from pipeline.config import run_job
from pipeline.evaluation.showcase import snapshot_figure
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.clip import Config
from pipeline.shards.storage import Folder
from pipeline.sources.drawn.source import Drawn
from pipeline.stages.images import ImageOptions
from pipeline.stages.make_shard import ShardOptions
from pipeline.stages.refresh import refresh
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.follow import CheckpointEvaluation
from pipeline.tracking.runs import Tracking, start
from pipeline.training.launch import follower, launch
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run, keep_tracking_run, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """A CLIP, its data, and what it is held against."""

    method: Config = field(default_factory=Config)
    run: Run = field(default_factory=Run)
    evaluations: Evaluations = field(default_factory=Evaluations)
    tracking: Tracking = field(default_factory=Tracking)
    draw: int = 0
    """Without --data: samples of the embedded world to train on, drawn into a folder that goes when the job ends."""


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


def main(job: Pretrain) -> None:
    """Train in the places that the job names; a job that draws its data does without."""
    with TemporaryDirectory(prefix="clipmill-pretrain-") if job.draw else nullcontext("") as scratch:
        pretrain(drawn(job, scratch) if job.draw else job, keeps=bool(job.run.output_folder))
    if job.draw and not job.run.output_folder:
        logger.info("the run's folder was temporary and is gone; with --output-folder FOLDER it is kept")


def pretrain(job: Pretrain, keeps: bool = True) -> None:
    """Settle the run, then train it, evaluate it beside the training and register what came out, if it ``keeps`` it."""
    evaluates = bool(job.evaluations.prepare().sets)
    plan, record = prepare(job.method, job.run, evaluates=evaluates)
    with start(job.tracking, job, run_id=record.tracking_run) as tracker:
        keep_tracking_run(plan, record, tracker.run_id)
        tracker.log_dataset(plan.snapshot)
        tracker.log_figure("samples", snapshot_figure(plan.snapshot, caption=job.run.caption))
        evaluation = CheckpointEvaluation(evaluations=job.evaluations, run=tracker.handle)
        with follower(plan, evaluation) if evaluates else nullcontext() as beside:
            outcome = launch(plan, tracker.handle.open)
        metrics = beside.results.get(outcome.steps, {}) if beside else {}
        if keeps:
            tracker.register_checkpoint(outcome.checkpoint, metrics, outcome.steps)


def drawn(job: Pretrain, scratch: str) -> Pretrain:
    """The job with places in ``scratch`` where it was given none: data that are drawn now, and the run's folder."""
    if not job.run.data:
        options = ShardOptions(images=ImageOptions(resize_mode="no", skip_reencode=True), number_sample_per_shard=32)
        refresh(Drawn(samples=job.draw, size=64), Folder(f"{scratch}/data"), options, Workers(processes_count=0))
    places = {"data": job.run.data or f"{scratch}/data", "output_folder": job.run.output_folder or f"{scratch}/run"}
    return replace(job, run=replace(job.run, **places))


if __name__ == "__main__":
    run_job(PRESETS, main)
