#!/usr/bin/env python
"""Clean a snapshot: publish a new one with the samples that pass a row of filters.

    ray job submit --working-dir . -- python jobs/filter_dataset.py datacomp-basic --data s3://bucket/cc3m

The shards are not touched: the new snapshot says which samples its readers see, and training on the folder takes the
latest. ``--steps length size metaclip`` chooses filters and their order. Every dropped sample keeps its reason in
``_filters/``; a table of the funnel ends the job. The same command run again goes on where it was stopped.
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
    """A snapshot and the filters it goes through."""

    filters: Filters
    data: str = ""
    """The data set's folder (its latest snapshot) or folder@snapshot; any fsspec URI."""
    captions_sidecar: bool = False
    """Write the cleaned captions beside each tar, as the sidecar `captions`."""
    write_uids: str = ""
    """Also write what is left as a DataComp uid list (.npy)."""
    workers: Workers = field(default_factory=Workers)
    draw: int = 0
    """Without --data: samples of the embedded world to filter, drawn into a folder that goes when the job ends."""


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
    """Filter the snapshot; a job that draws its data does without."""
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
    """The table that ends the job: what each reason dropped, and what was left after it."""
    total = outcome.parent.samples
    lines = [f"{'filter':<22}{'reason':<22}{'dropped':>12}{'left':>14}{'':>9}"]
    for name, reason, count, left in outcome.funnel():
        share = f"{100 * left / max(total, 1):.1f} %"
        lines.append(f"{name or 'parent':<22}{reason or outcome.parent.id:<22}{count:>12,}{left:>14,}{share:>9}")
    return "\n".join([*lines, f"snapshot {outcome.snapshot.uri}: {outcome.snapshot.samples:,} samples"])


def drawn(job: FilterDataset, scratch: str) -> FilterDataset:
    """The job with data that are drawn now."""
    drawn_snapshot(Folder(scratch), job.draw, rows_per_shard=32)
    return replace(job, data=scratch)


if __name__ == "__main__":
    run_job(PRESETS, main)
