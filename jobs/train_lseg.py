#!/usr/bin/env python
"""Train LSeg, a segmenter for any words, on images with masks of objects or with label maps.

    ray job submit --working-dir . -- python jobs/train_lseg.py paper-vit-l-16 --data s3://bucket/ade20k \
        --output-folder s3://bucket/runs/lseg
    python jobs/train_lseg.py pascal-5i --base pascal_5i_fold2 --data data/voc --output-folder runs/fold2

The text tower is a CLIP's; a run of jobs/pretrain_clip.py is one. jobs/evaluate.py measures the result on sets with
labels (--segmentation).
"""

from dataclasses import dataclass, field, replace

from pipeline.config import require, run_job
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import OF_DATA, base_classes, dataset_classes
from pipeline.loaders.mixture import places
from pipeline.models.lseg import SMALL, Config
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.objects import plain_word
from pipeline.training.checkpoint import clip_address
from pipeline.training.optimizer import AdamW, Sgd
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class Train(Pretraining):
    """An LSeg, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)
    base: str = ""
    """Card whose classes, except the novel ones, are the training classes, or `data` for the snapshot's own classes;
    --class-names take precedence."""


# 0.004 / 16 for each image of a process's batch, ten times as much for the decoder; 240 epochs of ADE20K.
PAPER = Run(
    workers=8,
    precision="fp32",
    batch_size=32,
    epochs=240,
    warmup_steps=0,
    optimizer=Sgd(learning_rate=0.001, decay_power=0.9, weight_decay=1e-4, tower_rates={"decoder": 10.0}),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
)
DRAWN = Run(
    batch_size=16,
    epochs=16,
    warmup_steps=30,
    clip_grad_norm=5.0,
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.05, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMALL_LSEG = Config(**SMALL, backbone="clipmill_small_resnet", unlabelled="background")
VIT = Config(text_tower="ViT-B-32-quickgelu:openai", pretrained_backbone=True)
RESNET = replace(VIT, backbone="resnet101")
# Zero-shot sets: the authors trained for four epochs. Classes that a card holds out have no labels.
FOLD = Train(
    method=replace(RESNET, unlabelled="others", labels="mask.png"),
    run=replace(PAPER, epochs=4),
    base="pascal_5i_fold0",
)
PRESETS = {
    "paper-vit-l-16": (
        "The paper's ViT-L/16 on ADE20K, with label maps.",
        Train(method=replace(VIT, labels="mask.png"), run=PAPER, base=OF_DATA),
    ),
    "paper-resnet-101": (
        "The same with a ResNet-101, the paper's network for few-shot sets.",
        Train(method=replace(RESNET, labels="mask.png"), run=PAPER, base=OF_DATA),
    ),
    "pascal-5i": (
        "A ResNet-101 on PASCAL-5i without the classes of fold 0; --base pascal_5i_fold1 for fold 1.",
        FOLD,
    ),
    "coco-20i": (
        "The same on COCO-20i without the classes of fold 0; --base coco_20i_fold1 for fold 1.",
        replace(FOLD, method=replace(FOLD.method, labels="boxes.json"), base="coco_20i_fold0"),
    ),
    "fss-1000": (
        "The same on FSS-1000, whose classes are those of the data.",
        replace(FOLD, method=replace(FOLD.method, labels="boxes.json", labels_per_image=64), base=OF_DATA),
    ),
    "two-words": (
        "The authors' reading of such sets: one class and others in each image. For PASCAL-5i, fold 0.",
        replace(FOLD, method=replace(FOLD.method, two_words=True, other_classes="unlabelled")),
    ),
    "drawn": (
        "A small one for drawn data: ten minutes on a core for 3,000 images.",
        Train(method=SMALL_LSEG, run=DRAWN, base="drawn_base"),
    ),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        Train(
            method=Config(
                **SMALL,
                backbone="clipmill_small_vit",
                block="bottleneck",
                block_depth=2,
                unlabelled="background",
                text_tower="clipmill-tiny:untrained",
            ),
            run=replace(
                DRAWN,
                batch_size=8,
                steps=3,
                warmup_steps=1,
                log_every_steps=1,
                loader=LoaderConfig(loader_workers=0),
            ),
            base="drawn_base",
            draw=32,
        ),
    ),
}


def main(job: Train) -> None:
    """Resolve the classes and the text tower; the class of unlabelled pixels is the last one."""
    method, data = job.method, job.run.data
    names = method.class_names or base_classes(job.base, data)
    if method.unlabelled and plain_word(method.unlabelled) not in map(plain_word, names):
        names = (*names, method.unlabelled)
    known = method.dataset_classes or tuple(some or names for some in dataset_classes(job.base, data))
    count = len(places(data))
    require(len(known) == count, "dataset_classes", len(known), f"the classes of each of the {count} data sets")
    method = replace(
        method,
        class_names=names,
        dataset_classes=known,
        text_tower=clip_address(method.text_tower),
    )
    with in_place(replace(job, method=method)) as placed:
        pretrain(placed, keeps=bool(job.run.output_folder))


if __name__ == "__main__":
    run_job(PRESETS, main)
