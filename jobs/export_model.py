#!/usr/bin/env python
"""Export a checkpoint for open_clip or for transformers.

    python jobs/export_model.py open-clip --checkpoint s3://bucket/runs/first --output exported/first
    python jobs/export_model.py hugging-face --checkpoint runs/first:ema --output s3://bucket/exported/first

The first is for open_clip.create_model("local-dir:FOLDER"), the second for from_pretrained of transformers' CLIPModel
and CLIPProcessor, which support ViT towers only, or of ClapModel for a CLAP. For checkpoint addresses see
jobs/evaluate.py; FOLDER:ema is the moving average of the weights.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import tyro

from pipeline.config import run_job, writable_folder
from pipeline.evaluation.models import load_any
from pipeline.shards.storage import Folder
from pipeline.training.export import Format, export


@dataclass(frozen=True, kw_only=True)
class Export:
    """One model, one folder."""

    checkpoint: str
    """Folder of a checkpoint or a run (path or URI, with :ema for its average), or ARCHITECTURE:TAG."""
    output: str = ""
    """Folder for the files: a path or a URI."""
    format: Format = "open_clip"
    """Target library: open_clip or hugging_face."""


PRESETS = {
    "open-clip": ("For open_clip.", Export(checkpoint=tyro.MISSING)),
    "hugging-face": ("For transformers' CLIPModel.", Export(checkpoint=tyro.MISSING, format="hugging_face")),
    "smoke": (
        "An untrained model for transformers, in a temporary folder unless --output names one.",
        Export(checkpoint="clipmill-tiny:untrained", format="hugging_face"),
    ),
}


def main(run: Export) -> None:
    """Load, then write."""
    untrained = run.checkpoint == "clipmill-tiny:untrained" and not run.output
    with TemporaryDirectory(prefix="clipmill-export-") if untrained else nullcontext(run.output) as output:
        folder = Folder(writable_folder("output", output))
        export(load_any(run.checkpoint, "cpu"), folder, run.format)
        print(f"{folder.uri}: {', '.join(folder.names())}")


if __name__ == "__main__":
    run_job(PRESETS, main)
