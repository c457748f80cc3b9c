"""CoCoOp: Conditional Prompt Learning for Vision-Language Models.

Zhou, Yang, Loy, Liu, 2022, arXiv 2203.05557. CoOp's context overfits its training classes; here every image shifts the
context by one vector of a small network, the Meta-Net h (section 3.2):

    v_m(x) = v_m + h( f(x) / |f(x)| ),   p(y = c | x) = softmax_c( s cos( g([v1(x)] ... [vM(x)] [name of c]), f(x) ) )

h is linear to D / 16, ReLU, linear to the text tower's width, both with bias. The name follows the context.

To hold a run against: base to new over 11 sets with ViT-B/16, 80.47 / 71.69, H 75.83 (table 1).

A batch of images goes through the text tower at once: the context of each image is computed once, and all classes share
its keys and values. The gradient equals that of the reference's loop over single images. Its recipe of one image per
step differs, because it makes more updates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, unit
from pipeline.models.adapters.prompts import initial_context, lay_out, start_of_text


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's context of four words, and a Meta-Net of a sixteenth of the features."""

    context: int = 4
    """Number M of learned vectors; ignored if ``start`` is given."""
    start: str | None = "a photo of a"
    """Words that initialise the context; none for random numbers."""
    reduction: int = 16
    """Factor by which the Meta-Net is narrower than the image features."""
    classes_at_once: int | None = None
    """Classes per pass of the text tower; fewer need less memory and take a third more time; none for all at once."""
    seed: int = 0
    """Seed of a random context and of the Meta-Net."""

    def __post_init__(self) -> None:
        require(self.context >= 1, "context", self.context, "1 or more")
        require(self.reduction >= 1, "reduction", self.reduction, "1 or more")
        once = self.classes_at_once
        require(once is None or once >= 1, "classes_at_once", once, "1 or more, or none")


class CoCoOp(Adapter):
    """A learned context that depends on the image."""

    per_image = True
    config: Config

    def build(self) -> None:
        """The context, and the Meta-Net with torch's default initialisation."""
        self.tower = self.clip.text_tower()
        random = torch.Generator().manual_seed(self.config.seed)
        self.context = nn.Parameter(initial_context(self.tower, self.config.context, self.config.start, None, random))
        features = self.clip.features
        hidden = max(1, features // self.config.reduction)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.meta_net = nn.Sequential(
                nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.tower.width)
            )

    def rebind(self) -> None:
        """Lay out the prompts of the class names; the context replaces the templates."""
        self.layout = lay_out(self.tower, self.classes, len(self.context))

    def vectors_of(self, features: Tensor) -> Tensor:
        """Unit image features [B, D] to float [B, C, D], unit length: a classifier for each image."""
        context = self.context + self.meta_net(features)[:, None]
        shared = torch.cat([start_of_text(self.tower).expand(len(features), -1, -1), context], dim=1)
        vectors = self.tower.features(shared, self.layout.rows, classes_at_once=self.config.classes_at_once)
        return unit(vectors)

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        features = unit(images)
        return self.clip.scale * torch.einsum("bd,bcd->bc", features, self.vectors_of(features))
