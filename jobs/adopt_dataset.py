#!/usr/bin/env python
"""Make a snapshot of shards written by img2dataset or another tool, in place, without copying or changing them.

    ray job submit --working-dir . -- python jobs/adopt_dataset.py folder s3://bucket/laion400m

Adds only `_snapshots/`, so img2dataset can continue in the folder; the same command then adopts the new tars. Tars that
img2dataset has not marked as done are left out. A killed adoption resumes.
"""

import getpass
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pipeline.config import run_job, writable_folder
from pipeline.dataset import load_card
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.adopt import find_shards
from pipeline.shards.storage import Folder
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger("adopt_dataset")

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/adopted"


@dataclass(frozen=True, kw_only=True)
class Adopt:
    """A folder with tars."""

    folder: tyro.conf.Positional[str]
    """Folder with the tars: a path or any fsspec URI."""
    card: str | None = None
    """Dataset card that describes the samples: a name of datasets/ or a YAML file."""
    skip_damaged: bool = False
    """Leave out damaged tars instead of stopping."""
    workers: Workers = field(default_factory=Workers)


@dataclass(frozen=True, kw_only=True)
class Smoke(Adopt):
    """The same job, on tars that it draws first."""


PRESETS: dict[str, tuple[str, Adopt]] = {
    "folder": ("The tars directly in a folder.", Adopt(folder=tyro.MISSING)),
    "smoke": (
        "Forty-eight drawn samples in plain tars, in this process.",
        Smoke(folder=SMOKE, card="drawn", workers=Workers(processes_count=0)),
    ),
}


def main(run: Adopt) -> None:
    """Wire folder and workers."""
    folder = Folder(writable_folder("folder", run.folder))
    card = load_card(run.card).name if run.card else None
    if isinstance(run, Smoke):
        draw(folder)
    adoption = find_shards(folder)
    if adoption.unfinished:
        logger.warning("%d tars are not marked as done and left out", len(adoption.unfinished))
    described = [text for _, text in run_tasks(adoption.read_tar, range(len(adoption.names)), run.workers)]
    snapshot = adoption.publish(described, card, run.skip_damaged)
    print(f"{snapshot.uri}: {snapshot.samples} samples in {len(snapshot.shards)} shards")


def draw(folder: Folder) -> None:
    """Plain tars without other files, as another tool may write them."""
    with tempfile.TemporaryDirectory() as drawn:
        drawn_snapshot(Folder(drawn), samples=48)
        for tar in Path(drawn).glob("*.tar"):
            folder.write_atomic(tar.name, tar.read_bytes())


if __name__ == "__main__":
    run_job(PRESETS, main)
