"""What the jobs of GLIP and GLIPv2 share: schedules, and how classes and initial weights become settings.

The schedules are those of GLIP's paper (Li, Zhang et al. 2021, arXiv 2112.03857) and of the authors' settings. A job
shows where it differs.
"""

from dataclasses import dataclass, replace

from pipeline.loaders.batches import LoaderConfig
from pipeline.loaders.classes import base_classes
from pipeline.runs.train import Pretraining, in_place, pretrain
from pipeline.training.checkpoint import resolved
from pipeline.training.optimizer import AdamW
from pipeline.training.run import Cluster, Run

TINY = Run(
    workers=32,
    precision="bf16",
    batch_size=64,
    epochs=30,
    warmup_steps=2000,
    clip_grad_norm=1.0,
    ema_decay=0.999,
    checkpoint_activations=True,
    optimizer=AdamW(
        learning_rate=1e-4,
        first_learning_rate=1e-7,
        weight_decay=1e-4,
        beta2=0.999,
        epsilon=1e-8,
        text_rate=0.1,
        drops=(0.67, 0.89),
    ),
    cluster=Cluster(accelerator="gpu", cpus_per_worker=10),
    loader=LoaderConfig(loader_workers=8),
    evaluate_every_steps=20_000,
)
"""GLIP-T's pre-training."""
LARGE = replace(TINY, workers=64, ema_decay=None, optimizer=replace(TINY.optimizer, weight_decay=0.01))
"""GLIP-L's, without its number of steps."""
SMALL = Run(
    batch_size=8,
    epochs=5,
    warmup_steps=30,
    clip_grad_norm=1.0,
    optimizer=AdamW(learning_rate=1e-3, weight_decay=1e-4, beta2=0.999),
    log_every_steps=25,
    loader=LoaderConfig(loader_workers=1),
)
"""Small networks on drawn images, in minutes on a core."""
SMOKE = replace(SMALL, steps=3, warmup_steps=1, log_every_steps=1, loader=LoaderConfig(loader_workers=0))
"""Three steps in this process."""


@dataclass(frozen=True, kw_only=True)
class GroundingPretraining(Pretraining):
    """A method that is trained on boxes with class names and on captions with boxes; a job sets the method's config."""

    base: str = ""
    """Card whose classes, except the novel ones, are trained on, or `data` for those of the data without its novel
    ones; if empty, all classes of the data. --class-names take precedence."""


def pretrain_grounding(job: GroundingPretraining) -> None:
    """Resolve classes and initial weights, then train in the job's folders; a job that draws its data needs none."""
    method = replace(
        job.method,
        class_names=job.method.class_names or base_classes(job.base, job.run.data),
        start_from=resolved(job.method.start_from),
    )
    with in_place(replace(job, method=method)) as placed:
        pretrain(placed, keeps=bool(job.run.output_folder))
