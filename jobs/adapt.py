#!/usr/bin/env python
"""Adapt a CLIP from a few labelled images, by the protocols of the papers: methods x data sets x shots x seeds.

    python jobs/adapt.py few-shot --model runs/first --methods zero_shot coop tip_adapter_f \
        --data drawn_fine_grained drawn_shapes --shots 1 2 4 8 16 --seeds 1 2 3 --output runs/few-shot
    ray job submit --working-dir . -- python jobs/adapt.py base-to-new --model ViT-B-16-quickgelu:openai \
        --methods coop cocoop maple --data oxford_pets dtd --root s3://bucket/datasets --output s3://bucket/pets

Append a method's own options and its recipe's to its name: coop:class_specific=true,epochs=50. A data set is a card
with `few_shot`, a snapshot's folder, or a folder of class folders. Split files of cards are read from --root, which
holds folders named as in CoOp's DATASETS.md. Trials run in parallel on the cluster (--processes-count 0: one after the
other in this process), each with a part of a GPU if the cluster has GPUs. The same command resumes. With
--workers-per-trial each trial has several workers that share its classes, for ImageNet's thousand classes.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.evaluation.embedder import LoadEmbedder, Precision, Views
from pipeline.evaluation.ensemble import read_scores
from pipeline.evaluation.few_shot import Validation, draw, read_data_set
from pipeline.evaluation.point_clip import CloudViews
from pipeline.models.adapters.adapter import adapter_class
from pipeline.runs.few_shot import (
    ZERO_SHOT,
    Protocol,
    TrialRunner,
    check,
    check_scores,
    find_place,
    frozen_clip,
    parse_spec,
    plan_trials,
    prepare,
    run_trials,
)
from pipeline.runs.few_shot_records import FewShotRecord
from pipeline.shards.storage import Folder
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/adapted"
MOST_SHOTS = (16,)
ELEVEN = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"),
    *("sun397", "dtd", "eurosat", "ucf101"),
)
SHIFTED = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """One model; every method on every data set, with every number of shots and every seed."""

    model: str
    """Checkpoint of a CLIP, as in jobs/evaluate.py."""
    methods: tuple[str, ...]
    """Names of pipeline/models/adapters, each with optional :key=value,... that override the paper's values; templates=
    takes what --templates of jobs/evaluate.py takes."""
    data: tuple[str, ...]
    """Data sets to train on: cards with `few_shot`, folders of snapshots, or folders of class folders (maybe with
    train, val and test in them); NAME=FOLDER gives a folder a name."""
    output: str
    """Folder for images, features, results, adapters, table and plot; a path or a URI."""
    protocol: Protocol = "few_shot"
    """few_shot: test on the training classes; base_to_new: train on half of them; cross, generalise: on targets."""
    targets: tuple[str, ...] = ()
    """Test-only cards: other data sets (cross), or the same classes under a shift (generalise)."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Labelled images per class; a class with fewer images uses all of them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the sampling of shots and of the training."""
    validation: Validation = "few"
    """Validation images: few, min(shots, 4) of every class (CoOp), or the whole validation split (Tip-Adapter)."""
    root: str = ""
    """Folder with the folders of data sets with split files."""
    samples: int | None = None
    """Images of each part of a drawn set; replaces the card's number."""
    views: Views = field(default_factory=Views)
    """Views per shot, for methods that read features."""
    clouds: CloudViews = field(default_factory=lambda: CloudViews(projection="few_shot"))
    """Views of point clouds, for data sets of these; see docs/points.md."""
    precision: Precision = "fp32"
    """Precision of the image tower when features are computed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trials; auto uses GPUs if available."""
    gpus_per_trial: float = 0.25
    """Part of a GPU per trial, above 0, up to 1, so that several trials share one; not with `workers_per_trial`."""
    workers_per_trial: int = 1
    """If more than 1, trials run one after the other, each on this many workers (a GPU each) that share its classes."""
    keep_adapters: bool = True
    """Save each trial's trained tensors below OUTPUT/adapters."""
    keep_scores: bool = False
    """Save each trial's logits of test and validation samples below OUTPUT/scores, by key."""
    ensemble: str = ""
    """File of another classifier's scores of these samples, to be added to each trial's logits: docs/points.md."""
    ensemble_weight: float | None = None
    """Weight of these scores, 0 to 1; the method's logits get 1 - this. None: the best on the validation samples."""
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Record the job as an MLflow run, with a child run per trial."""
    tracking: Tracking = field(default_factory=lambda: Tracking(system_metrics=False))

    def __post_init__(self) -> None:
        for name in ("methods", "data", "shots", "seeds"):
            chosen = getattr(self, name)
            if not isinstance(chosen, tuple):  # a preset's placeholder for a required option
                continue
            require(len(chosen) > 0, name, chosen, "one or more")
            require(len(set(chosen)) == len(chosen), name, chosen, "each once")
        require(all(shots >= 1 for shots in self.shots), "shots", self.shots, "1 or more; zero_shot has none")
        require(all(0 <= seed < 2**32 for seed in self.seeds), "seeds", self.seeds, "0 to 2**32 - 1")
        require(0 < self.gpus_per_trial <= 1, "gpus_per_trial", self.gpus_per_trial, "more than 0, up to 1")
        require(self.workers_per_trial >= 1, "workers_per_trial", self.workers_per_trial, "1 or more")
        require(self.samples is None or self.samples >= 1, "samples", self.samples, "1 or more")
        methods = self.methods if isinstance(self.methods, tuple) else ()
        weight, zero = self.ensemble_weight, any(name.partition(":")[0] == ZERO_SHOT for name in methods)
        require(weight is None or 0 <= weight <= 1, "ensemble_weight", weight, "0 to 1")
        require(weight is None or bool(self.ensemble), "ensemble_weight", weight, "none without ensemble")
        few = self.protocol == "few_shot" or not (self.ensemble or self.keep_scores)
        require(few, "ensemble, keep_scores", (self.ensemble, self.keep_scores), "none but with the protocol few_shot")
        given = not (self.ensemble and zero) or weight is not None
        require(given, "ensemble_weight", weight, "a number with zero_shot, which has no validation samples")
        needs = self.protocol in ("cross", "generalise")
        require(needs == bool(self.targets), "targets", self.targets, "cards, with cross and generalise alone")


PRESETS: dict[str, tuple[str, Adapt]] = {
    "few-shot": (
        "1 to 16 images per class, tested on the same classes.",
        Adapt(model=tyro.MISSING, methods=tyro.MISSING, data=tyro.MISSING, output=tyro.MISSING),
    ),
    "base-to-new": (
        "Train on half of the classes, test on both halves, and report the harmonic mean.",
        Adapt(
            model=tyro.MISSING,
            methods=tyro.MISSING,
            data=tyro.MISSING,
            output=tyro.MISSING,
            protocol="base_to_new",
            shots=MOST_SHOTS,
        ),
    ),
    "cross": (
        "Train on ImageNet's classes, test on the ten other data sets.",
        Adapt(
            model=tyro.MISSING,
            methods=tyro.MISSING,
            data=ELEVEN[:1],
            targets=ELEVEN[1:],
            output=tyro.MISSING,
            protocol="cross",
            shots=MOST_SHOTS,
        ),
    ),
    "generalise": (
        "Train on ImageNet's classes, test on ImageNet V2, Sketch, A and R.",
        Adapt(
            model=tyro.MISSING,
            methods=tyro.MISSING,
            data=ELEVEN[:1],
            targets=SHIFTED,
            output=tyro.MISSING,
            protocol="generalise",
            shots=MOST_SHOTS,
        ),
    ),
    "smoke": (
        "Two methods and zero-shot with an untrained model on a few drawn images, in this process.",
        Adapt(
            model="clipmill-tiny:untrained",
            methods=(ZERO_SHOT, "tip_adapter_f", "coop:epochs=2,context=4"),
            data=("drawn_fine_grained",),
            output=SMOKE,
            shots=(1, 2),
            seeds=(1,),
            samples=36,
            views=Views(views=2),
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(run: Adapt) -> None:
    """Wire model, data sets and trials; checks all settings before data are read or embedded."""
    folder = Folder(writable_folder("output", run.output))
    specs = {spec.text: spec for spec in map(parse_spec, run.methods)}
    learned, tested = (
        {data.name: data for data in (read_data_set(name, run.root, run.samples) for name in names)}
        for names in (run.data, run.targets)
    )
    sets = {**tested, **learned}
    trials = plan_trials(run.protocol, list(specs.values()), list(learned), run.shots, run.seeds)
    drawings = {
        name: [
            draw(sets[name], trial.shots, trial.seed, run.validation)
            for trial in trials
            if trial.shots and trial.data == name
        ]
        for name in sets
    }
    if run.ensemble:
        scores = read_scores(run.ensemble)
        for data in learned.values():
            scores.check_classes(data.classes)
    place = find_place(run.device, run.gpus_per_trial, run.workers_per_trial, run.workers)
    clip = frozen_clip(run.model, "cpu" if place.device == "cuda" else place.device)
    for (name, _), trial in {(one.data, one.method): one for one in trials}.items():
        others = {key: one for key, one in tested.items() if key != name}
        check(trial, specs[trial.method], clip, sets[name], others, place.workers, run.clouds.views.count)
    embedder = LoadEmbedder(
        checkpoint=run.model, device=run.device, precision=run.precision, views=run.views, clouds=run.clouds
    )
    reads = {adapter_class(spec.method).reads for spec in specs.values()}
    with FewShotRecord(run.tracking, run, folder, run.track) as record:
        ready = {
            name: prepare(
                data,
                drawings[name],
                folder.folder("data").folder(name),
                None if reads == {"pixels"} else embedder,
                run.workers,
                place.device == "cuda",
                partial(check_scores, run.ensemble, run.ensemble_weight, drawings[name]) if run.ensemble else None,
            )
            for name, data in sets.items()
        }
        runner = TrialRunner(
            embedder=embedder,
            ready=ready,
            specs=specs,
            targets=tuple(tested),
            output=folder.uri,
            clip=clip.digest,
            validation=run.validation,
            keep_adapters=run.keep_adapters,
            keep_scores=run.keep_scores,
            ensemble=run.ensemble,
            ensemble_weight=run.ensemble_weight,
        )
        results = run_trials(runner, trials, run.workers, place, record.add)
        print(record.conclude(results, f"{run.protocol.replace('_', ' ')}, {run.model}"))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on and keeps the finished trials")
