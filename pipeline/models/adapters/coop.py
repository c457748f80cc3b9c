"""CoOp: Learning to Prompt for Vision-Language Models.

Zhou, Yang, Loy, Liu, 2021, arXiv 2109.01134. The words around a class name, "a photo of a", become M learned vectors v
in the space of word embeddings (section 3.2):

    p(y = c | x) = softmax_c( s cos( g([v1] ... [vM] [name of c]), f(x) ) )

g is CLIP's text tower, f its image tower and s its scale, all frozen; cross-entropy over the classes. The context is
unified (the same for all classes) or class-specific (CSC); the name is at its end, in its middle or before it.

To hold a run against: ImageNet with RN50 and 1/2/4/8/16 shots, 57.15/57.81/59.99/61.56/62.95 (zero-shot 58.18); base
to new over 11 sets with ViT-B/16, 82.69 / 63.22, H 71.66 (CoCoOp's table 1).

Left out: half precision (the reference trains in fp16 without loss scaling, and can diverge); here the context is
float32. The shared part of the prompts is computed once and padding is not, which changes no result: see ``text.py``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit
from pipeline.models.adapters.prompts import Position, initial_context, lay_out, start_of_text


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's context of 16 random vectors."""

    context: int = 16
    """Number M of learned vectors; ignored if ``start`` is given."""
    start: str | None = None
    """Words that initialise the context, such as "a photo of a"; none for random numbers."""
    class_specific: bool = False
    """Learn a context for each class. It cannot be used for other classes."""
    position: Position = "end"
    """Position of the class name: after, in the middle of, or before the context."""
    classes_at_once: int | None = None
    """Classes per pass of the text tower; fewer need less memory and take a third more time; none for all at once."""
    seed: int = 0
    """Seed of a random context."""

    def __post_init__(self) -> None:
        require(self.context >= 1, "context", self.context, "1 or more")
        once = self.classes_at_once
        require(once is None or once >= 1, "classes_at_once", once, "1 or more, or none")


class CoOp(Adapter):
    """A learned context for CLIP's text tower."""

    learns_vectors = True
    config: Config

    @property
    def rebinds(self) -> bool:
        """False for a class-specific context."""
        return not self.config.class_specific

    def build(self) -> None:
        """The context, shared by all classes or one for each."""
        self.tower = self.clip.text_tower()
        count = len(self.learned_classes) if self.config.class_specific else None
        random = torch.Generator().manual_seed(self.config.seed)
        self.context = nn.Parameter(initial_context(self.tower, self.config.context, self.config.start, count, random))

    def rebind(self) -> None:
        """Lay out the prompts of the class names; the context replaces the templates."""
        rows, specific = self.context.shape[-2], self.config.class_specific
        self.layout = lay_out(self.tower, self.classes, rows, self.config.position, class_specific=specific)

    def class_vectors(self) -> Tensor:
        """float [C, D], unit length."""
        shared = start_of_text(self.tower)
        if self.layout.shared:
            shared = torch.cat([shared, self.context[None, : self.layout.shared]], dim=1)
        at_once = self.config.classes_at_once
        features = self.tower.features(shared, self.layout.rows, self.context, classes_at_once=at_once)
        return unit(features[0])

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        return self.clip.scale * unit(images) @ self.vectors_now().T

    def head(self) -> Tensor:
        """The class vectors: after training, CoOp costs no more than a linear classifier."""
        with torch.no_grad():
            return self.class_vectors()
