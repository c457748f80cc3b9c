#!/usr/bin/env python
"""Find the phrases of captions in their images with a teacher, as a sidecar of pseudo boxes.

    ray job submit --working-dir . -- python jobs/annotate_pseudo_boxes.py checkpoint \
        --data s3://bucket/cc3m --teacher s3://bucket/runs/glip

Any method with `ground` can be the teacher, and so can Grounding DINO and OWLv2 from transformers. Phrases come from an
extractor (--phrases rules), from a sidecar of jobs/extract_phrases.py (--phrases sidecar:phrases) or from the data
(--phrases boxes.json). Each shard gets its own file and is processed once: the same command resumes.

Boxes with a score of at least --least-score are stored; training requires a higher one (--least-box-score).
"""

import getpass
import tempfile
from dataclasses import dataclass, field, replace

import tyro

from pipeline.config import require, run_job
from pipeline.evaluation.grounding_teachers import LoadGroundingTeacher, untrained_teacher
from pipeline.evaluation.pseudo_box_figures import pseudo_box_figure, score_figure
from pipeline.loaders.phrases import ReadSampleCaptions
from pipeline.models.glip import Glip
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.objects import FIELD
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.caption_phrases import AnnotatedPhrases, ExtractedPhrases, PhraseSource, StoredPhrases
from pipeline.stages.annotate.pseudo_box_maker import GroundingTeacher, PseudoBoxOptions, make_pseudo_boxes
from pipeline.stages.annotate.pseudo_boxes import PseudoBoxCounts, read_counts
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking, open_tracker

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/pseudo-boxes"
SIDECAR = "sidecar:"


@dataclass(frozen=True, kw_only=True)
class AnnotatePseudoBoxes:
    """One snapshot, one teacher."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    model: LoadGroundingTeacher
    phrases: str = "rules"
    """Source of the phrases: an extractor (rules, nltk, spacy or spacy:MODEL), sidecar:NAME of jobs/extract_phrases.py,
    or boxes.json for the phrases in the data."""
    caption: str = "txt"
    """Field of the captions: txt, json:KEY, or auto (the list `captions` of the json, else txt)."""
    options: PseudoBoxOptions = field(default_factory=PseudoBoxOptions)
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Log the results to MLflow."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(
            experiment="clipmill-data", primary_metric="pseudo_boxes/boxes_per_caption", system_metrics=False
        )
    )

    def __post_init__(self) -> None:
        require(bool(self.data), "data", self.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
        allowed = f"an extractor, {SIDECAR}NAME or {FIELD}"
        require(self.phrases not in ("", SIDECAR), "phrases", self.phrases, allowed)
        ReadSampleCaptions(caption=self.caption)


@dataclass(frozen=True, kw_only=True)
class Smoke(AnnotatePseudoBoxes):
    """The same job with an untrained teacher, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, AnnotatePseudoBoxes]] = {
    "checkpoint": (
        "By a method of ours, such as of jobs/pretrain_glip.py.",
        AnnotatePseudoBoxes(data=tyro.MISSING, model=LoadGroundingTeacher(teacher=tyro.MISSING)),
    ),
    "grounding-dino": (
        "By Grounding DINO with a Swin-T.",
        AnnotatePseudoBoxes(
            data=tyro.MISSING, model=LoadGroundingTeacher(teacher="grounding-dino:IDEA-Research/grounding-dino-tiny")
        ),
    ),
    "owlv2": (
        "By OWLv2 with a ViT-B/16.",
        AnnotatePseudoBoxes(
            data=tyro.MISSING, model=LoadGroundingTeacher(teacher="owlv2:google/owlv2-base-patch16-ensemble")
        ),
    ),
    "smoke": (
        "Sixteen drawn samples by an untrained GLIP, in this process.",
        Smoke(
            data=f"{SMOKE}/data",
            model=LoadGroundingTeacher(teacher="untrained", device="cpu"),
            options=PseudoBoxOptions(least_score=0.0, most=10),
            workers=Workers(processes_count=0),
            track=False,
        ),
    ),
}


def main(run: AnnotatePseudoBoxes) -> None:
    """Wire snapshot, teacher, phrases and tracker."""
    load = untrained if isinstance(run, Smoke) else run.model
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data), samples=16, rows_per_shard=8)
    use_gpu = None if run.model.device == "auto" else run.model.device == "cuda"
    name, given = run.options.name, read_snapshot(run.data)
    with open_tracker(run.tracking, run, new=run.track) as tracker:
        snapshot = make_pseudo_boxes(given, load, phrases_of(run, given), run.options, run.workers, use_gpu)
        tracker.log_dataset(snapshot, name)
        shards = [shard for shard in snapshot.shards if name in shard.sidecars]
        found = [read_counts(Folder(snapshot.folder), shard, name) for shard in shards]
        for number, one in enumerate(found):
            tracker.log({f"pseudo_boxes/shard_{key}": value for key, value in one.metrics().items()}, number)
        whole = sum(found, PseudoBoxCounts())
        tracker.log({f"pseudo_boxes/{key}": value for key, value in whole.metrics().items()}, len(found))
        tracker.log_figure("scores", score_figure(whole))
        tracker.log_figure("samples", pseudo_box_figure(snapshot, name, run.options.least_score))
        print(f"{snapshot.uri}: {whole}")


def phrases_of(run: AnnotatePseudoBoxes, snapshot: Snapshot) -> PhraseSource:
    """The source that ``run.phrases`` names."""
    captions = ReadSampleCaptions(caption=run.caption)
    if run.phrases == FIELD:
        return AnnotatedPhrases()
    if run.phrases.startswith(SIDECAR):
        return StoredPhrases(snapshot, run.phrases.removeprefix(SIDECAR), run.caption, captions)
    return ExtractedPhrases(run.phrases, captions)


def untrained(threads: int) -> GroundingTeacher:
    """The smallest GLIP with random weights, which finds everything with low scores."""
    return untrained_teacher(replace(Glip.smallest(), least_score=0.0))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on and keeps the finished shards")
