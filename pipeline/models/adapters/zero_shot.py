"""Zero-shot CLIP, the baseline of every method.

Radford et al. 2021, arXiv 2103.00020, section 3.1.4: the mean of a class's prompts is its vector.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.models.adapters.adapter import Adapter, unit


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class ZeroShotClassifier(Adapter):
    """The class vectors of the templates."""

    learns = False

    def build(self) -> None:
        """Nothing is learned."""

    def rebind(self) -> None:
        """The templates' class vectors."""
        self.vectors = self.clip.class_vectors(self.classes, self.templates)

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        return self.clip.scale * unit(images) @ self.vectors.to(images.dtype).T

    def head(self) -> Tensor:
        """The class vectors."""
        return self.vectors
