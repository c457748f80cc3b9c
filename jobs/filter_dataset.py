#!/usr/bin/env python
"""Filter a snapshot: publish a new one with the samples that pass a sequence of filters.

    ray job submit --working-dir . -- python jobs/filter_dataset.py datacomp-basic --data s3://bucket/cc3m

The shards do not change: the new snapshot lists the samples that readers see, and training on the folder uses the
latest snapshot. ``--steps length size metaclip`` selects filters and their order. ``_filters/`` records why each sample
was dropped; the job prints a summary table. The same command resumes.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

from pipeline.config import require, run_job, writable_folder
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.filters.clip_score import ClipScore
from pipeline.stages.filters.datacomp import write_uids
from pipeline.stages.filters.options import Filters
from pipeline.stages.filters.run import FilterOutcome, filter_snapshot
from pipeline.stages.filters.size import Size
from pipeline.stages.shard_tasks import Workers


@dataclass(frozen=True, kw_only=True)
class FilterDataset:
    """A snapshot and its filters."""

    filters: Filters
    data: str = ""
    """Folder of the data set (its latest snapshot) or folder@snapshot; any fsspec URI."""
    captions_sidecar: bool = False
    """Write the cleaned captions beside each tar, as the sidecar `captions`."""
    write_uids: str = ""
    """Also write the remaining samples as a DataComp uid list (.npy)."""
    workers: Workers = field(default_factory=Workers)
    draw: int = 0
    """Without --data: number of samples of the embedded world to draw into a temporary folder and filter."""


BASIC = ("text", "length", "language", "size")
PRESETS = {
    "datacomp-basic": (
        "DataComp's basic filter: English, more than 2 words and 5 characters, 200 pixels, aspect 3.",
        FilterDataset(filters=Filters(steps=BASIC)),
    ),
    "datacomp-clip": (
        "The basic filter, then the best 30 % by CLIP score; needs the sidecar `embeddings`.",
        FilterDataset(filters=Filters(steps=(*BASIC, "clip_score"), clip_score=ClipScore(clip_fraction=0.3))),
    ),
    "laion": (
        "LAION-5B's English part: CLIP score from 0.28 on, English; needs the sidecar `embeddings`.",
        FilterDataset(filters=Filters(steps=("text", "clip_score", "language"))),
    ),
    "metaclip": (
        "MetaCLIP's balancing over --entries.",
        FilterDataset(filters=Filters(steps=("metaclip",))),
    ),
    "dedupe": (
        "Exact duplicates, then near ones by perceptual hash.",
        FilterDataset(filters=Filters(steps=("exact_duplicates", "near_duplicates"))),
    ),
    "semdedup": (
        "Duplicates by meaning; needs the sidecar `embeddings`.",
        FilterDataset(filters=Filters(steps=("semantic_duplicates",))),
    ),
    "custom": ("Any filters: --steps names them in order.", FilterDataset(filters=Filters(steps=()))),
    "smoke": (
        "Captions, sizes and duplicates of 64 drawn samples, in this process.",
        FilterDataset(
            filters=Filters(
                steps=("text", "length", "language", "repetition", "size", "exact_duplicates", "near_duplicates"),
                size=Size(min_side=48),
            ),
            draw=64,
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(job: FilterDataset) -> None:
    """Filter the snapshot; a job that draws its data needs none."""
    with TemporaryDirectory(prefix="clipmill-filter-") if job.draw and not job.data else nullcontext("") as scratch:
        ready = drawn(job, scratch) if scratch else job
        require(bool(ready.data), "data", ready.data, "the folder of a data set, or folder@snapshot")
        parent = read_snapshot(ready.data)
        outcome = filter_snapshot(parent, ready.filters.chosen(), ready.workers, ready.captions_sidecar)
        if ready.write_uids:
            place = writable_folder("write_uids", ready.write_uids)
            write_uids(outcome.snapshot, place, ready.filters.uids.uid_column)
        print(funnel(outcome))


def funnel(outcome: FilterOutcome) -> str:
    """The summary table: how many samples each reason dropped, and how many were left after it."""
    total = outcome.parent.samples
    lines = [f"{'filter':<22}{'reason':<22}{'dropped':>12}{'left':>14}{'':>9}"]
    for name, reason, count, left in outcome.funnel():
        share = f"{100 * left / max(total, 1):.1f} %"
        lines.append(f"{name or 'parent':<22}{reason or outcome.parent.id:<22}{count:>12,}{left:>14,}{share:>9}")
    return "\n".join([*lines, f"snapshot {outcome.snapshot.uri}: {outcome.snapshot.samples:,} samples"])


def drawn(job: FilterDataset, scratch: str) -> FilterDataset:
    """The job with newly drawn data."""
    drawn_snapshot(Folder(scratch), job.draw, rows_per_shard=32)
    return replace(job, data=scratch)


if __name__ == "__main__":
    run_job(PRESETS, main)
