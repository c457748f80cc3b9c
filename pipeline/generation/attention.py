"""Where an image tower looks: the attention of its class token to places of the image; and its layers' features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import near
from pipeline.errors import SettingError
from pipeline.generation.guides import Guide


def visual_of(guide: Guide) -> nn.Module:
    """The image tower of a CLIP; raises ``SettingError`` for a model that has none of open_clip's form."""
    visual = getattr(getattr(guide.model, "model", None), "visual", None)
    if not isinstance(visual, nn.Module):
        raise SettingError("clip", guide.name, "a CLIP with an image tower of open_clip")
    return visual


@torch.no_grad()
def attention_maps(guide: Guide, images: Tensor, last: int = 0) -> Tensor:
    """Attention of the class token to patches, float32 [B, h, w], for images [B, 3, H, W] from 0 to 1.

    It is the mean over heads, then over the ``last`` layers of a vision transformer, or all of them with 0. A tower
    without a class token has the mean over all queries. A ResNet of CLIP has one layer, its attention pooling.

    Raises:
        SettingError: a tower without attention.
    """
    visual = visual_of(guide)
    layers = [module for module in visual.modules() if _has_weights(module)]
    if not layers:
        allowed = "a CLIP whose image tower has attention: a vision transformer, or CLIP's ResNets"
        raise SettingError("saliency", guide.name, allowed)
    inputs: list[tuple[nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, given, named: inputs.append((module, given[0] if given else named["query"])),
            with_kwargs=True,
        )
        for layer in layers[-last:]
    ]
    try:
        guide.images(images)
    finally:
        for handle in handles:
            handle.remove()
    rows = torch.stack([_row(module, given.float(), len(images)) for module, given in inputs]).mean(0)
    side = int(rows.shape[1] ** 0.5)
    maps: Tensor = rows[:, -side * side :].unflatten(1, (side, side))
    return maps


def _has_weights(module: nn.Module) -> bool:
    is_timm = isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    return isinstance(module, nn.MultiheadAttention | AttentionPool2d) or is_timm


def _row(module: Any, given: Tensor, images: int) -> Tensor:
    """Attention of the first token to the others, [B, L], mean over heads."""
    if isinstance(module, AttentionPool2d):
        tokens = given.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + module.positional_embedding.float()
        query, key = module.q_proj(tokens), module.k_proj(tokens)
        return _weights(query, key, module.num_heads)[:, 0, 1:]
    if isinstance(module, nn.MultiheadAttention):
        tokens = given if module.batch_first else given.transpose(0, 1)
        weight, bias = module.in_proj_weight, module.in_proj_bias
        query, key, _ = functional.linear(tokens, weight, bias).chunk(3, dim=-1)
        return _weights(query, key, module.num_heads)[:, 0, 1:]
    tokens = given
    query, key, _ = module.qkv(tokens).chunk(3, dim=-1)
    weights = _weights(query, key, module.num_heads)
    side = int(tokens.shape[1] ** 0.5)
    has_class = side * side != tokens.shape[1]
    return weights[:, 0, 1:] if has_class else weights.mean(1)


def _weights(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Softmax of the scaled products, mean over heads: [B, L, L]."""
    query, key = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (query, key))
    weights: Tensor = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return weights.mean(1)


class LayerFeatures:
    """The outputs of named modules of a CLIP's image tower, beside its embedding.

    Raises:
        SettingError: the tower has no such module.
    """

    def __init__(self, guide: Guide, names: Sequence[str]) -> None:
        self.guide, self.names = guide, tuple(names)
        modules = dict(visual_of(guide).named_modules())
        for name in self.names:
            if name not in modules:
                some = ", ".join(one for one in modules if one and one.count(".") <= 2)[:300]
                raise SettingError("layers", name, f"modules of the image tower, such as {some}{near(name, modules)}")
        self._modules = [modules[name] for name in self.names]

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs, float [B, ...] each, and unit embeddings [B, D]."""
        with self._recorded() as found:
            embedding = self.guide.images(images)
        return found, embedding

    @contextmanager
    def _recorded(self) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []
        handles = [module.register_forward_hook(lambda _, __, out: found.append(out)) for module in self._modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
