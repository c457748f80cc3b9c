"""The features of an open_clip image tower before the projection into the space shared with texts."""

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.config import require


def unprojected_width(visual: nn.Module) -> int:
    """The dimension of :func:`unprojected` features.

    Raises:
        SettingError: a tower with an unknown kind of projection.
    """
    if isinstance(visual, VisionTransformer):
        return int(visual.proj.shape[0] if visual.proj is not None else visual.output_dim)
    if isinstance(visual, ModifiedResNet):
        return int(visual.attnpool.c_proj.in_features)
    return _projection(visual).in_features


def unprojected(visual: nn.Module, image: Tensor) -> Tensor:
    """Normalised float [B, 3, H, W] to float [B, :func:`unprojected_width`], not normalised.

    Towers with the projection as bare weights run with the identity in its place; for other towers, the input of the
    projection layer is returned. Both run the tower's own forward, with its patch dropout and other options.
    """
    if isinstance(visual, VisionTransformer | ModifiedResNet):
        features: Tensor = functional_call(visual, _identity(visual), (image,))
        return features
    seen: list[Tensor] = []
    hook = _projection(visual).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        visual(image)
    finally:
        hook.remove()
    return seen[0]


def projection(visual: nn.Module) -> list[nn.Parameter]:
    """The weights that :func:`unprojected` does not use: a model that is trained through it alone must lock them."""
    if isinstance(visual, VisionTransformer):
        return [] if visual.proj is None else [visual.proj]
    if isinstance(visual, ModifiedResNet):
        return list(visual.attnpool.c_proj.parameters())
    first = _projection(visual)
    head = getattr(visual, "head", None)
    inside = head is not None and any(module is first for module in head.modules())
    return list((head if head is not None and inside else first).parameters())


def _identity(visual: Any) -> dict[str, Tensor]:
    """Identity weights for the projection, by name."""
    if isinstance(visual, VisionTransformer):
        proj = visual.proj
        return {} if proj is None else {"proj": torch.eye(len(proj), dtype=proj.dtype, device=proj.device)}
    weight = visual.attnpool.c_proj.weight
    width = weight.shape[1]
    identity = torch.eye(width, dtype=weight.dtype, device=weight.device)
    return {"attnpool.c_proj.weight": identity, "attnpool.c_proj.bias": weight.new_zeros(width)}


def _projection(visual: Any) -> nn.Linear:
    """The first layer of a timm tower's projection: open_clip's, or the trunk's own classifier."""
    require(isinstance(visual, TimmModel), "architecture", type(visual).__name__, "an image tower of open_clip or timm")
    linear: list[nn.Linear] = [module for module in visual.head.modules() if isinstance(module, nn.Linear)]
    if not linear:
        linear = [module for module in visual.trunk.modules() if isinstance(module, nn.Linear)][-1:]
    require(bool(linear), "architecture", type(visual).__name__, "an image tower that ends in a linear projection")
    return linear[0]
