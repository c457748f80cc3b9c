#!/usr/bin/env python
"""Train ActionCLIP: a CLIP that names the action in a video.

    python jobs/train_actionclip.py k400 --data s3://bucket/k400 --card kinetics400 \
        --zero-shot k400=s3://bucket/k400-val,templates=model,ensemble=probabilities --output-folder s3://bucket/runs/k400
    python jobs/train_actionclip.py hmdb51 --data s3://bucket/hmdb51 --pretrained s3://bucket/runs/k400 --shots 8 \
        --output-folder s3://bucket/runs/hmdb51-8-shots

Actions are those of --class-names, of --card, or of the card of the snapshot. --shots takes a few videos of every
action. --objective linear trains a linear layer instead of texts, which --classification evaluates. The same command
resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import card_names, load_card
from pipeline.evaluation.classes import read_classes
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.frames import FrameSampling
from pipeline.models.actionclip import Config
from pipeline.runs.few_shot_samples import labelled_snapshot
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """An ActionCLIP, its training data, and its evaluations."""

    drawn_options = {"video": True, "split": "motions_train"}

    method: Config = field(default_factory=Config)
    card: str = ""
    """Dataset card with the actions and the key of the label, or a file of names; empty for the data's card."""
    shots: int = 0
    """Videos of every action to train on; 0 for all. Few videos need more epochs or --steps."""
    shot_seed: int = 1
    """Seed of the choice of videos."""


# The authors' configurations; steps of warm-up are five epochs of Kinetics-400 as recalled, 240,000 videos.
K400 = Run(
    workers=4,
    precision="bf16",
    batch_size=128,
    epochs=50,
    warmup_steps=9375,
    optimizer=AdamW(learning_rate=5e-6, epsilon=1e-8, tower_rates={"head": 10.0}),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
FINE = replace(K400, workers=2, batch_size=32, warmup_steps=560)
B16 = Config(architecture="ViT-B-16-quickgelu")
SMALL = Config(
    architecture="clipmill-small",
    pretrained=None,
    text_start="bag_of_words",
    head_layers=2,
    sampling=FrameSampling(mode="segments", frames=8),
    flip=0.0,
    augment="",
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
TINY = replace(
    SMALL, architecture="clipmill-tiny", text_start="paper", sampling=FrameSampling(mode="segments", frames=3)
)
MOTIONS = "drawn_motions"
PRESETS = {
    "k400": ("Kinetics-400: ViT-B/32, 8 frames, Transf.", Train(run=K400)),
    "k400-b16": ("Kinetics-400: ViT-B/16, 8 frames, Transf.", Train(method=B16, run=K400)),
    "hmdb51": (
        "HMDB-51 or UCF-101 from a run on Kinetics-400 (--pretrained), without RandAugment.",
        Train(method=replace(B16, augment=""), run=FINE),
    ),
    "drawn": ("A small one from random weights, for drawn motions.", Train(method=SMALL, run=DRAWN, card=MOTIONS)),
    "smoke": (
        "Three steps on 24 drawn motions, in this process.",
        Train(method=TINY, run=SMOKE, draw=24, card=MOTIONS),
    ),
}


def main(job: Train) -> None:
    """Resolve the actions and the few videos, then train."""
    require(job.shots >= 0, "shots", job.shots, "0 or more")
    with in_place(job) as placed:
        pretrain(with_shots(with_actions(placed)), keeps=bool(job.run.output_folder))


def with_actions(job: Train) -> Train:
    """The job with the actions and the label's key of its card, if the method has none of its own."""
    if job.method.class_names:
        return job
    require(bool(job.run.data), "data", job.run.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
    name = job.card or read_snapshot(job.run.data).card or ""
    known = ", ".join(card_names())
    require(bool(name), "card", name, f"a card with actions, or a file of names, since the data have none: {known}")
    card = load_card(name) if name in card_names() or name.endswith((".yaml", ".yml")) else None
    classes = read_classes("auto" if card else name, card, card.name if card else name)
    key = card.label if card else job.method.label_key
    return replace(job, method=replace(job.method, class_names=classes, label_key=key))


def with_shots(job: Train) -> Train:
    """The job on a snapshot of few videos in its output folder, if it has shots."""
    if not job.shots:
        return job
    output = Folder(writable_folder("output_folder", job.run.output_folder))
    names, key = job.method.class_names, job.method.label_key
    few = labelled_snapshot(job.run.data, names, key, job.shots, job.shot_seed, output)
    return replace(job, run=replace(job.run, data=few.uri))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on from the last checkpoint, or from the beginning if there is none")
