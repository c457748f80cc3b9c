"""DPT: a vision transformer or a ResNet of timm, and a decoder, for one vector for every second pixel.

Ranftl, Bochkovskiy, Koltun, 2021, "Vision Transformers for Dense Prediction", arXiv 2103.13413, as LSeg's authors have
it (see ``pipeline.models.lseg``). The DPT of transformers is close, but runs on its own transformer, not on timm's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.models.towers import small_resnet, small_vit  # noqa: F401 - registers them with timm

STRIDE = 32  # of the coarsest level: inputs are multiples of it
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRANSFORMERS, RESNETS = ("vision_transformer", "deit", "small_vit"), ("resnet", "small_resnet")  # modules of timm


class Reassembly(nn.Module):
    """Tokens after four blocks to maps at 1/4, 1/8, 1/16 and 1/32 of the image, whatever the patches' size.

    Each map joins its tokens with the class token (readout "project"), then changes their number of channels and the
    size of the grid.
    """

    def __init__(self, dimension: int, widths: Sequence[int], patch: int) -> None:
        super().__init__()
        self.readouts = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dimension, dimension), nn.GELU()) for _ in range(len(widths))
        )
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dimension, width, 1), *_resized(width, patch, 4 << number))
            for number, width in enumerate(widths)
        )

    def forward(self, tokens: Sequence[tuple[Tensor, Tensor]], grid: tuple[int, int]) -> list[Tensor]:
        """Patch tokens [B, L, D] and class tokens [B, D] of each tap to four maps, finest first."""
        found = []
        for (patches, first), readout, change in zip(tokens, self.readouts, self.maps, strict=True):
            joined = readout(torch.cat([patches, first[:, None].expand_as(patches)], dim=-1))
            found.append(change(joined.transpose(1, 2).unflatten(2, grid)))
        return found


def _resized(width: int, patch: int, stride: int) -> list[nn.Module]:
    """The layer that changes a map's stride from ``patch`` to ``stride``."""
    if patch > stride:
        return [nn.ConvTranspose2d(width, width, patch // stride, stride=patch // stride)]
    return [nn.Conv2d(width, width, 3, stride=stride // patch, padding=1)] if stride > patch else []


class TransformerMaps(nn.Module):
    """A vision transformer of timm whose tokens become four maps."""

    def __init__(self, body: VisionTransformer, taps: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        body.blocks = body.blocks[: taps[-1] + 1]
        body.norm = body.fc_norm = nn.Identity()
        body.reset_classifier(0)
        self.body, self.taps = body, tuple(taps)
        self.patch = int(body.patch_embed.patch_size[0])
        self.reassembly = Reassembly(body.embed_dim, widths, self.patch)
        self.widths = tuple(widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised [B, 3, H, W], sides multiples of 32, to maps at 1/4 to 1/32."""
        maps: list[Tensor] = self.reassembly(*self.tokens(images))
        return maps

    def tokens(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, int]]:
        """Patch and class tokens after each tap, and the grid of the patches."""
        body = self.body
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        tokens = body.patch_embed(images).flatten(1, 2)  # the grid is last but one: [B, h, w, D]
        prefix = [table.expand(len(images), -1, -1) for table in (body.cls_token, body.reg_token) if table is not None]
        if body.no_embed_class:
            tokens = torch.cat([*prefix, tokens + self._positions(grid)], dim=1)
        else:
            tokens = torch.cat([*prefix, tokens], dim=1) + self._positions(grid)
        tokens = body.norm_pre(body.pos_drop(tokens))
        found = []
        for number, block in enumerate(body.blocks):
            tokens = block(tokens)
            if number in self.taps:
                found.append((tokens[:, body.num_prefix_tokens :], tokens[:, 0]))
        return found, grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings of this grid: plain bilinear, as in the authors' code (timm's is bicubic)."""
        table = cast(Tensor, self.body.pos_embed)
        extra = 0 if self.body.no_embed_class else self.body.num_prefix_tokens
        own = self.body.patch_embed.grid_size
        if own == grid:
            return table
        cells = table[:, extra:].transpose(1, 2).unflatten(2, own)
        cells = functional.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:, :extra], cells.flatten(2).transpose(1, 2)], dim=1)


class ResidualUnit(nn.Module):
    """x + two convolutions of it, each after a ReLU and before a normalisation."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        parts = [[nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width, norm)] for _ in range(2)]
        self.layers = nn.Sequential(*parts[0], *parts[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        added: Tensor = x + self.layers(x)
        return added


class Fusion(nn.Module):
    """RefineNet's fusion: the coarser map plus the map of this level, twice as large."""

    def __init__(self, width: int, norm: str, has_coarser: bool) -> None:
        super().__init__()
        self.own = ResidualUnit(width, norm) if has_coarser else None
        self.both = ResidualUnit(width, norm)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        """[B, C, h, w] to [B, C, 2h, 2w]."""
        together = level if self.own is None or coarser is None else coarser + self.own(level)
        larger = functional.interpolate(self.both(together), scale_factor=2, mode="bilinear", align_corners=True)
        fused: Tensor = self.out(larger)
        return fused


class Decoder(nn.Module):
    """Four maps to one vector for every second pixel."""

    def __init__(self, widths: Sequence[int], width: int, norm: str, dimension: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(own, width, 3, padding=1, bias=False) for own in widths)
        self.fusions = nn.ModuleList(Fusion(width, norm, number < len(widths) - 1) for number in range(len(widths)))
        self.head = nn.Conv2d(width, dimension, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps at 1/4 to 1/32, finest first, to [B, D, H/2, W/2]."""
        found: Tensor | None = None
        for level, convolution, fusion in reversed([*zip(maps, self.levels, self.fusions, strict=True)]):
            found = fusion(convolution(level), found)
        vectors: Tensor = self.head(found)
        return vectors


def make_backbone(
    name: str, pretrained: bool, norm: str, taps: Sequence[int], tap_widths: Sequence[int]
) -> tuple[nn.Module, list[int]]:
    """The network that makes four maps, and their channels.

    Args:
        name: a vision transformer or a ResNet of timm.
        pretrained: whether it has timm's weights.
        norm: ``batch`` or ``group``, for a ResNet.
        taps: the four blocks of a transformer, from 0; the end of each quarter if empty.
        tap_widths: channels of a transformer's maps.

    Raises:
        SettingError: a backbone without four such maps, or taps that it does not have.
    """
    if _is_transformer(name):
        body: Any = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, global_pool="")
        patch, count = body.patch_embed.patch_size[0], len(body.blocks)
        good = body.cls_token is not None and body.pos_embed is not None and not hasattr(body, "dist_token")
        allowed = "a vision transformer with a class token, position embeddings, and patches of 8, 16 or 32 pixels"
        require(good and patch in (8, 16, 32), "backbone", name, allowed)
        taps = tuple(taps) or tuple(count * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
        require(taps[-1] < count and taps[0] >= 0, "taps", taps, f"blocks 0 to {count - 1} of {name}")
        return TransformerMaps(body, taps, tap_widths), list(tap_widths)
    layers: dict[str, Any] = {"norm_layer": partial(_norm, kind=norm)}
    body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(1, 2, 3, 4), **layers)
    info = cast(Any, body).feature_info
    require(info.reduction() == [4, 8, 16, 32], "backbone", name, "a ResNet, with maps at 1/4 to 1/32")
    return body, list(info.channels())


def check_backbone(name: str) -> None:
    """Raise ``SettingError`` unless timm has the transformer or ResNet ``name``."""
    known = _family(name) in TRANSFORMERS + RESNETS
    require(known, "backbone", name, "a vision transformer or a ResNet of timm (timm.list_models())")


def _is_transformer(backbone: str) -> bool:
    return _family(backbone) in TRANSFORMERS


def _family(backbone: str) -> str:
    """The module of timm, or of this package, that defines the backbone; empty for an unknown one."""
    module = timm.models.model_entrypoint(backbone).__module__ if timm.is_model(backbone) else ""
    return module.rpartition(".")[2]


def _norm(width: int, kind: str, **place: Any) -> nn.Module:
    if kind == "batch":
        return nn.SyncBatchNorm(width, **place)
    return nn.GroupNorm(max(1, min(32, width // 8)), width, **place)


def image_statistics(backbone: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the backbone's training images, 0 to 1."""
    known = timm.get_pretrained_cfg(backbone)
    if known is None:
        return HALF if _is_transformer(backbone) else IMAGENET
    return known.mean, known.std
