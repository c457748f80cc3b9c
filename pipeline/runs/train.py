"""A pre-training run of any method: settle it, train it, evaluate it beside the training, record what came out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pipeline.evaluation.showcase import snapshot_figure
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.mixture import parts_of
from pipeline.models.method import method_class, method_name
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.runs.evaluate import CheckpointEvaluation
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking, start
from pipeline.training.launch import follower, launch
from pipeline.training.run import Run, keep_tracking_run, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A method, its data, and what it is held against. A job says which method's config it takes."""

    method: Any
    run: Run = field(default_factory=Run)
    evaluations: Evaluations = field(default_factory=Evaluations)
    tracking: Tracking = field(default_factory=Tracking)
    draw: int = 0
    """Without --data: samples of the embedded world to train on, drawn into a folder that goes when the job ends."""


Job = TypeVar("Job", bound=Pretraining)


def run_pretraining(job: Pretraining) -> None:
    """Train in the places that the job names; a job that draws its data does without."""
    with in_place(job) as placed:
        pretrain(placed, keeps=bool(job.run.output_folder))


@contextmanager
def in_place(job: Job) -> Iterator[Job]:
    """The job with its places; what it was given none for is in a folder that goes at the end."""
    with TemporaryDirectory(prefix="clipmill-pretrain-") if job.draw else nullcontext("") as scratch:
        yield drawn(job, scratch) if job.draw else job
    if job.draw and not job.run.output_folder:
        logger.info("the run's folder was temporary and is gone; with --output-folder FOLDER it is kept")


def pretrain(job: Pretraining, keeps: bool = True) -> None:
    """Settle the run, then train it, evaluate it beside the training and register what came out, if it ``keeps`` it."""
    evaluates = bool(job.evaluations.prepare().sets)
    plan, record = prepare(job.method, job.run, evaluates=evaluates)
    method = method_class(method_name(job.method))
    with start(job.tracking, job, run_id=record.tracking_run) as tracker:
        keep_tracking_run(plan, record, tracker.run_id)
        for number, snapshot in enumerate(parts_of(plan.snapshot), start=1):
            tracker.log_dataset(snapshot, "training" if number == 1 else f"training_{number}")
        draw = partial(method.samples_figure, job.method, method.reader_settings(job.run))
        tracker.log_figure("samples", snapshot_figure(parts_of(plan.snapshot)[0], draw))
        evaluation = CheckpointEvaluation(evaluations=job.evaluations, run=tracker.handle)
        with follower(plan, evaluation) if evaluates else nullcontext() as beside:
            outcome = launch(plan, tracker.handle.open)
        metrics = beside.results.get(outcome.steps, {}) if beside else {}
        if keeps:
            tracker.register_checkpoint(outcome.checkpoint, metrics, outcome.steps, name=method.registered_as)


def drawn(job: Job, scratch: str) -> Job:
    """The job with places in ``scratch`` where it was given none: data that are drawn now, and the run's folder."""
    if not job.run.data:
        drawn_snapshot(Folder(f"{scratch}/data"), job.draw, rows_per_shard=32, card=None)  # a job names its own classes
    data, output_folder = job.run.data or f"{scratch}/data", job.run.output_folder or f"{scratch}/run"
    return replace(job, run=replace(job.run, data=data, output_folder=output_folder))
