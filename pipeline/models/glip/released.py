"""Initial weights from a file: the authors' released GLIP, or a checkpoint of this network.

The names are those of https://github.com/microsoft/GLIP (MIT). Their images are BGR, so the first convolution's input
channels are reversed; everything else is renamed or reshaped. Left out are buffers, BERT's pooling layer, and a
classifier of fixed classes that no score depends on. Nothing in a file is run.
"""

import logging
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.loaders.cache import FileCache
from pipeline.models.glip.config import Config
from pipeline.models.glip.network import GlipNetwork
from pipeline.models.towers.openclip import WEIGHTS
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.storage import Folder

logger = logging.getLogger(__name__)

FILES = (".pth", ".pt", ".bin", ".safetensors")
_BODY = "backbone.body."
_UNUSED = re.compile(
    r"relative_position_index$|attn_mask$|position_ids$|\.pooler\.|^rpn\.anchor_generator\.|^rpn\.head\.cls_logits\."
    r"|^rpn\.(resizer|tunable_linear)\b"
)
_TOWER = re.compile(r"^rpn\.head\.dyhead_tower\.(\d+)\.(.+)$")
_SCALE = re.compile(r"^rpn\.head\.scales\.(\d+)\.scale$")
_FUSION = {
    "layer_norm_v": "image_norm",
    "layer_norm_l": "text_norm",
    "attn.v_proj": "query",
    "attn.l_proj": "key",
    "attn.values_v_proj": "image_value",
    "attn.values_l_proj": "text_value",
    "attn.out_v_proj": "to_image",
    "attn.out_l_proj": "to_text",
    "gamma_v": "image_scale",
    "gamma_l": "text_scale",
}
_IMAGE = {
    "DyConv.0.conv": "above.convolution",
    "DyConv.1.conv": "same.convolution",
    "DyConv.2.conv": "below.convolution",
    "DyConv.0.bn": "above.norm",
    "DyConv.1.bn": "same.norm",
    "DyConv.2.bn": "below.norm",
    "AttnConv.1": "attention",
    "offset": "offset",
    "relu.fc.0": "relu.hidden",
    "relu.fc.2": "relu.slopes",
}
_HEAD = {
    "bbox_pred": "box",
    "centerness": "centerness",
    "dot_product_projection_text": "project",
    "bias_lang": "token_bias",
    "bias0": "prior_bias",
    "log_scale": "log_scale",
}
_RENAMED: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"^backbone\.body\.layers\.(\d+)\.downsample"),
        lambda m: f"image.body.layers_{int(m[1]) + 1}.downsample",
    ),
    (re.compile(r"^backbone\.body\.layers\.(\d+)"), lambda m: f"image.body.layers_{m[1]}"),
    (re.compile(r"^backbone\.body\.norm(\d+)"), lambda m: f"image.norms.{int(m[1]) - 1}"),
    (re.compile(r"^backbone\.body"), lambda m: "image.body"),
    (re.compile(r"^backbone\.fpn\.fpn_inner(\d+)"), lambda m: f"image.pyramid.inner_blocks.{int(m[1]) - 2}.0"),
    (re.compile(r"^backbone\.fpn\.fpn_layer(\d+)"), lambda m: f"image.pyramid.layer_blocks.{int(m[1]) - 2}.0"),
    (re.compile(r"^backbone\.fpn\.top_blocks"), lambda m: "image.pyramid.extra_blocks"),
    (re.compile(r"^language_backbone\.body\.model"), lambda m: "text.bert"),
    (re.compile(r"^rpn\.head\.(\w+)"), lambda m: f"head.{_HEAD.get(m[1], m[1])}"),
)


def load_start(network: GlipNetwork, config: Config) -> None:
    """Load the weights at ``config.start_from`` into ``network``; nothing if it is empty.

    Raises:
        SettingError: no such file, or weights of another network; the message says how they differ.
    """
    if not config.start_from:
        return
    state = _read(config.start_from)
    if is_released(state):
        state = converted(state)
        if not config.compat_offsets:
            logger.warning("%s was trained with compat_offsets; its boxes differ without", config.start_from)
    problem = misfit(network.state_dict(), state)
    allowed = f"weights of the same network; this is {problem}"
    require(not problem, "start_from", config.start_from, allowed)
    network.load_state_dict(state)


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the authors' code."""
    return any(name.startswith(_BODY) for name in state)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights by the names of :class:`~pipeline.models.glip.network.GlipNetwork`.

    Names that are not known stay as they are.
    """
    kept = {name: tensor for name, tensor in state.items() if not _UNUSED.search(name)}
    fused = any(".b_attn." in name for name in kept)
    found: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for name, tensor in kept.items():
        if match := _SCALE.match(name):
            scales[int(match[1])] = tensor.reshape(())
        else:
            ours = _renamed(name, fused)
            found[ours] = _reshaped(ours, tensor)
    if scales:
        found["head.level_scales"] = torch.stack([scales[level] for level in sorted(scales)])
    return found


def _renamed(name: str, fused: bool) -> str:
    if match := _TOWER.match(name):
        # With fusion, three modules make a block: fusion, a layer of BERT, a block of the dynamic head.
        number, rest = int(match[1]) // (3 if fused else 1), match[2]
        if rest.startswith("b_attn."):
            return f"tower.fusions.{number}.{_first(_FUSION, rest.removeprefix('b_attn.'))}"
        if rest.startswith(("attention.", "intermediate.", "output.")):
            return f"tower.texts.{number}.{rest}"
        return f"tower.images.{number}.{_first(_IMAGE, rest)}"
    for pattern, rename in _RENAMED:
        if pattern.search(name):
            return pattern.sub(rename, name, count=1)
    return name


def _first(names: Mapping[str, str], name: str) -> str:
    """``name`` with its beginning replaced, where that is one of ``names``."""
    for theirs, ours in names.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    if name == "image.body.patch_embed.proj.weight":
        return tensor.flip(1)  # BGR to RGB
    if name in ("head.prior_bias", "head.log_scale"):
        return tensor.reshape(())
    if name.endswith(".attention.weight") or name in ("head.box.weight", "head.centerness.weight"):
        return tensor.flatten(1)  # convolutions of 1 x 1, which are linear layers
    return tensor


def _read(place: str) -> dict[str, Tensor]:
    folder, _, file = place.rpartition("/") if place.endswith(FILES) else (place, "", WEIGHTS)
    try:
        return read_any_weights(FileCache().fetch(Folder(folder or "."), file), place)
    except DataError as error:
        require(False, "start_from", place, f"a file of released weights, or a checkpoint folder ({error})")
        raise
