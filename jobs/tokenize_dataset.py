#!/usr/bin/env python
"""Tokenise the captions of a snapshot once, into a sidecar for trainings with --tokens.

    ray job submit --working-dir . -- python jobs/tokenize_dataset.py snapshot --data s3://bucket/cc3m \
        --architecture ViT-B-32

Architectures with the same tokenizer and context length share the tokens. Each shard gets its own file and is processed
once: the same command resumes, and after a refresh reads only new shards.
"""

import getpass
import tempfile
from dataclasses import dataclass, field
from functools import partial

import tyro

from pipeline.config import require, run_job
from pipeline.loaders.text import caption_field
from pipeline.loaders.tokens import NAME, LoadTokenMaker
from pipeline.models.towers.openclip import check_architecture, tokenizer
from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.shard_tasks import Workers

SMOKE = f"{tempfile.gettempdir()}/clipmill-smoke-{getpass.getuser()}/tokenized"


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """One snapshot, one tokenizer."""

    data: str
    """Folder of a snapshot (its latest) or FOLDER@ID; a path or any fsspec URI."""
    architecture: str
    """open_clip architecture of the later training; provides the tokenizer and its context length."""
    context_length: int | None = None
    """Tokens per text, if the training does not use the architecture's; 1 or more."""
    caption: str = "txt"
    """Field of the captions: txt, or json:KEY."""
    name: str = NAME
    """Name of the sidecar, an identifier; use several names for several tokenizers."""
    overwrite: bool = False
    """Replace tokens of another tokenizer."""
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        caption_field(self.caption)
        length = self.context_length
        require(length is None or length >= 1, "context_length", length, "1 or more, or none")


@dataclass(frozen=True, kw_only=True)
class Smoke(Tokenize):
    """The same job, on a snapshot that it draws first."""


PRESETS: dict[str, tuple[str, Tokenize]] = {
    "snapshot": ("The snapshot in a folder.", Tokenize(data=tyro.MISSING, architecture=tyro.MISSING)),
    "smoke": (
        "Sixty-four drawn captions, in this process.",
        Smoke(data=f"{SMOKE}/data", architecture="clipmill-tiny", workers=Workers(processes_count=0)),
    ),
}


def main(run: Tokenize) -> None:
    """Wire snapshot, tokenizer and workers."""
    check_architecture(run.architecture)
    annotation = Annotation(name=run.name, overwrite=run.overwrite)
    if isinstance(run, Smoke):
        drawn_snapshot(Folder(run.data))
    load = LoadTokenMaker(make=partial(tokenizer, run.architecture, run.context_length), caption=run.caption)
    snapshot = annotate(read_snapshot(run.data), load, annotation, run.workers, use_gpu=False)
    print(f"{snapshot.uri}: {run.name} of {sum(shard.stored for shard in snapshot.shards)} captions")


if __name__ == "__main__":
    run_job(PRESETS, main)
