"""Where an image tower looks: the attention of its class token to places of the image; and its layers' features."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pipeline.config import near, require
from pipeline.errors import SettingError
from pipeline.generation.guides import Guide
from pipeline.models.towers.feature_network import in_order, recorded


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
        SettingError: a tower without attention, or whose attention is not one between all places of an image.
    """
    visual = visual_of(guide)
    with _recorded_weights(visual) as found:
        guide.images(images)
    if not found:
        allowed = "a CLIP whose image tower has attention that can be read: of open_clip's vision transformers without "
        raise SettingError("saliency", guide.name, f"{allowed}changed blocks, timm's, or CLIP's ResNets")
    whole = all(weights.shape == found[0].shape and len(weights) == len(images) for weights in found)
    require(whole, "saliency", guide.name, "a CLIP whose layers compare all places of an image, without windows")
    return _map(torch.stack(found[-last:]).mean(0), visual, guide.name)


def _map(weights: Tensor, visual: nn.Module, name: str) -> Tensor:
    """The row of the class token, or the mean of all rows, of weights [B, L, L] as a map [B, h, w]."""
    length = weights.shape[1]
    towers: list[Any] = [one for one in visual.modules() if isinstance(getattr(one, "num_prefix_tokens", None), int)]
    before = 0 if math.isqrt(length) ** 2 == length else 1
    has_class = before == 1
    if towers:  # timm's, which may have registers as well
        before, has_class = towers[0].num_prefix_tokens, getattr(towers[0], "cls_token", None) is not None
    side = math.isqrt(length - before)
    require(side * side == length - before, "saliency", name, "a CLIP whose patches are a square")
    rows = (weights[:, 0] if has_class else weights.mean(1))[:, before:]
    found: Tensor = rows.unflatten(1, (side, side))
    return found


@contextmanager
def _recorded_weights(visual: nn.Module) -> Iterator[list[Tensor]]:
    """The weights of each layer of attention that runs, in their order: the mean over heads, float32 [B, L, L]."""
    found: list[Tensor] = []

    def ask(module: nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
        return given, {**named, "need_weights": True, "average_attn_weights": True}

    def answer(module: nn.Module, given: Any, named: Any, out: Any) -> None:
        query, key = (given[n] if len(given) > n else named[name] for n, name in enumerate(("query", "key")))
        if query is key:  # not so in a pooling, whose queries are no places of the image
            found.append(out[1].float())

    fused: list[tuple[Any, bool]] = []
    module: Any
    handles: list[RemovableHandle] = []
    for module in visual.modules():
        dropout = getattr(module, "attn_drop", None)
        if isinstance(module, AttentionPool2d):
            handles.append(module.register_forward_pre_hook(lambda one, given: found.append(_pooling(one, given[0]))))
        elif isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(module.register_forward_hook(answer, with_kwargs=True))
        elif isinstance(dropout, nn.Module) and isinstance(getattr(module, "fused_attn", None), bool):
            # Without the fused kernel, timm's layers give their weights to the dropout.
            handles.append(dropout.register_forward_pre_hook(lambda _, given: found.append(given[0].float().mean(1))))
            fused.append((module, module.fused_attn))
    try:
        for module, _ in fused:
            module.fused_attn = False
        yield found
    finally:
        for module, before in fused:
            module.fused_attn = before
        for handle in handles:
            handle.remove()


def _pooling(module: Any, given: Tensor) -> Tensor:
    """Weights [B, L, L] of the attention pooling of CLIP's ResNets, whose first token is the mean of the others."""
    tokens = given.float().flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + module.positional_embedding.float()
    projected = (
        functional.linear(tokens, one.weight.float(), one.bias.float()) for one in (module.q_proj, module.k_proj)
    )
    query, key = (one.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for one in projected)
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
        self._modules = {name: modules[name] for name in self.names}

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs in the order of their names, float [B, ...] each, and unit embeddings [B, D].

        Raises:
            SettingError: a layer that gives no output.
        """
        with recorded(self._modules) as found:
            embedding = self.guide.images(images)
        return in_order(found, self.names, "layers"), embedding
