#!/usr/bin/env python
"""Find the nouns, verbs and noun phrases of a snapshot's captions, as a sidecar for GroupViT and pseudo boxes.

    ray job submit --working-dir . -- python jobs/extract_phrases.py snapshot --data s3://bucket/cc3m

--extractor rules needs no download; spacy:MODEL and nltk are more exact where they are installed. Each shard gets its
own file and is processed once: the same command resumes, and after a refresh reads only new shards.
"""

import getpass
import tempfile
from dataclasses import dataclass, field

import tyro

from pipeline.config import require, run_job
from pipeline.loaders.phrases import ReadSampleCaptions
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.extractor import load_extractor
from pipeline.stages.annotate.phrases import NAME, LoadPhraseMaker, PhraseStatistics, read_statistics
from pipeline.stages.shard_tasks import Workers
from pipeline.tracking.runs import Tracking, open_tracker

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/phrases"
SHOWN_NOUNS = 10


@dataclass(frozen=True, kw_only=True)
class ExtractPhrases:
    """One snapshot, one extractor."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    extractor: str = "rules"
    """Extractor: rules, nltk, spacy or spacy:MODEL (a spaCy pipeline's name or folder)."""
    caption: str = "txt"
    """Field of the captions: txt, json:KEY, or auto (the list `captions` of the json, else txt)."""
    name: str = NAME
    """Name of the sidecar, an identifier; use one name per extractor to store phrases of several extractors."""
    overwrite: bool = False
    """Replace phrases of another extractor or caption field."""
    workers: Workers = field(default_factory=Workers)
    track: bool = True
    """Log the results to MLflow."""
    tracking: Tracking = field(
        default_factory=lambda: Tracking(
            experiment="clipmill-data", primary_metric="phrases/phrases_per_caption", system_metrics=False
        )
    )

    def __post_init__(self) -> None:
        require(bool(self.data), "data", self.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")
        ReadSampleCaptions(caption=self.caption)


@dataclass(frozen=True, kw_only=True)
class Smoke(ExtractPhrases):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, ExtractPhrases]] = {
    "snapshot": ("The snapshot in a folder.", ExtractPhrases(data=tyro.MISSING)),
    "smoke": (
        "Sixty-four drawn captions, in this process.",
        Smoke(data=f"{SMOKE}/data", workers=Workers(processes_count=0), track=False),
    ),
}


def main(run: ExtractPhrases) -> None:
    """Wire snapshot, extractor and tracker."""
    load_extractor(run.extractor)
    annotation = Annotation(name=run.name, overwrite=run.overwrite)
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    captions = ReadSampleCaptions(caption=run.caption)
    load = LoadPhraseMaker(extractor=run.extractor, caption=run.caption, captions=captions)
    with open_tracker(run.tracking, run, new=run.track) as tracker:
        snapshot = annotate(read_snapshot(run.data), load, annotation, run.workers, use_gpu=False)
        tracker.log_dataset(snapshot, run.name)
        shards = [shard for shard in snapshot.shards if run.name in shard.sidecars]
        found = [read_statistics(Folder(snapshot.folder), shard, run.name) for shard in shards]
        for number, one in enumerate(found):
            tracker.log({f"phrases/shard_{name}": value for name, value in one.metrics().items()}, number)
        whole = sum(found, PhraseStatistics())
        tracker.log({f"phrases/{name}": value for name, value in whole.metrics().items()}, len(found))
        tracker.log_text("phrases/nouns.txt", whole.table())
        print(f"{snapshot.uri}: {whole}")
        print("most common nouns: " + ", ".join(f"{noun} {count}" for noun, count in whole.most_common(SHOWN_NOUNS)))


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on and keeps the finished shards")
