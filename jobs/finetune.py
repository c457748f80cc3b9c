#!/usr/bin/env python
"""Fine-tune a checkpoint's image tower with a linear head, on the labelled images of a snapshot.

    ray job submit --working-dir . -- python jobs/finetune.py wise-ft \
        --architecture ViT-B-16-quickgelu --pretrained openai \
        --data s3://bucket/imagenet --classification imagenet=s3://bucket/val --output-folder s3://bucket/runs/tuned
    python jobs/average_checkpoints.py wise-ft --checkpoints runs/tuned/start runs/tuned --output runs/wise

--pretrained is a tag, a file or the folder of a checkpoint. Classes and prompts are those of --card, or of the card of
the snapshot. The model before the first step is saved in the output folder as the checkpoint `start`, for WiSE-FT. The
same command resumes from the last complete checkpoint.
"""

import logging
from dataclasses import dataclass, field, replace

import torch

from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import card_names, load_card
from pipeline.evaluation.classes import read_classes, read_templates
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.classifier import Classifier, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.training.average import write_start
from pipeline.training.checkpoint import META
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run

logger = logging.getLogger(__name__)

START = "start"


@dataclass(frozen=True, kw_only=True)
class Finetune(Pretraining):
    """A linear head, its CLIP, and labelled training images."""

    method: Config = field(default_factory=Config)
    card: str = ""
    """Dataset card with classes, prompts and the label's key; empty for the data's card."""


GPUS = Cluster(accelerator="gpu", cpus_per_worker=10)
LOADER = LoaderConfig(loader_workers=8)
WISE_FT = Run(
    workers=8,
    precision="bf16",
    batch_size=512,
    epochs=10,
    warmup_steps=500,
    optimizer=AdamW(learning_rate=3e-5, beta2=0.999, epsilon=1e-8, weight_decay=0.1),
    clip_grad_norm=1.0,
    evaluate_every_steps=5000,
    cluster=GPUS,
    loader=LOADER,
)
IMAGENET = 1_281_167


def slip(epochs: int, warmup_epochs: int, layer_decay: float) -> Run:
    """SLIP's protocol, BEiT's recipe: batches of 1,024, and a learning rate that decreases with a layer's depth."""
    rate = AdamW(
        learning_rate=4e-3,
        final_learning_rate=1e-6,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=0.05,
        layer_decay=layer_decay,
    )
    return replace(
        WISE_FT,
        batch_size=1024,
        epochs=epochs,
        warmup_steps=warmup_epochs * IMAGENET // 1024,
        optimizer=rate,
        clip_grad_norm=None,
    )


MIXED = Config(
    architecture="ViT-B-16",
    head="random",
    features="tower",
    crop_scale=(0.08, 1.0),
    flip=0.5,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
DRAWN = Run(
    workers=1, batch_size=64, epochs=4, warmup_steps=20, optimizer=AdamW(learning_rate=3e-4), log_every_steps=10
)
SMOKE = replace(
    DRAWN, workers=0, batch_size=16, steps=4, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
SHAPES = Evaluations(classification=("drawn_shapes",), zero_shot=("drawn_shapes",))
PRESETS = {
    "wise-ft": (
        "WiSE-FT's ViT-B/16 from the zero-shot head: 10 epochs of ImageNet.",
        Finetune(method=Config(architecture="ViT-B-16"), run=WISE_FT),
    ),
    "slip-vit-s": (
        "SLIP's ViT-S/16: 100 epochs of ImageNet.",
        Finetune(method=replace(MIXED, architecture="clipmill-slip-small"), run=slip(100, 20, 0.65)),
    ),
    "slip-vit-b": ("SLIP's ViT-B/16: 100 epochs of ImageNet.", Finetune(method=MIXED, run=slip(100, 20, 0.65))),
    "slip-vit-l": (
        "SLIP's ViT-L/16: 50 epochs of ImageNet.",
        Finetune(method=replace(MIXED, architecture="clipmill-slip-large"), run=slip(50, 5, 0.75)),
    ),
    "drawn": (
        "A small CLIP of drawn data on shapes, in a minute; --pretrained names its checkpoint.",
        Finetune(
            method=Config(architecture="clipmill-small"), run=DRAWN, evaluations=SHAPES, draw=2400, card="drawn_shapes"
        ),
    ),
    "smoke": (
        "Four steps of a tiny CLIP with random weights on 64 drawn samples, in this process.",
        Finetune(
            method=Config(architecture="clipmill-tiny"),
            run=SMOKE,
            evaluations=replace(SHAPES, evaluation_samples=48),
            draw=64,
            card="drawn_shapes",
        ),
    ),
}


def main(job: Finetune) -> None:
    """Resolve folders and classes, save the model before its first step, then train it."""
    with in_place(job) as placed:
        settled = replace(placed, method=with_classes(placed))
        output = Folder(writable_folder("output_folder", settled.run.output_folder)).folder(START)
        if not output.exists(META):
            Classifier.check(settled.method)
            torch.manual_seed(settled.run.seed)  # the seed of the training's initial weights
            write_start(Classifier(settled.method), output)
        pretrain(settled, keeps=bool(job.run.output_folder))


def with_classes(job: Finetune) -> Config:
    """The method with the classes, prompts and label of the card, if it has none of its own."""
    if job.method.class_names:
        return job.method
    require(bool(job.run.data), "data", job.run.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
    name = job.card or read_snapshot(job.run.data).card or ""
    require(bool(name), "card", name, "a card with class names, since the data have none: " + ", ".join(card_names()))
    card = load_card(name)
    classes, templates = read_classes("auto", card, card.name), read_templates("auto", card, card.name)
    return replace(job.method, class_names=classes, prompts=templates, label_key=card.label)


if __name__ == "__main__":
    run_job(PRESETS, main)
