"""IVLP: independent learned prompts in both towers, the uncoupled baseline of MaPLe's paper.

Khattak, Rasheed, Maaz, Khan, Khan, 2022, arXiv 2210.03117, table 1 ("independent V-L prompting"): like MaPLe, but the
image tower's rows V_i are independent parameters instead of linear images of the text tower's P_i. Without rows in the
image tower it is deep language prompting; without rows in the text tower see ``vpt.py``.

To hold a run against: base to new over 11 sets with ViT-B/16, 82.15 / 74.07, H 77.90; language alone (4 rows, depth
12) 81.72 / 73.81, H 77.56.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit
from pipeline.models.adapters.prompts import SPREAD, deep_class_vectors, first_rows, lay_out
from pipeline.models.adapters.vision import VisionTower


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's two rows in each of twelve layers of both towers."""

    text_depth: int = 12
    """Number of text tower layers with their own rows."""
    text_length: int = 2
    """Rows per layer of the text tower."""
    vision_depth: int = 12
    """Number of image tower layers with their own rows; 0 for deep language prompting."""
    vision_length: int = 2
    """Rows per layer of the image tower."""
    start: str | None = "a photo of a"
    """Words whose first ``text_length`` initialise the first layer's rows; the rest follows them; none for random."""
    classes_at_once: int | None = None
    """Classes per pass of the text tower; fewer need less memory and take a third more time; none for all at once."""
    seed: int = 0
    """Seed of the random initial rows."""

    def __post_init__(self) -> None:
        for name in ("text_depth", "text_length", "vision_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.vision_depth >= 0, "vision_depth", self.vision_depth, "0 or more")
        once = self.classes_at_once
        require(once is None or once >= 1, "classes_at_once", once, "1 or more, or none")


class IndependentPrompts(Adapter):
    """Learned rows in both towers, independent of each other."""

    reads = "pixels"
    learns_vectors = True
    config: Config

    def build(self) -> None:
        """Rows of both towers."""
        config = self.config
        self.tower, self.vision = self.clip.text_tower(), VisionTower(self.clip.model)
        most_text, most_vision = len(self.tower.blocks), self.vision.layers
        require(config.text_depth <= most_text, "text_depth", config.text_depth, f"at most {most_text} here")
        require(config.vision_depth <= most_vision, "vision_depth", config.vision_depth, f"at most {most_vision} here")
        random = torch.Generator().manual_seed(config.seed)
        first, self.words = first_rows(self.tower, config.text_length, config.start, random)
        self.context = nn.Parameter(first)
        self.deep = random_rows(config.text_depth - 1, config.text_length, self.tower.width, random)
        self.rows = random_rows(config.vision_depth, config.vision_length, self.vision.width, random)

    def rebind(self) -> None:
        """Lay out the prompts of the class names."""
        self.layout = lay_out(self.tower, self.classes, len(self.context) + len(self.words))

    def class_vectors(self) -> Tensor:
        """float [C, D], unit length."""
        at_once = self.config.classes_at_once
        return unit(deep_class_vectors(self.tower, self.layout, self.context, self.words, list(self.deep), at_once))

    def logits(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W], to float [B, C]."""
        features = self.vision.features(self.clip.normalised(images), list(self.rows))
        return self.clip.scale * unit(features) @ self.vectors_now().T


def random_rows(layers: int, length: int, width: int, generator: torch.Generator) -> nn.ParameterList:
    """Normal random numbers with deviation 0.02: ``layers`` parameters [length, width]."""
    return nn.ParameterList(torch.randn(length, width, generator=generator) * SPREAD for _ in range(layers))
