#!/usr/bin/env python
"""Train GLIPv2, a detector that also compares regions with the words of other images, and draws masks.

    ray job submit --working-dir . -- python jobs/pretrain_glipv2.py t --output-folder s3://bucket/runs/glipv2-t \
        --data s3://bucket/objects365=0.4,s3://bucket/goldg=0.3,s3://bucket/cap4m=0.3
    ray job submit --working-dir . -- python jobs/pretrain_glipv2.py masks --output-folder s3://bucket/runs/glipv2-m \
        --start-from s3://bucket/runs/glipv2-t --data s3://bucket/coco

The data are GLIP's: see docs/grounding.md. --start-from begins with released weights of GLIP, a run of GLIP or a run of
GLIPv2; `masks` trains the mask head alone. jobs/finetune_glipv2.py goes on with captions and questions.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import run_job
from pipeline.models.glipv2.config import BASE, DRAWN, HUGE, Config
from pipeline.runs.grounding import LARGE, SMALL, SMOKE, TINY, GroundingPretraining, pretrain_grounding


@dataclass(frozen=True, kw_only=True)
class TrainGlipv2(GroundingPretraining):
    """A GLIPv2, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)


SEGMENTING = replace(TINY, workers=8, batch_size=32, epochs=12, ema_decay=None, warmup_steps=500)
START = Config(pretrained_backbone=True)
START = replace(START, grounding=replace(START.grounding, pseudo_boxes="boxes"))
PRESETS = {
    "t": (
        "GLIPv2-T: Swin-T; Objects365, GoldG and captions with pseudo boxes. The schedule is GLIP-T's.",
        TrainGlipv2(method=START, run=TINY),
    ),
    "b": (
        "GLIPv2-B (recalled): Swin-B and CLIP's text tower. The schedule is GLIP-L's.",
        TrainGlipv2(method=replace(START, **BASE), run=LARGE),
    ),
    "h": (
        "GLIPv2-H (recalled): Swin-L, since CoSwin-H is not public. The schedule is GLIP-L's.",
        TrainGlipv2(method=replace(START, **HUGE), run=LARGE),
    ),
    "masks": (
        "The mask head of a trained GLIPv2-T, on data with masks (COCO, LVIS).",
        TrainGlipv2(method=Config(masks="head"), run=SEGMENTING),
    ),
    "drawn": (
        "A small one with masks, in minutes on a core, for drawn data.",
        TrainGlipv2(method=Config(**DRAWN), run=SMALL),
    ),
    "smoke": (
        "Three steps on 32 drawn samples, in this process.",
        TrainGlipv2(method=Config(**DRAWN), run=SMOKE, base="drawn_base", draw=32),
    ),
}


if __name__ == "__main__":
    run_job(
        PRESETS,
        pretrain_grounding,
        "the same command goes on from the last checkpoint, or from the beginning if there is none",
    )
