#!/usr/bin/env python
"""Make a checkpoint of a released VQGAN of taming-transformers, for every job that reads one.

    python jobs/import_vqgan.py released --start-from vqgan_imagenet_f16_16384.ckpt \
        --settings vqgan_imagenet_f16_16384.yaml --output-folder models/vqgan
    python jobs/evaluate.py sets --checkpoint models/vqgan --reconstruction imagenet=s3://bucket/imagenet-val

The sizes come from the settings, the weights of encoder, codebook and decoder from the file. The loss in it, with the
discriminator, is not read. Nothing in the file is run.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from pipeline.config import require, run_job, writable_folder
from pipeline.models.method import build_method
from pipeline.models.vqgan import Config, Vqgan
from pipeline.models.vqgan.released import released_sizes
from pipeline.shards.storage import Folder
from pipeline.training.average import write_start


@dataclass(frozen=True, kw_only=True)
class ImportVqgan:
    """A file of weights with its settings, and the folder for its checkpoint."""

    start_from: str = ""
    """Checkpoint file of taming-transformers."""
    settings: str = ""
    """YAML file of taming-transformers with the sizes of the model."""
    output_folder: str = ""
    """Folder for the checkpoint: a path or any fsspec URI."""


@dataclass(frozen=True, kw_only=True)
class Smoke(ImportVqgan):
    """The same job, with random weights of a small network, which it writes first."""


PRESETS: dict[str, tuple[str, ImportVqgan]] = {
    "released": ("Weights and settings of the authors.", ImportVqgan()),
    "smoke": ("Random weights, in a temporary folder unless --output-folder names one.", Smoke()),
}


def main(job: ImportVqgan) -> None:
    """Read the weights into the network, then write it."""
    temporary = isinstance(job, Smoke)
    for name in ("start_from", "settings") if not temporary else ():
        require(bool(getattr(job, name)), name, "", "a file of taming-transformers")
    with TemporaryDirectory(prefix="clipmill-vqgan-") if temporary else nullcontext("") as scratch:
        config = made_up(scratch) if temporary else released(job)
        folder = Folder(writable_folder("output_folder", job.output_folder or scratch))
        write_start(build_method(config), folder)
        print(f"checkpoint {folder.uri}")


def released(job: ImportVqgan) -> Config:
    """The config of a released model: its sizes, for images of its resolution."""
    sizes = released_sizes(job.settings)
    return Config(**asdict(sizes), image_size=sizes.resolution, start_from=job.start_from)


def made_up(folder: str) -> Config:
    """The config of the smoke test, with a file of random weights."""
    file = f"{folder}/vqgan.safetensors"
    config = Vqgan.smallest()
    save_file(Vqgan(config).model.state_dict(), file)
    return Config(**{**asdict(config), "start_from": file})


if __name__ == "__main__":
    run_job(PRESETS, main)
