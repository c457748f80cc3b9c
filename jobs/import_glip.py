#!/usr/bin/env python
"""Make a checkpoint of the authors' released GLIP weights, for every job that reads one.

    python jobs/import_glip.py t --start-from glip_tiny_model_o365_goldg_cc_sbu.pth --output-folder models/glip-t
    python jobs/detect.py picture IMAGE --checkpoint models/glip-t --words dog bicycle

--text is a folder or a model id with the vocabulary of bert-base-uncased; its weights come from the file. Nothing in
the file is run.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from pipeline.config import require, run_job, writable_folder
from pipeline.models.glip import Config, Glip
from pipeline.models.glip.config import LARGE
from pipeline.models.method import build_method
from pipeline.shards.storage import Folder
from pipeline.training.average import write_start


@dataclass(frozen=True, kw_only=True)
class ImportGlip:
    """A file of weights and the folder for its checkpoint."""

    method: Config = field(default_factory=Config)
    output_folder: str = ""
    """Folder for the checkpoint: a path or any fsspec URI."""


@dataclass(frozen=True, kw_only=True)
class Smoke(ImportGlip):
    """The same job, with random weights of a small network, which it writes first."""


RELEASED = Config(compat_offsets=True)
PRESETS: dict[str, tuple[str, ImportGlip]] = {
    "a": ("GLIP-T (A), without fusion.", ImportGlip(method=replace(RELEASED, fusion=False))),
    "t": ("GLIP-T (B), (C) and GLIP-T.", ImportGlip(method=RELEASED)),
    "l": ("GLIP-L.", ImportGlip(method=replace(RELEASED, **LARGE))),
    "smoke": ("Random weights, in a temporary folder unless --output-folder names one.", Smoke(method=Glip.smallest())),
}


def main(job: ImportGlip) -> None:
    """Read the weights into the network, then write it."""
    temporary = isinstance(job, Smoke)
    require(temporary or bool(job.method.start_from), "start_from", job.method.start_from, "a file of GLIP's weights")
    with TemporaryDirectory(prefix="clipmill-glip-") if temporary else nullcontext("") as scratch:
        method = replace(job.method, start_from=made_up(job.method, scratch)) if temporary else job.method
        folder = Folder(writable_folder("output_folder", job.output_folder or scratch))
        Glip.check(method)
        write_start(build_method(method), folder)
        print(f"checkpoint {folder.uri}")


def made_up(config: Config, folder: str) -> str:
    """A file of the smoke test's weights."""
    file = f"{folder}/glip.safetensors"
    save_file(build_method(config).model.state_dict(), file)
    return file


if __name__ == "__main__":
    run_job(PRESETS, main)
