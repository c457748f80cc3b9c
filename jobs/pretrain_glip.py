#!/usr/bin/env python
"""Train GLIP, a detector of anything that words describe, on boxes with class names and on captions with boxes.

    ray job submit --working-dir . -- python jobs/pretrain_glip.py c --output-folder s3://bucket/runs/glip-c \
        --data s3://bucket/objects365=0.5,s3://bucket/flickr30k=0.2,s3://bucket/gqa=0.3

Data with classes, data with phrases and data with pseudo boxes mix in one run: see docs/grounding.md. --base CARD
leaves out the card's novel classes. --start-from FILE begins with released weights or with another run.
jobs/detect.py draws what the detector finds, jobs/evaluate.py measures it.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.models.glip.config import LARGE, SMALL, Config
from pipeline.runs import grounding
from pipeline.runs.grounding import GroundingPretraining, pretrain_grounding


@dataclass(frozen=True, kw_only=True)
class Train(GroundingPretraining):
    """A GLIP, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


BIG = replace(grounding.LARGE, steps=1_000_000)
START = Config(pretrained_backbone=True)
PRESETS = {
    "a": (
        "GLIP-T (A): no fusion; boxes with classes (Objects365).",
        Train(method=replace(START, fusion=False), run=grounding.TINY),
    ),
    "b": ("GLIP-T (B): deep fusion; boxes with classes (Objects365).", Train(method=START, run=grounding.TINY)),
    "c": ("GLIP-T (C): the same, with gold captions (Objects365, GoldG).", Train(method=START, run=grounding.TINY)),
    "t": (
        "GLIP-T: the same, with pseudo boxes of captioned images as well (the sidecar boxes).",
        Train(method=replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes")), run=grounding.TINY),
    ),
    "l": (
        "GLIP-L: Swin-L, eight blocks; more of everything.",
        Train(method=replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes"), **LARGE), run=BIG),
    ),
    "drawn": ("A small one in minutes on a core, for drawn data.", Train(method=Config(**SMALL), run=grounding.SMALL)),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        Train(method=Config(**SMALL), run=grounding.SMOKE, base="drawn_base", draw=32),
    ),
}


if __name__ == "__main__":
    run_job(
        PRESETS,
        pretrain_grounding,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
