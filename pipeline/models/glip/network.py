"""GLIP's modules from pixels and tokens to logits: the pyramid, the tower of fused blocks, and the heads."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from pipeline.loaders.grounding import MULTIPLE
from pipeline.models.glip.config import LEVELS, Config
from pipeline.models.glip.dyhead import DynamicBlock
from pipeline.models.glip.fusion import CrossFusion
from pipeline.models.glip.text import attention_mask, make_text_tower, text_layer
from pipeline.models.towers import small_swin  # noqa: F401 - registers it with timm

STAGES = (1, 2, 3)  # of the backbone, with cells of 8, 16 and 32 pixels
PRIOR = 0.01  # probability of a token at the beginning of the training


class CoarseLevels(LastLevelP6P7):  # type: ignore[misc]  # torchvision has no types
    """The two coarsest levels, in float32.

    On a CPU, torch's gradient of a filter of bfloat16 with stride 2 on a map of one pixel has values that were never
    computed, at times NaN.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """See torchvision's ``ExtraFPNBlock``; without autocasting."""
        with torch.autocast(p[-1].device.type, enabled=False):
            found: Any = super().forward([level.float() for level in p], [level.float() for level in c], names)
            return found[0], found[1]


class SwinPyramid(nn.Module):
    """A Swin transformer with a norm on each output, and a feature pyramid of five levels on top of it."""

    def __init__(self, config: Config, load: bool = True) -> None:
        super().__init__()
        body: Any = timm.create_model(
            config.backbone,
            pretrained=config.pretrained_backbone and load,
            features_only=True,
            out_indices=STAGES,
            img_size=config.image_size,
            strict_img_size=False,
            always_partition=True,  # small images get the same windows as large ones
            drop_path_rate=config.drop_path,
        )
        widths: list[int] = body.feature_info.channels()
        self.body = body
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        extra = CoarseLevels(config.width, config.width)
        self.pyramid = FeaturePyramidNetwork(widths, config.width, extra_blocks=extra)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised [B, 3, H, W] to levels [B, C, H / 8, W / 8] and coarser ones; sides are multiples of 32."""
        stages = zip(self.body(images), self.norms, strict=True)
        levels = {str(n): norm(stage).permute(0, 3, 1, 2) for n, (stage, norm) in enumerate(stages)}
        return list(self.pyramid(levels).values())


@dataclass(frozen=True)
class EncodedText:
    """``hidden`` [B, M, D] and ``mask`` bool [B, M], False for padding."""

    hidden: Tensor
    mask: Tensor

    def expand(self, count: int) -> "EncodedText":
        """One text for ``count`` images."""
        return EncodedText(self.hidden.expand(count, -1, -1), self.mask.expand(count, -1))


class FusedTower(nn.Module):
    """Blocks of fusion, a layer of BERT and the dynamic head; without fusion, the dynamic head alone."""

    def __init__(self, config: Config, settings: Any) -> None:
        super().__init__()
        count, fused = config.blocks, config.blocks if config.fusion else 0
        self.fusions = nn.ModuleList(
            CrossFusion(
                config.width,
                settings.hidden_size,
                config.fusion_width,
                config.fusion_heads,
                scale=1 / count,
                dropout=config.fusion_dropout,
            )
            for _ in range(fused)
        )
        self.texts = nn.ModuleList(text_layer(settings) for _ in range(fused))
        self.images = nn.ModuleList(
            DynamicBlock(config.width, config.norm_groups, config.compat_offsets) for _ in range(count)
        )

    def forward(self, levels: Sequence[Tensor], text: EncodedText) -> tuple[list[Tensor], Tensor]:
        """Levels and a text [B, M, D] to both after the last block; without fusion the text stays as it is."""
        found, hidden = list(levels), text.hidden
        for number, block in enumerate(self.images):
            if len(self.fusions):
                pixels, hidden = self.fusions[number](flattened(found), hidden, text.mask)
                found = unflattened(pixels, found)
                hidden = self.texts[number](hidden, attention_mask=attention_mask(text.mask))
            found = block(found)
        return found, hidden


@dataclass(frozen=True)
class TokenWeights:
    """The classifier that a text is: ``vectors`` [B, M, C] and ``bias`` [B, M], float32."""

    vectors: Tensor
    bias: Tensor


@dataclass(frozen=True)
class AnchorFeatures:
    """Of each anchor, float32: its ``features`` [B, N, C], ``moves`` [B, N, 4] and centerness ``logits`` [B, N]."""

    features: Tensor
    moves: Tensor
    centerness: Tensor


class AlignmentHead(nn.Module):
    """Boxes, centerness and the product of pixels and tokens; all in float32, and shared by all levels."""

    def __init__(self, width: int, text_width: int, first_scale: float = 1.0) -> None:
        super().__init__()
        self.box, self.centerness = nn.Linear(width, 4), nn.Linear(width, 1)
        self.level_scales = nn.Parameter(torch.ones(LEVELS))
        self.project = nn.Linear(text_width, width)
        self.token_bias = nn.Parameter(torch.zeros(text_width))
        self.prior_bias = nn.Parameter(torch.tensor(PRIOR).logit())
        self.log_scale = nn.Parameter(-torch.tensor(first_scale).log())
        for layer in (self.box, self.centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def token_weights(self, hidden: Tensor) -> TokenWeights:
        """Token features [B, M, D] as classifiers of pixels."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self._token_weights(hidden.float())

    def anchor_features(self, levels: Sequence[Tensor]) -> AnchorFeatures:
        """Levels [B, C, H, W] as rows of anchors."""
        with torch.autocast(levels[0].device.type, enabled=False):
            return self._anchor_features(levels)

    def _token_weights(self, hidden: Tensor) -> TokenWeights:
        unit = functional.normalize(hidden, dim=-1)
        vectors = self.project(unit / 2) / self.log_scale.exp()
        return TokenWeights(vectors, unit @ self.token_bias + self.prior_bias)

    def _anchor_features(self, levels: Sequence[Tensor]) -> AnchorFeatures:
        features = flattened(levels).float()
        counts = [level.shape[-2] * level.shape[-1] for level in levels]
        parts = zip(self.box(features).split(counts, dim=1), self.level_scales, strict=True)
        moves = torch.cat([part * scale for part, scale in parts], dim=1)
        return AnchorFeatures(features, moves, self.centerness(features)[..., 0])


def align(features: Tensor, weights: TokenWeights) -> Tensor:
    """Logits float32 [B, N, M] of pixels [B, N, C] and tokens."""
    return torch.baddbmm(weights.bias[:, None], features, weights.vectors.transpose(1, 2))


class GlipNetwork(nn.Module):
    """All weights of GLIP."""

    def __init__(self, config: Config, settings: Any, load: bool = True) -> None:
        """``settings`` are those of the text tower; ``load`` allows pretrained weights of the backbone.

        With prompt tuning, ``prompt`` [positions, D] is added to the features of every text.
        """
        super().__init__()
        self.image, self.text = SwinPyramid(config, load), make_text_tower(settings)
        self.tower = FusedTower(config, settings)
        self.head = AlignmentHead(config.width, settings.hidden_size, config.first_logit_scale)
        positions = -(-config.grounding.text_tokens // MULTIPLE) * MULTIPLE
        table = torch.zeros(positions, settings.hidden_size) if config.tuning == "prompt" else None
        self.prompt = None if table is None else nn.Parameter(table)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> EncodedText:
        """int64 [B, M] and bool [B, M] to features."""
        hidden = self.text(tokens, mask)
        return EncodedText(hidden if self.prompt is None else hidden + self.prompt[: hidden.shape[1]], mask)

    def compare(
        self, levels: Sequence[Tensor], texts: Iterable[EncodedText]
    ) -> Iterator[tuple[AnchorFeatures, TokenWeights]]:
        """What :func:`align` multiplies, for one pyramid and each of the ``texts``; each has a text for every image.

        Without fusion the pyramid goes through the tower once.
        """
        found: AnchorFeatures | None = None
        for fused, hidden in self.fuse(levels, texts):
            if self.fused or found is None:
                found = self.head.anchor_features(fused)
            yield found, self.head.token_weights(hidden)

    def fuse(self, levels: Sequence[Tensor], texts: Iterable[EncodedText]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Levels and token features [B, M, D] after the tower, for one pyramid and each of the ``texts``."""
        fused: list[Tensor] | None = None
        for text in texts:
            hidden = text.hidden
            if self.fused or fused is None:
                fused, hidden = self.tower(levels, text)
            yield fused, hidden

    @property
    def fused(self) -> bool:
        """Whether a text changes the features of the image."""
        return len(self.tower.fusions) > 0


def flattened(levels: Sequence[Tensor]) -> Tensor:
    """Levels [B, C, H_l, W_l] to [B, N, C], level by level and row by row."""
    return torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)


def unflattened(pixels: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """[B, N, C] to levels of the sizes of ``levels``."""
    sizes = [level.shape[-2:] for level in levels]
    parts = pixels.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
    return [part.unflatten(2, tuple(size)) for part, size in zip(parts, sizes, strict=True)]
