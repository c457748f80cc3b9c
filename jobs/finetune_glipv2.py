#!/usr/bin/env python
"""Fine-tune a GLIPv2 to write captions or to answer questions about images.

    ray job submit --working-dir . -- python jobs/finetune_glipv2.py captions --start-from s3://bucket/runs/glipv2-t \
        --data s3://bucket/coco_captions --captioning val=s3://bucket/coco_val --output-folder s3://bucket/runs/captions
    ray job submit --working-dir . -- python jobs/finetune_glipv2.py answers --start-from s3://bucket/runs/glipv2-t \
        --data s3://bucket/vqa --vqa val=s3://bucket/vqa_val --output-folder s3://bucket/runs/answers

The network's options have to be those of the run in --start-from. Captions are in --caption; questions are in the
sample's boxes.json or json: see docs/grounding.md.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import require, run_job
from pipeline.models.glip.config import SMALL as SMALL_NETWORK
from pipeline.models.glipv2.config import BASE, HUGE
from pipeline.models.glipv2_language import Config
from pipeline.runs.answers import answers_of
from pipeline.runs.grounding import SMALL, SMOKE, TINY
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.training.checkpoint import resolved
from pipeline.training.optimizer import AdamW


@dataclass(frozen=True, kw_only=True)
class FinetuneGlipv2(Pretraining):
    """A GLIPv2 with a head for captions or answers, its data, and its evaluations."""

    method: Config = field(default_factory=Config)
    most_answers: int = 3129
    """Number of possible answers, the most frequent ones of the data; not used with --answers."""


GPUS = replace(
    TINY,
    workers=8,
    epochs=10,
    warmup_steps=1000,
    ema_decay=None,
    optimizer=AdamW(learning_rate=1e-4, weight_decay=1e-4, beta2=0.999, epsilon=1e-8, text_rate=0.1, image_rate=0.1),
    evaluate_every_steps=5000,
)
DRAWN = Config(**SMALL_NETWORK)
ASKED = replace(DRAWN, task="answers")
PRESETS = {
    "captions": ("Captions with GLIPv2-T. Rates and epochs are ours.", FinetuneGlipv2(run=GPUS)),
    "answers": (
        "Answers with GLIPv2-T. Rates and epochs are ours.",
        FinetuneGlipv2(method=Config(task="answers"), run=GPUS),
    ),
    "captions-b": ("The same with GLIPv2-B.", FinetuneGlipv2(method=Config(**BASE), run=GPUS)),
    "answers-b": ("The same with GLIPv2-B.", FinetuneGlipv2(method=Config(task="answers", **BASE), run=GPUS)),
    "captions-h": ("The same with GLIPv2-H.", FinetuneGlipv2(method=Config(**HUGE), run=GPUS)),
    "answers-h": ("The same with GLIPv2-H.", FinetuneGlipv2(method=Config(task="answers", **HUGE), run=GPUS)),
    "drawn-captions": ("Captions of drawn data, in minutes on a core.", FinetuneGlipv2(method=DRAWN, run=SMALL)),
    "drawn-answers": ("Answers about drawn data, in minutes on a core.", FinetuneGlipv2(method=ASKED, run=SMALL)),
    "smoke": (
        "Three steps on 32 drawn samples with questions, in this process.",
        FinetuneGlipv2(method=ASKED, run=SMOKE, draw=32),
    ),
}


def main(job: FinetuneGlipv2) -> None:
    """Resolve the initial weights and, once the data exist, the answers."""
    require(job.most_answers >= 2, "most_answers", job.most_answers, "2 or more")
    method = replace(job.method, start_from=resolved(job.method.start_from))
    with in_place(replace(job, method=method)) as placed:
        pretrain(with_answers(placed), keeps=bool(job.run.output_folder))


def with_answers(job: FinetuneGlipv2) -> FinetuneGlipv2:
    """The job with the most frequent answers of its data, where it needs some."""
    method = job.method
    if method.task == "captions" or method.answers:
        return job
    answers = answers_of(job.run, method.questions, job.most_answers)
    return replace(job, method=replace(method, answers=answers))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on from the last checkpoint, or from the beginning if there is none")
