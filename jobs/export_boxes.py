#!/usr/bin/env python
"""Write boxes and phrases of a snapshot in the formats of other code: ODVG (MMDetection), or MDETR's annotations.

    ray job submit --working-dir . -- python jobs/export_boxes.py snapshot \
        --data s3://bucket/cc3m --pseudo-boxes boxes --output-folder s3://bucket/cc3m-odvg

Each shard becomes one file beside its images. jobs/refresh_dataset.py odvg and mdetr read such files.
"""

import getpass
import tempfile
from dataclasses import dataclass, field

import tyro

from pipeline.config import require, run_job, writable_folder
from pipeline.dataset import load_card
from pipeline.loaders.classes import NO_CLASSES, OF_DATA, classes_of
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.export_boxes import BoxExport, ExportOptions
from pipeline.stages.shard_tasks import Workers

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/export-boxes"


@dataclass(frozen=True, kw_only=True)
class ExportBoxes:
    """One snapshot, one format."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    output_folder: str
    """Output folder: a path or any fsspec URI."""
    classes: str = OF_DATA
    """Card of the classes; `data` for the snapshot's own classes, `none` for captions."""
    options: ExportOptions = field(default_factory=ExportOptions)
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        require(bool(self.data), "data", self.data, "the folder of a snapshot; jobs/refresh_dataset.py makes one")


@dataclass(frozen=True, kw_only=True)
class Smoke(ExportBoxes):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, ExportBoxes]] = {
    "snapshot": ("The snapshot in a folder.", ExportBoxes(data=tyro.MISSING, output_folder=tyro.MISSING)),
    "smoke": (
        "Sixteen drawn captions with their phrases, in this process.",
        Smoke(
            data=f"{SMOKE}/data",
            output_folder=f"{SMOKE}/odvg",
            classes=NO_CLASSES,
            options=ExportOptions(content="captions"),
            workers=Workers(processes_count=0),
        ),
    ),
}


def main(run: ExportBoxes) -> None:
    """Wire snapshot, classes and workers."""
    folder = Folder(writable_folder("output_folder", run.output_folder))
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data), samples=16, rows_per_shard=8)
    snapshot = read_snapshot(run.data)
    classes: tuple[str, ...] = ()
    if run.classes != NO_CLASSES:
        classes = tuple(classes_of(snapshot)) if run.classes == OF_DATA else load_card(run.classes).classes
    export = BoxExport(snapshot=snapshot, folder=folder, classes=classes, options=run.options)
    print(f"{folder.uri}: {export.write(run.workers)} samples in {len(snapshot.shards)} files")


if __name__ == "__main__":
    run_job(PRESETS, main, "the same command writes all files again")
