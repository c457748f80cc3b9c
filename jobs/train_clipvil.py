#!/usr/bin/env python
"""Train CLIP-ViL: a transformer that answers questions about images from the grid of CLIP's image tower.

    ray job submit --working-dir . -- python jobs/train_clipvil.py vqa --data s3://bucket/vqa-train \
        --vqa val=s3://bucket/vqa-val --output-folder s3://bucket/runs/clipvil
    python jobs/train_clipvil.py drawn --data data/drawn --vqa val=data/drawn-val --output-folder runs/clipvil

A frozen tower can read stored grids: jobs/embed_dataset.py grid writes them, the preset vqa-frozen reads them.
--start-from RUN goes on from a pre-training. Questions, their sources and the recipes: docs/questions.md. The same
command resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field, replace

from pipeline.config import require, run_job
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.grounding_prompts import DRAWN_QUESTIONS
from pipeline.models.clipvil import SMALLEST, Config
from pipeline.runs.answers import answers_of
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.shards.objects import FIELD
from pipeline.sources.questions import RELATIONS
from pipeline.training.checkpoint import clip_address, resolved
from pipeline.training.optimizer import AdamW, AdamWWithSgd
from pipeline.training.run import Cluster, Run


@dataclass(frozen=True, kw_only=True)
class TrainClipVil(Pretraining):
    """A CLIP-ViL, its training data, and its evaluations."""

    method: Config = field(default_factory=Config)
    most_answers: int = 3129
    """Number of possible answers, the most frequent ones of the data; not used with --answers."""
    least_count: int = 1
    """Minimum number of questions with an answer for it to be possible."""

    def __post_init__(self) -> None:
        require(self.most_answers >= 2, "most_answers", self.most_answers, "2 or more")
        require(self.least_count >= 1, "least_count", self.least_count, "1 or more")
        both = self.method.frozen and isinstance(self.run.optimizer, AdamWWithSgd)
        allowed = "False with two optimisers, one of which trains the tower; the preset vqa-frozen has AdamW alone"
        require(not both, "frozen", self.method.frozen, allowed)


# The authors' fine-tuning for VQA: five passes over the questions, 5.4 of each image; warm-up 5 % of the steps, here of
# the training split's.
RATES = {"learning_rate": 5e-5, "weight_decay": 0.01, "beta2": 0.999, "epsilon": 1e-6, "decay_power": 1.0}
ADAMW = AdamW(**RATES)
TRANSFORMER = AdamWWithSgd(**RATES, sgd_learning_rate=1e-3, sgd_drops=(0.4,))
FINETUNED = Run(
    workers=8,
    precision="bf16",
    batch_size=256,
    epochs=27,
    warmup_steps=440,
    optimizer=TRANSFORMER,
    clip_grad_norm=1.0,
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
    evaluate_every_steps=2500,
)
# Two stages over LXMERT's pairs of COCO and Visual Genome, recalled as 51 texts of each of 180,000 images.
FIRST = replace(
    FINETUNED,
    batch_size=512,
    epochs=9 * 51,
    warmup_steps=8000,
    optimizer=replace(TRANSFORMER, learning_rate=1e-4, sgd_learning_rate=3e-3, sgd_drops=(0.8,)),
    caption="json:captions",
)
SECOND = replace(FIRST, epochs=11 * 51, optimizer=replace(FIRST.optimizer, learning_rate=5e-5))
LARGE = Config(tower="RN50x4-quickgelu:openai")
PRETRAINING = replace(LARGE, task="pretrain", most_cells=100)
SMALL = Config(
    tower="clipmill-small:untrained",
    image_size=(128, 128),
    text=DRAWN_QUESTIONS,
    small_text=(128, 3, 4),
    dropout=0.0,
    questions=FIELD,
)
ON_A_CPU = Run(
    batch_size=64,
    epochs=12,
    warmup_steps=100,
    optimizer=AdamW(learning_rate=5e-4, weight_decay=0.01),
    clip_grad_norm=1.0,
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
SMOKE = replace(
    ON_A_CPU, batch_size=8, steps=3, epochs=1, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0)
)
PRESETS = {
    "vqa": (
        "VQA v2 with RN50x4, end to end.",
        TrainClipVil(method=LARGE, run=FINETUNED, least_count=9),
    ),
    "vqa-frozen": (
        "VQA v2 from stored grids of a frozen RN50x4; the rates are those of vqa.",
        TrainClipVil(
            method=replace(LARGE, frozen=True, grid="grid"), run=replace(FINETUNED, optimizer=ADAMW), least_count=9
        ),
    ),
    "snli-ve": (
        "SNLI-VE's three classes; rates as for VQA.",
        TrainClipVil(
            method=replace(LARGE, loss="single", answers=RELATIONS, text_tokens=40),
            run=replace(FINETUNED, epochs=90, warmup_steps=520),
        ),
    ),
    "gqa": (
        "GQA's balanced questions; rates as for VQA.",
        TrainClipVil(method=LARGE, run=replace(FINETUNED, epochs=65, warmup_steps=900), most_answers=1842),
    ),
    "pretrain": (
        "Pre-training on captions: masked words and matching.",
        TrainClipVil(method=replace(PRETRAINING, questions=""), run=FIRST),
    ),
    "pretrain-answers": (
        "The second stage, with questions as well; begins with --start-from.",
        TrainClipVil(method=PRETRAINING, run=SECOND, most_answers=9500),
    ),
    "drawn": ("Questions about drawn images, in minutes on a core.", TrainClipVil(method=SMALL, run=ON_A_CPU)),
    "drawn-pretrain": (
        "Pre-training on drawn captions and questions.",
        TrainClipVil(method=replace(SMALL, task="pretrain", most_cells=32, text_tokens=40), run=ON_A_CPU),
    ),
    "smoke": (
        "Three steps on 32 drawn samples with questions, in this process.",
        TrainClipVil(
            method=replace(SMALLEST, task="answers", answers=()), run=SMOKE, evaluations=Evaluations(), draw=32
        ),
    ),
}


def main(job: TrainClipVil) -> None:
    """Resolve the initial weights and, once the data exist, the answers."""
    method = job.method
    method = replace(method, start_from=resolved(method.start_from), tower=clip_address(method.tower))
    with in_place(replace(job, method=method)) as placed:
        pretrain(answered(placed), keeps=bool(job.run.output_folder))


def answered(job: TrainClipVil) -> TrainClipVil:
    """The job with the most frequent answers of its data, where it needs some."""
    method = job.method
    if method.answers or not method.asks:
        return job
    answers = answers_of(job.run, method.questions, job.most_answers, job.least_count)
    return replace(job, method=replace(method, answers=answers))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on from the last checkpoint, or from the beginning if there is none")
