"""CLIP-Adapter: Better Vision-Language Models with Feature Adapters.

Gao, Geng, Zhang, Ma, Fang, Zhang, Li, Qiao, 2021, arXiv 2110.04544. Two linear layers after a frozen tower, blended
with the tower's output (section 3.2), for raw image features x and class vectors W:

    A(z) = relu( relu( z W1 ) W2 ),   x' = a A_v(x) + (1 - a) x,   W' = b A_t(W) + (1 - b) W
    p(y = c | x) = softmax_c( s cos(x', W'_c) )

W1 reduces D to D / 4; neither layer has a bias. The image branch alone is the paper's choice; the text branch and both
are its ablation. The outer relu is in the authors' code but not in the paper's formula: ``final_relu`` selects it.

To hold a run against: ImageNet with RN50 and 1/2/4/8/16 shots, 61.20/61.52/61.84/62.68/63.59; 16 shots, mean of eleven
sets, 74.44 (zero-shot 58.89). The blend was chosen for each set in the paper: 0.2 for ImageNet, 0.6 for textures.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit


@dataclass(frozen=True, kw_only=True)
class Config:
    """The authors' values for ImageNet."""

    branch: Literal["visual", "textual", "both"] = "visual"
    """Adapted features: image features, class vectors, or both."""
    reduction: int = 4
    """Factor by which the hidden layer is narrower than the features."""
    ratio: float = 0.2
    """Blend ratio a of adapted image features, 0 to 1: 0 is CLIP, 1 the adapter alone."""
    text_ratio: float = 0.2
    """Blend ratio b of adapted class vectors, 0 to 1."""
    final_relu: bool = True
    """Apply a relu after the second layer, as the authors' code does."""
    seed: int = 0
    """Seed of the layers' initial weights."""

    def __post_init__(self) -> None:
        require(self.reduction >= 1, "reduction", self.reduction, "1 or more")
        for name in ("ratio", "text_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")


class ClipAdapter(Adapter):
    """Bottleneck layers after CLIP's towers."""

    learns_vectors = True
    config: Config

    def build(self) -> None:
        """The layers of the selected branches."""
        width, branch = self.clip.features, self.config.branch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.visual = self._bottleneck(width) if branch != "textual" else None
            self.textual = self._bottleneck(width) if branch != "visual" else None

    def rebind(self) -> None:
        """The templates' class vectors."""
        self.vectors = self.clip.class_vectors(self.classes, self.templates)

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        features = images if self.visual is None else _blend(self.visual, images, self.config.ratio)
        return self.clip.scale * unit(features) @ self.vectors_now().to(images.dtype).T

    def class_vectors(self) -> Tensor:
        """float [C, D], unit length."""
        if self.textual is None:
            return self.vectors
        vectors = self.vectors.to(next(self.textual.parameters()).dtype)
        return unit(_blend(self.textual, vectors, self.config.text_ratio))

    def head(self) -> Tensor | None:
        """The class vectors, if image features are not adapted."""
        with torch.no_grad():
            return self.class_vectors() if self.visual is None else None

    def _bottleneck(self, width: int) -> nn.Sequential:
        hidden = max(1, width // self.config.reduction)
        layers = [nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False)]
        return nn.Sequential(*layers, *([nn.ReLU()] if self.config.final_relu else []))


def _blend(layers: nn.Module, features: Tensor, ratio: float) -> Tensor:
    blended: Tensor = ratio * layers(features) + (1 - ratio) * features
    return blended
