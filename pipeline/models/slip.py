"""SLIP: Self-supervision meets Language-Image Pre-training.

Mu, Kirillov, Wagner, Xie, 2021, arXiv 2112.12750

The idea: in addition to CLIP's loss, pull two strongly augmented crops of an image together, as SimCLR does (Chen,
Kornblith, Norouzi, Hinton, 2020, arXiv 2002.05709). Both losses share the image tower: one view is compared with the
captions, two others pass through a projection head, which reads the tower's output before CLIP's projection. With unit
outputs a_i, b_i of the head for the two views of image i, B images and temperature t = 0.1, the loss is

    L = CLIP + c SimCLR,   SimCLR = -1/2B sum_i [ log p(a_i, b_i) + log p(b_i, a_i) ],    c = 1
    p(a_i, b_i) = exp(a_i.b_i / t) / ( sum_j exp(a_i.b_j / t) + sum_(j != i) exp(a_i.a_j / t) )

With several processes, each computes its own rows against the columns of all, gathered with their gradients, and the
head's batch normalisation uses the rows of all. The head is applied in the comparison of embeddings, so that gradient
caching is exact for towers without batch normalisation.

Differences from the authors' code: both towers are open_clip's, with GELU. There the text tower has QuickGELU, and the
image tower is timm's, with a bias in the patch embedding and without the norm before the blocks. Sizes are theirs:
``clipmill-slip-small`` is their ViT-S (width 384, 12 heads), ``clipmill-slip-large`` their ViT-L, ``ViT-B-16`` their
ViT-B, each with a text tower of width 512.

Left out: the other self-supervised objectives of the paper's ablation; biases of the linear layers before batch
normalisation, which would remove them; the random choice among several captions (``caption`` names one). The blur is a
Gaussian of 3 sigma, where the paper's code uses Pillow's approximation.

To hold a run against: table 1, 25 epochs of YFCC15M, ImageNet zero-shot / linear / fine-tuned: ViT-S 38.3 / 66.4 /
80.3, ViT-B 42.8 / 72.1 / 82.6, ViT-L 46.2 / 76.0 / 84.2 (CLIP: 32.7 / 59.3 / 78.2, 37.6 / 66.5 / 80.5, 40.4 / 70.5 /
81.0); ViT-B on CC3M 23.0 / 65.4 / 81.4 and CC12M 40.7 / 73.7 / 83.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.augment import ColourReader, Colours, ViewsReader
from pipeline.loaders.batches import Reader
from pipeline.loaders.text import TextSettings
from pipeline.models import clip
from pipeline.models.losses import Gather, alone
from pipeline.models.towers import openclip
from pipeline.models.towers.batch_norm import GatheredBatchNorm
from pipeline.models.towers.colours import recolour
from pipeline.models.towers.unprojected import unprojected, unprojected_width


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings with SLIP's crop, and the settings of the self-supervised loss, with the paper's values."""

    architecture: str = "ViT-B-16"
    """open_clip architecture, or one of ours, such as clipmill-slip-small and -large (the paper's sizes S and L)."""
    crop: Literal["square", "resized"] = "resized"
    """Training crop: CLIP's random square, or a box of random area and aspect ratio."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of the area of the crop for captions, as a part of the image, 0 to 1."""
    self_supervision: float = 1.0
    """Weight of the self-supervised loss."""
    ssl_temperature: float = 0.1
    """Temperature of the self-supervised loss; it is not trained."""
    ssl_hidden: int = 4096
    """Width of the two hidden layers of the projection head."""
    ssl_width: int = 256
    """Output width of the projection head."""
    view_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the area of the two self-supervised crops, as a part of the image, 0 to 1."""
    view_flip: float = 0.5
    """Probability of mirroring each self-supervised crop."""
    colours: Colours = field(default_factory=Colours)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.self_supervision >= 0, "self_supervision", self.self_supervision, "0 or more")
        require(self.ssl_temperature > 0, "ssl_temperature", self.ssl_temperature, "more than 0")
        require(min(self.ssl_hidden, self.ssl_width) >= 1, "ssl_hidden, ssl_width", 0, "1 or more")
        low, high = self.view_scale
        require(0 < low <= high <= 1, "view_scale", self.view_scale, "0 < low <= high <= 1")
        require(0 <= self.view_flip <= 1, "view_flip", self.view_flip, "0 to 1")


class Head(nn.Module):
    """Three linear layers, the first two batch-normalised and rectified (section 4.1)."""

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(width, hidden, bias=False), GatheredBatchNorm(hidden)
        self.second, self.second_norm = nn.Linear(hidden, hidden, bias=False), GatheredBatchNorm(hidden)
        self.last = nn.Linear(hidden, output)

    def forward(self, features: Tensor, gather: Gather = alone) -> Tensor:
        """Float [B, width] to float32 [B, output]; normalises in float32 (float64 stays) regardless of autocast."""
        hidden = functional.relu(self.first_norm(_precise(self.first(features)), gather))
        hidden = functional.relu(self.second_norm(_precise(self.second(hidden)), gather))
        return _precise(self.last(hidden))


class Slip(clip.Clip):
    """CLIP with a self-supervised loss on two further views."""

    batch_keys = ("views", "colours", "text")
    # Gradients before the head's batch normalisation are sums up to 6, rounded to a millionth of that.
    parity_tolerance = 5e-6
    former_names = {
        f"head.{norm}.{former}": f"head.{norm}.{name}"
        for norm in ("first_norm", "second_norm")
        for former, name in (("mean", "running_mean"), ("variance", "running_var"))
    }
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        super().__init__(config, description)
        self.head = Head(unprojected_width(self.model.visual), config.ssl_hidden, config.ssl_width)

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP with a small head."""
        return Config(architecture="clipmill-tiny", ssl_hidden=64, ssl_width=32)

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Three crops from one decoding, the colour parameters of the last two, and captions."""
        config = self.config
        view = openclip.image_transform(self.model, crop="resized", scale=config.view_scale, flip=config.view_flip)
        return [
            ViewsReader(transforms=(self.transforms(True), view, view), seed=seed),
            ColourReader(colours=config.colours, views=2, seed=seed),
            *self.text_readers(settings, seed),
        ]

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CLIP's features of the first view and the captions; the unprojected features of the two other views."""
        views, numbers = batch["views"], batch["colours"]
        with torch.no_grad(), torch.autocast(views.device.type, enabled=False):
            augmented = views[:, 1:].transpose(0, 1).flatten(0, 1).float() / 255
            augmented = recolour(augmented, numbers.transpose(0, 1).flatten(0, 1), self.config.colours.sigma[1])
            augmented = (augmented * 255 - self.mean) / self.std
        first, second = unprojected(self.model.visual, augmented).chunk(2)
        embeddings = super().embed({"image": views[:, 0], "text": batch["text"]})
        return {**embeddings, "first": first, "second": second}

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's features of the first view."""
        return super().targets({"image": batch["views"][:, 0], "text": batch["text"]})

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CLIP's loss, and the weighted self-supervised one."""
        first, second = (self.head(embeddings[view], self.gather) for view in ("first", "second"))
        views = functional.normalize(first, dim=-1), functional.normalize(second, dim=-1)
        loss = nt_xent(*views, self.config.ssl_temperature, self.gather)
        return {**super().compare(embeddings), "self_supervised": self.config.self_supervision * loss}


def nt_xent(first: Tensor, second: Tensor, temperature: float, gather: Gather = alone) -> Tensor:
    """SimCLR's loss of two views' unit rows, float [B, D]: the mean over this rank's rows, a scalar.

    A row's negatives are the other images' rows of both views, of all ranks; the row itself is left out.
    """
    with torch.autocast(first.device.type, enabled=False):
        all_first, all_second = gather(torch.cat([first, second], dim=1)).chunk(2, dim=1)
        rows = torch.arange(len(first), device=first.device)
        own = rows if len(all_first) == len(first) else rows + distributed.get_rank() * len(first)
        losses = []
        for here, same, other in ((first, all_first, all_second), (second, all_second, all_first)):
            itself = functional.one_hot(own, len(same)).bool()
            logits = torch.cat([here @ other.T, (here @ same.T).masked_fill(itself, -torch.inf)], dim=1)
            losses.append(functional.cross_entropy(logits / temperature, own))
        return (losses[0] + losses[1]) / 2


def _precise(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
