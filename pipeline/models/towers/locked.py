"""Frozen towers: LiT, Zero-Shot Transfer with Locked-image text Tuning.

Zhai, Wang, Mustafa, Steiner, Keysers, Kolesnikov, Beyer, 2021, arXiv 2111.07991. No gradient is computed for a locked
weight, and optimisers and gradient averaging skip it. Modules whose weights are all locked stay in evaluation mode:
they do not update statistics of batch normalisation and do not apply dropout.
"""

from typing import Any

from torch import nn

from pipeline.config import require
from pipeline.models.towers.layers import Tower, layers


def lock(model: nn.Module, tower: Tower, unlocked: int = 0) -> list[nn.Module]:
    """Lock all but the last ``unlocked`` layers of a tower of an open_clip model; returns the modules that must stay in
    evaluation mode.

    Layers are those of :func:`pipeline.models.towers.layers.layers`: the last layer is everything after the blocks.

    Raises:
        SettingError: ``unlocked`` is not less than the number of layers.
    """
    found = {name: layer.above for name, layer in layers(model).items() if layer.tower == tower}
    depth = max(found.values()) + 1
    require(
        unlocked < depth, f"lock_{tower}_unlocked", unlocked, f"0 to {depth - 1}, since the tower has {depth} layers"
    )
    locked = {name for name, above in found.items() if above >= unlocked}
    for name, parameter in model.named_parameters():
        if name in locked:
            parameter.requires_grad_(False)
    return [module for part in _parts(model, tower) for module in locked_modules(part)]


def locked_modules(part: nn.Module) -> list[nn.Module]:
    """The modules of ``part`` whose weights are all locked, ``part`` included."""
    return [module for module in part.modules() if _is_locked(module)]


def _parts(model: Any, tower: Tower) -> list[nn.Module]:
    """The modules of a tower; those of open_clip's own text tower are the model's."""
    if tower == "image":
        return [model.visual]
    if hasattr(model, "text"):
        return [model.text]
    return [module for name, module in model.named_children() if name != "visual"]


def _is_locked(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
