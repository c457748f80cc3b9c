#!/usr/bin/env python
"""Image and text features of a snapshot by any CLIP, as a sidecar, and as files that clip-retrieval indexes.

    ray job submit --working-dir . -- python jobs/embed_dataset.py snapshot --data s3://bucket/cc3m \
        --checkpoint ViT-B-32:laion2b_s34b_b79k --export s3://bucket/cc3m-features

A checkpoint is what jobs/evaluate.py takes. Each shard gets a file of its own and is done once: the same command goes
on where it was stopped, after a refresh only new shards are read, and --name keeps several models' features apart.

    ... jobs/embed_dataset.py views --data s3://bucket/pets --checkpoint ViT-B-16:openai --views 10

keeps raw image features of the image and ten random crops of it instead, which few-shot methods train from.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.evaluation.embedder import LoadEmbedder, Precision, Views
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import EmbedOptions, FeatureExport, embed
from pipeline.stages.annotate.view_features import NAME
from pipeline.stages.shard_tasks import Workers

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/embedded"


@dataclass(frozen=True, kw_only=True)
class Embed:
    """One snapshot, one model."""

    data: str
    """The folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    checkpoint: str
    """Folder of a checkpoint or a run (path or URI), ARCHITECTURE:TAG, ARCHITECTURE:FILE, or ARCHITECTURE:untrained."""
    options: EmbedOptions = field(default_factory=EmbedOptions)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes GPUs where there are some."""
    precision: Precision = "fp32"
    """bf16 is faster on GPUs and counts as another model."""
    export: str = ""
    """Folder for img_emb/, text_emb/ and metadata/ as clip-retrieval reads them."""
    export_rows: int = 250_000
    """Rows of each exported file."""
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        require(self.export_rows >= 1, "export_rows", self.export_rows, "1 or more")


@dataclass(frozen=True, kw_only=True)
class EmbedViews(Embed):
    """Raw features of several views of every image."""

    options: EmbedOptions = field(default_factory=lambda: EmbedOptions(name=NAME, batch_size=32))
    views: Views = field(default_factory=Views)

    def __post_init__(self) -> None:
        require(not self.export, "export", self.export, "nothing: features of views are not exported")


@dataclass(frozen=True, kw_only=True)
class Smoke(Embed):
    """As the job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, Embed]] = {
    "snapshot": ("The snapshot in a folder.", Embed(data=tyro.MISSING, checkpoint=tyro.MISSING)),
    "views": (
        "Raw features of each image and of random crops of it, for few-shot methods.",
        EmbedViews(data=tyro.MISSING, checkpoint=tyro.MISSING),
    ),
    "smoke": (
        "Sixty-four drawn samples by an untrained model, in this process.",
        Smoke(
            data=f"{SMOKE}/data",
            checkpoint="clipmill-tiny:untrained",
            export=f"{SMOKE}/features",
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(run: Embed) -> None:
    """Wire snapshot, model and workers."""
    export = writable_folder("export", run.export) if run.export else ""
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    views = run.views if isinstance(run, EmbedViews) else None
    model = LoadEmbedder(checkpoint=run.checkpoint, device=run.device, precision=run.precision, views=views)
    use_gpu = None if run.device == "auto" else run.device == "cuda"
    snapshot = embed(read_snapshot(run.data), model, run.options, run.workers, use_gpu)
    print(f"{snapshot.uri}: {run.options.name} of {sum(shard.stored for shard in snapshot.shards)} samples")
    if export:
        exported = FeatureExport(
            snapshot=snapshot, folder=Folder(export), name=run.options.name, rows_per_file=run.export_rows
        )
        print(f"{export}: {exported.write(run.workers)} rows in {exported.files} files")


if __name__ == "__main__":
    run_job(PRESETS, main)
