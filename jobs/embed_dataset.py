#!/usr/bin/env python
"""Compute features of a snapshot's images, sounds and captions, as a sidecar and as files that clip-retrieval indexes.

    ray job submit --working-dir . -- python jobs/embed_dataset.py snapshot --data s3://bucket/cc3m \
        --checkpoint ViT-B-32:laion2b_s34b_b79k --export s3://bucket/cc3m-features

For checkpoint addresses see jobs/evaluate.py. Each shard gets its own file and is processed once: the same command
resumes, and after a refresh reads only new shards. --name keeps the features of several models apart.

    ... jobs/embed_dataset.py views --data s3://bucket/pets --checkpoint ViT-B-16-quickgelu:openai --views 10

stores raw features of each image and of ten random crops of it instead, the training data of few-shot methods.

    ... jobs/embed_dataset.py frames --data s3://bucket/msrvtt --checkpoint ViT-B-32-quickgelu:openai

stores raw features of one frame a second of every video, for methods over frozen features and for search.

    ... jobs/embed_dataset.py grid --data s3://bucket/vqa --checkpoint RN50-quickgelu:openai --image-size 384 640

stores the features of all cells of every image before they are pooled, for answers to questions about images.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.evaluation.embedder import LoadEmbedder, Precision, Views
from pipeline.evaluation.frame_embedder import FrameRate, LoadFrameEmbedder
from pipeline.evaluation.grid_embedder import GridSize, LoadGridEmbedder
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate import frame_features, grid_features, view_features
from pipeline.stages.annotate.embeddings import EmbedOptions, FeatureExport, embed
from pipeline.stages.annotate.frame_features import embed_frames
from pipeline.stages.annotate.grid_features import embed_grids
from pipeline.stages.shard_tasks import Workers

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/embedded"


@dataclass(frozen=True, kw_only=True)
class Embed:
    """One snapshot, one model."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    checkpoint: str
    """Folder of a checkpoint or a run (path or URI), ARCHITECTURE:TAG, ARCHITECTURE:FILE, or ARCHITECTURE:untrained."""
    options: EmbedOptions = field(default_factory=EmbedOptions)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses GPUs if available."""
    precision: Precision = "fp32"
    """Precision of the model; bf16 is faster on GPUs and counts as another model."""
    export: str = ""
    """Folder for img_emb/, text_emb/ and metadata/ in clip-retrieval's format; empty for no export."""
    export_rows: int = 250_000
    """Rows per exported file, 1 or more."""
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        require(self.export_rows >= 1, "export_rows", self.export_rows, "1 or more")


@dataclass(frozen=True, kw_only=True)
class EmbedViews(Embed):
    """Raw features of several views of every image."""

    options: EmbedOptions = field(default_factory=lambda: EmbedOptions(name=view_features.NAME, batch_size=32))
    views: Views = field(default_factory=Views)

    def __post_init__(self) -> None:
        require(not self.export, "export", self.export, "empty: features of views are not exported")


@dataclass(frozen=True, kw_only=True)
class EmbedFrames(Embed):
    """Raw features of the frames of every video."""

    options: EmbedOptions = field(default_factory=lambda: EmbedOptions(name=frame_features.NAME))
    rate: FrameRate = field(default_factory=FrameRate)

    def __post_init__(self) -> None:
        require(not self.export, "export", self.export, "empty: features of frames are not exported")


@dataclass(frozen=True, kw_only=True)
class EmbedGrids(Embed):
    """Features of the cells of every image."""

    options: EmbedOptions = field(default_factory=lambda: EmbedOptions(name=grid_features.NAME, batch_size=8))
    grid: GridSize = field(default_factory=GridSize)

    def __post_init__(self) -> None:
        require(not self.export, "export", self.export, "empty: features of cells are not exported")


@dataclass(frozen=True, kw_only=True)
class Smoke(Embed):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, Embed]] = {
    "snapshot": ("The snapshot in a folder.", Embed(data=tyro.MISSING, checkpoint=tyro.MISSING)),
    "views": (
        "Raw features of each image and of random crops of it, for few-shot methods.",
        EmbedViews(data=tyro.MISSING, checkpoint=tyro.MISSING),
    ),
    "frames": (
        "Raw features of the frames of every video, one a second.",
        EmbedFrames(data=tyro.MISSING, checkpoint=tyro.MISSING),
    ),
    "grid": (
        "Features of the cells of every image, for answers to questions.",
        EmbedGrids(data=tyro.MISSING, checkpoint=tyro.MISSING),
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
    snapshot = _embedded(run, read_snapshot(run.data))
    print(f"{snapshot.uri}: {run.options.name} of {sum(shard.stored for shard in snapshot.shards)} samples")
    if export:
        exported = FeatureExport(
            snapshot=snapshot, folder=Folder(export), name=run.options.name, rows_per_file=run.export_rows
        )
        print(f"{export}: {exported.write(run.workers)} rows in {exported.files} files")


def _embedded(run: Embed, snapshot: Snapshot) -> Snapshot:
    use_gpu = None if run.device == "auto" else run.device == "cuda"
    if isinstance(run, EmbedFrames):
        of_frames = LoadFrameEmbedder(
            checkpoint=run.checkpoint, device=run.device, precision=run.precision, rate=run.rate
        )
        return embed_frames(snapshot, of_frames, run.options, run.workers, use_gpu)
    if isinstance(run, EmbedGrids):
        of_cells = LoadGridEmbedder(
            checkpoint=run.checkpoint, device=run.device, precision=run.precision, size=run.grid
        )
        return embed_grids(snapshot, of_cells, run.options, run.workers, use_gpu)
    views = run.views if isinstance(run, EmbedViews) else None
    model = LoadEmbedder(checkpoint=run.checkpoint, device=run.device, precision=run.precision, views=views)
    return embed(snapshot, model, run.options, run.workers, use_gpu)


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command goes on and keeps the finished shards")
