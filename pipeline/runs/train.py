"""A training run of any method: resolve its settings, train it, evaluate it beside the training, record the results."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from pipeline.config import writable_folder
from pipeline.evaluation.report import table
from pipeline.evaluation.showcase import snapshot_figure
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.mixture import TrainingData, parts_of
from pipeline.models.method import method_class, method_name
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.runs.evaluate import CheckpointEvaluation
from pipeline.shards.lease import Lease, lease
from pipeline.shards.sidecar import Wanted, read_sidecar_schema, sidecar_facts, sidecar_file
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking, start
from pipeline.training.launch import follower, launch
from pipeline.training.run import Run, keep_tracking_run, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A method, its training data, and its evaluations. A subclass in each job sets the method's config."""

    drawn_options: ClassVar[Mapping[str, object]] = {}
    """Options of the source ``drawn`` for data that the job draws, such as ``sound``."""

    method: Any
    run: Run = field(default_factory=Run)
    evaluations: Evaluations = field(default_factory=Evaluations)
    tracking: Tracking = field(default_factory=Tracking)
    draw: int = 0
    """Without --data: number of samples of the embedded world to draw into a temporary folder and train on."""


Job = TypeVar("Job", bound=Pretraining)


def run_pretraining(job: Pretraining) -> None:
    """Train in the job's folders; a job that draws its data needs none."""
    with in_place(job) as placed:
        pretrain(placed, keeps=bool(job.run.output_folder))


@contextmanager
def in_place(job: Job) -> Iterator[Job]:
    """The job with all folders; missing ones are created in a temporary folder that is deleted at the end."""
    with TemporaryDirectory(prefix="clipmill-pretrain-") if job.draw else nullcontext("") as scratch:
        yield drawn(job, scratch) if job.draw else job
    if job.draw and not job.run.output_folder:
        logger.info("the run's folder was temporary and is deleted; --output-folder FOLDER keeps it")


def pretrain(job: Pretraining, keeps: bool = True) -> None:
    """Resolve the run, train it, evaluate it beside the training and, if it ``keeps`` it, register the result.

    Raises:
        StorageError: another training holds the output folder.
    """
    evaluates = bool(job.evaluations.prepare().sets)
    with lease(Folder(writable_folder("output_folder", job.run.output_folder)), "a training") as held:
        _pretrain(job, evaluates, keeps, held)


def _pretrain(job: Pretraining, evaluates: bool, keeps: bool, held: Lease) -> None:
    plan, record = prepare(job.method, job.run, evaluates=evaluates, guard=held.spaced)
    method = method_class(method_name(job.method))
    token = record.tracking_token
    with start(job.tracking, job, run_id=record.tracking_run, token=token, once=True) as tracker:
        keep_tracking_run(plan, record, tracker.run_id)
        for number, snapshot in enumerate(parts_of(plan.snapshot), start=1):
            tracker.log_dataset(snapshot, "training" if number == 1 else f"training_{number}")
        settings = method.reader_settings(job.run)
        tracker.set_tags(teacher_tags(plan.snapshot, method.sidecars(job.method, settings)))
        draw = partial(method.samples_figure, job.method, settings)
        tracker.log_figure("samples", snapshot_figure(parts_of(plan.snapshot)[0], draw))
        evaluation = CheckpointEvaluation(evaluations=job.evaluations, run=tracker.handle)
        with follower(plan, evaluation) if evaluates else nullcontext() as beside:
            outcome = launch(plan, tracker.handle.open)
        metrics = beside.results.get(outcome.steps, {}) if beside else {}
        held.check()
        tracker.describe(table(metrics), outcome.checkpoint if keeps else "")
        if keeps:
            tracker.register_checkpoint(outcome.checkpoint, metrics, outcome.steps, name=method.registered_as)


def teacher_tags(data: TrainingData, sidecars: Sequence[Wanted]) -> dict[str, str]:
    """What the sidecars that a run reads say about their teacher, such as ``boxes.teacher_run``, as tags.

    Raises:
        SidecarError: a sidecar is missing or unreadable.
    """
    tags: dict[str, str] = {}
    for part in parts_of(data):
        folder = Folder(part.folder)
        for wanted in sidecars:
            shard = next((one for one in part.shards if wanted.name in one.sidecars), None)
            if shard is not None:
                file = folder.join(sidecar_file(shard, wanted.name))
                facts = sidecar_facts(read_sidecar_schema(folder, shard, wanted.name, wanted.job), file, wanted.job)
                named = {key: value for key, value in facts.items() if key.startswith("teacher") and value}
                tags |= {f"{wanted.name}.{key}": str(value) for key, value in named.items()}
    return tags


def drawn(job: Job, scratch: str) -> Job:
    """The job with newly drawn data and a run folder in ``scratch``, where it has none."""
    if not job.run.data:
        # Without a card: a job names its own classes.
        drawn_snapshot(Folder(f"{scratch}/data"), job.draw, rows_per_shard=32, card=None, more=job.drawn_options)
    data, output_folder = job.run.data or f"{scratch}/data", job.run.output_folder or f"{scratch}/run"
    return replace(job, run=replace(job.run, data=data, output_folder=output_folder))
