"""VPT: Visual Prompt Tuning of CLIP's image tower, a baseline of MaPLe's paper.

Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim, 2022, arXiv 2203.12119 (its deep variant): learned rows in every
layer of the image tower. The class vectors are those of the templates, "a photo of a {}." in MaPLe's paper, and are
fixed.

To hold a run against: base to new over 11 sets with ViT-B/16 and 8 rows in 12 layers, 80.24 / 73.43, H 76.68.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit
from pipeline.models.adapters.ivlp import random_rows
from pipeline.models.adapters.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class Config:
    """Eight rows in each of twelve layers."""

    depth: int = 12
    """Number of layers with their own rows."""
    length: int = 8
    """Rows per layer."""
    seed: int = 0
    """Seed of the random initial rows."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, "depth", self.depth, "1 or more")
        require(self.length >= 1, "length", self.length, "1 or more")


class VisualPrompts(Adapter):
    """Learned rows in the image tower."""

    reads = "pixels"
    config: Config

    def build(self) -> None:
        """The rows."""
        self.vision = VisionTower(self.clip.model)
        require(
            self.config.depth <= self.vision.layers, "depth", self.config.depth, f"at most {self.vision.layers} here"
        )
        random = torch.Generator().manual_seed(self.config.seed)
        self.rows = random_rows(self.config.depth, self.config.length, self.vision.width, random)

    def rebind(self) -> None:
        """The templates' class vectors."""
        self.vectors = self.clip.class_vectors(self.classes, self.templates)

    def logits(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W], to float [B, C]."""
        features = unit(self.vision.features(self.clip.normalised(images), list(self.rows)))
        return self.clip.scale * features @ self.vectors.to(features.dtype).T
