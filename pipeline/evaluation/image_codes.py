"""Loads image codes, such as those of a VQGAN, by their address."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeline.config import parse_json, require
from pipeline.errors import SettingError
from pipeline.evaluation.models import load_any, usable_device
from pipeline.models.towers.image_codes import ImageCodes, JanusCodes
from pipeline.models.vqgan import Config, Vqgan
from pipeline.models.vqgan.released import FILES, released_sizes
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import META, Checkpoints

JANUS = "janus_vqgan"
UNTRAINED = "vqgan:untrained"
ALLOWED = (
    "a run or a checkpoint of jobs/train_vqgan.py, a checkpoint file of taming-transformers as FILE or FILE@YAML, or a "
    "folder of transformers' JanusVQVAE"
)


def load_image_codes(address: str, device: str = "auto") -> ImageCodes:
    """Frozen image codes in evaluation mode on ``device`` (``auto``: a GPU if available).

    ``address`` is

    - a run's or a checkpoint's folder of jobs/train_vqgan.py, also with ``:ema``;
    - a checkpoint file of taming-transformers, ``FILE@YAML`` with its settings, or ``FILE`` where those are beside it
      under the same name with ``.yaml``;
    - a folder of transformers' ``JanusVQVAE``;
    - ``vqgan:untrained``, the smallest VQGAN with random weights of a fixed seed, for smoke runs.

    Raises:
        SettingError: none of these, weights that do not fit their settings, or no such device.
        DataError: a damaged checkpoint.
    """
    file, _, settings = address.partition("@")
    if address == UNTRAINED:
        codes: Any = _untrained()
    elif file.endswith(FILES):
        codes = _released(file, settings or f"{file.rpartition('.')[0]}.yaml")
    elif (folder := _janus_folder(address)) is not None:
        codes = _janus(folder, address)
    else:
        codes = load_any(address, "cpu")
        require(isinstance(codes, ImageCodes), "codes", address, ALLOWED)
    frozen: ImageCodes = codes.to(usable_device(device)).eval().requires_grad_(False)
    return frozen


def _untrained() -> Vqgan:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Vqgan(Vqgan.smallest())


def _released(file: str, settings: str) -> Vqgan:
    sizes = released_sizes(settings, "codes")
    only_codes: dict[str, Any] = {"discriminator_weight": 0.0, "perceptual": ""}
    return Vqgan(Config(**asdict(sizes), start_from=file, image_size=sizes.resolution, **only_codes))


def _janus_folder(address: str) -> Path | None:
    """The local folder of a ``JanusVQVAE``; ``None`` for anything else."""
    folder = Folder(address)
    if not folder.is_local or folder.exists(META) or Checkpoints(folder).latest() is not None:
        return None
    path = Path(str(folder.path))
    try:
        kind = parse_json((path / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return path if kind == JANUS else None


def _janus(folder: Path, address: str) -> JanusCodes:
    try:
        return JanusCodes.from_folder(folder)
    except (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        SafetensorError,
    ) as error:  # transformers raises these
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise SettingError("codes", address, f"weights and settings of a JanusVQVAE ({first})") from error
