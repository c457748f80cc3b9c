"""The layers of a tower: its repeated blocks, and the depth of each of its weights.

Works for towers of any library. A block is a module in a list of modules of one kind; in nested lists (the stages of a
ConvNeXt) the inner lists count. For timm's towers the depth is timm's own.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

Tower = str
"""The name of a tower: ``image`` and ``text`` in CLIP; other methods may have others."""

# Modules before the first block, in open_clip's and Hugging Face's names: convolutions, tables, their norms.
_STEM = re.compile(r"(^|\.)((conv|bn)\d|ln_pre|\w*embed\w*|cls_\w+|patch\w*|stem)(\.|$)")
_SCALARS = ("logit_scale", "logit_bias")


class Layer(NamedTuple):
    """The position of a weight: its tower, and the number of the tower's layers above it, up to its output."""

    tower: Tower
    above: int


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by name, in the order in which they are registered."""
    found: dict[str, nn.Module] = {}
    for name, container in module.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in container.children())
            for key, child in container.named_children():
                repeated = kinds[type(child)] > 1 or name.endswith("resblocks")  # a transformer may have a single one
                if repeated and any(True for _ in child.children()):
                    found[f"{name}.{key}"] = child
    return {name: block for name, block in found.items() if not any(other.startswith(name + ".") for other in found)}


def layers(model: nn.Module) -> dict[str, Layer]:
    """The layer of each parameter of an open_clip model, except for its scalars, which belong to no tower.

    As in BEiT's fine-tuning: embeddings are layer 0, block i (from 0) is layer i + 1, and everything after the blocks
    is the last layer. (timm counts the norm after the blocks as part of the last block.)
    """
    names = [name for name, _ in model.named_parameters() if name not in _SCALARS]
    image = {name for name in names if name.startswith("visual.")}
    towers: dict[Tower, list[str]] = {
        "image": [name for name in names if name in image],
        "text": [name for name in names if name not in image],
    }
    known = blocks(model)
    found: dict[str, Layer] = {}
    for tower, members in towers.items():
        depths = block_depths(members, known) | (_timm_depths(model) if tower == "image" else {})
        deepest = max(depths.values(), default=0)
        found |= {name: Layer(tower, deepest - depth) for name, depth in depths.items()}
    return found


def block_depths(names: list[str], known: Mapping[str, nn.Module]) -> dict[str, int]:
    """The depth of each weight by the blocks that are ``known``: stems 0, block i (from 0) i + 1, the rest the last."""
    block_of = {name: next((block for block in known if name.startswith(block + ".")), None) for name in names}
    order = {block: number for number, block in enumerate(block for block in known if block in block_of.values())}
    last = len(order) + 1

    def depth(name: str) -> int:
        block = block_of[name]
        if block is not None:
            return order[block] + 1
        return 0 if _STEM.search(name) else last

    return {name: depth(name) for name in names}


def _timm_depths(model: Any) -> dict[str, int]:
    """timm's depths of the weights of its trunk; open_clip's projection is above them, like a classifier."""
    visual = model.visual
    if not hasattr(getattr(visual, "trunk", None), "group_matcher"):
        return {}
    from timm.models import group_parameters  # heavy; already imported if a tower is timm's

    trunk: dict[str, int] = group_parameters(visual.trunk, visual.trunk.group_matcher(coarse=False), reverse=True)
    depths = {f"visual.trunk.{name}": depth for name, depth in trunk.items()}
    above = max(depths.values()) + 1
    return depths | {f"visual.head.{name}": above for name, _ in visual.head.named_parameters()}
