"""Initial weights from a file, the authors' released VQGANs or a checkpoint of this network, and the authors' settings.

The names of https://github.com/CompVis/taming-transformers (MIT) are this network's own. What their checkpoints hold
besides, the loss with its discriminator and feature network, is not read. Nothing in a file is run.
"""

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config import from_plain, require
from pipeline.errors import DataError, SettingError, unreadable
from pipeline.loaders.cache import FileCache
from pipeline.models.towers.openclip import WEIGHTS
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.models.vqgan.network import VqganNetwork, VqganSizes
from pipeline.shards.storage import Folder, split_file

logger = logging.getLogger(__name__)

FILES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
_UNUSED = ("loss.", "model_ema.")
_SIZES = {
    "resolution": "resolution",
    "ch": "channels",
    "ch_mult": "multipliers",
    "num_res_blocks": "residual_blocks",
    "attn_resolutions": "attention_at",
    "z_channels": "latent_channels",
    "dropout": "dropout",
}
_FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3}


def load_start(network: VqganNetwork, place: str, field: str = "start_from") -> None:
    """Load the weights at ``place``, a file or a checkpoint's folder, into ``network``; nothing if it is empty.

    Raises:
        SettingError: no such file, or weights of another network; the message says how they differ.
    """
    if not place:
        return
    folder, name = split_file(place) if place.endswith(FILES) else (Folder(place), WEIGHTS)
    try:
        state = read_any_weights(FileCache().fetch(folder, name), place)
    except DataError as error:
        raise SettingError(field, place, f"a file of VQGAN's weights, or a checkpoint folder ({error})") from error
    unused = [key for key in state if key.startswith(_UNUSED)]
    if unused:
        logger.info("%s: %d tensors of the loss and of averages are not read", place, len(unused))
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(_UNUSED)}
    problem = misfit(network.state_dict(), kept)
    require(not problem, field, place, f"weights of the same network; this is {problem}")
    network.load_state_dict(kept)


def released_sizes(place: str, field: str = "settings") -> VqganSizes:
    """The sizes in a YAML file of taming-transformers.

    Raises:
        SettingError: no such file, or settings of another model than VQGAN.
    """
    folder, name = split_file(place)
    try:
        plain = yaml.safe_load(folder.read_text(name))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(field, place, "a YAML file of taming-transformers", error) from error
    parameters = _at(plain, "model", "params")
    sizes = _at(parameters, "ddconfig")
    wanted = {"embed_dim", "n_embed"} <= parameters.keys() and _SIZES.keys() - {"dropout"} <= sizes.keys()
    require(wanted, field, place, f"settings of VQGAN: model.params.ddconfig with {', '.join(_SIZES)}")
    for key, value in _FIXED.items():
        require(sizes.get(key, value) == value, field, f"{key} {sizes.get(key)}", f"{key} {value}")
    target = str(_at(plain, "model").get("target", ""))
    require("Gumbel" not in target, field, target, "VQModel: codes with Gumbel noise are another model")
    named = {ours: sizes[theirs] for theirs, ours in _SIZES.items() if theirs in sizes}
    return from_plain(
        VqganSizes, {**named, "codes": parameters["n_embed"], "code_width": parameters["embed_dim"]}, place
    )


def _at(plain: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping below ``keys``; an empty one where there is none."""
    for key in keys:
        plain = plain.get(key) if isinstance(plain, Mapping) else None
    return plain if isinstance(plain, Mapping) else {}
