"""Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification.

Zhang, Fang, Zhang, Gao, Li, Dai, Qiao, Li, 2022, arXiv 2207.09519. The shots form a cache: keys F (unit features; the
mean over augmented views is taken before normalising) and values L (one-hot labels). An image with unit features f gets
(section 3.1)

    logits = alpha exp( -beta (1 - f F^T) ) L  +  s f W^T

with the class vectors W of the templates. The exponential is applied to the affinities, and its result is multiplied by
L: more evidence for a class only raises its logit. A grid search on validation images chooses alpha and beta, never the
test set (the authors' code uses ImageNet's test set).

To hold a run against: ImageNet with RN50 and 1/2/4/8/16 shots, 60.70/60.96/60.98/61.45/62.03; 16 shots, mean of eleven
sets, 70.32. Without the search, alpha 1 and beta 5.5 are the best of the paper's ablation on ImageNet.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, Shots, unit

ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Config:
    """The best values of the paper's ablation, before the search."""

    alpha: float = 1.0
    """Weight alpha of the cache: the paper's residual ratio."""
    beta: float = 5.5
    """Sharpness beta of the affinities."""
    search: bool = True
    """Choose alpha and beta on validation images."""
    largest_alpha: float = 10.0
    """Upper end of the search for alpha, which starts at 0.1; the authors use 3 to 50, by data set."""
    largest_beta: float = 12.0
    """Upper end of the search for beta, which starts at 0.1; the authors use 7 to 50, by data set."""
    alphas: int = 20
    """Number of values of alpha in the search."""
    betas: int = 200
    """Number of values of beta in the search."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("largest_alpha", "largest_beta"):
            require(getattr(self, name) > 0.1, name, getattr(self, name), "more than 0.1")
        for name in ("alphas", "betas"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


class TipAdapter(Adapter):
    """A cache of labelled features in addition to CLIP's own classifier."""

    learns = False
    config: Config
    keys: Tensor
    values: Tensor
    choice: Tensor

    @property
    def rebinds(self) -> bool:
        """False: the cache has labels of its classes only."""
        return False

    def build(self) -> None:
        """An empty cache; :meth:`prepare` fills it."""
        self.register_buffer("keys", torch.empty(0, self.clip.features))
        self.register_buffer("values", torch.empty(0, dtype=torch.int64))
        self.register_buffer("choice", torch.tensor([self.config.alpha, self.config.beta], dtype=torch.float64))

    def rebind(self) -> None:
        """The templates' class vectors."""
        self.vectors = self.clip.class_vectors(self.classes, self.templates)

    def prepare(self, shots: Shots) -> None:
        """Fill the cache with the shots.

        Raises:
            SettingError: a label outside of the classes, or features of another width.
        """
        width = self.clip.features
        require(shots.features.shape[-1] == width, "shots", tuple(shots.features.shape), f"features of width {width}")
        top = len(self.classes)
        fits = 0 <= int(shots.labels.min()) and int(shots.labels.max()) < top
        require(fits, "shots", int(shots.labels.max()), f"labels from 0 to {top - 1}")
        self.restore({"keys": unit(shots.features.mean(dim=1)), "values": shots.labels, "choice": self.choice})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a cache of any number of shots."""
        for name in ("keys", "values"):
            if name in tensors:
                mine = getattr(self, name)
                mine.data = torch.empty_like(tensors[name], dtype=mine.dtype, device=mine.device)
        super().restore(tensors)

    def select(self, shots: Shots, validation: Shots) -> None:
        """Choose alpha and beta by the accuracy on ``validation``; at ties the first on the grid."""
        if self.config.search:
            alpha, beta, _ = self.search(validation)
            self.choice.copy_(torch.tensor([alpha, beta], dtype=torch.float64))

    def choices(self) -> dict[str, float]:
        """``alpha`` and ``beta``, if they were searched for."""
        alpha, beta = self.choice.tolist()
        return {"alpha": alpha, "beta": beta} if self.config.search else {}

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        features = unit(images)
        alpha, beta = (float(value) for value in self.choice)
        evidence: Tensor = class_sums(affinity_weights(features, self.keys, beta), self.values, len(self.classes))
        zero_shot: Tensor = self.clip.scale * features @ self.vectors.to(features.dtype).T
        return zero_shot + alpha * evidence

    @torch.no_grad()
    def search(self, validation: Shots) -> tuple[float, float, float]:
        """The best alpha and beta of the grid, and their accuracy on ``validation``, 0 to 1.

        Values are 0.1 + i (largest - 0.1) / count, without the upper end, as in the authors' code. Affinities and
        CLIP's logits are computed once, and each beta takes one exponential.
        """
        config, classes = self.config, len(self.classes)
        alphas, betas = grid(config.largest_alpha, config.alphas), grid(config.largest_beta, config.betas)
        right = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
        images, labels = validation.first_view().to(self.keys.device), validation.labels.to(self.keys.device)
        for start in range(0, len(images), ROWS_AT_ONCE):
            features, wanted = unit(images[start : start + ROWS_AT_ONCE]), labels[start : start + ROWS_AT_ONCE]
            zero_shot = self.clip.scale * features @ self.vectors.to(features.dtype).T
            affinities = features @ self.keys.to(features.dtype).T
            for row, beta in enumerate(betas):
                evidence = class_sums((-beta * (1 - affinities)).exp(), self.values, classes)
                for column, alpha in enumerate(alphas):
                    right[row, column] += int((zero_shot + alpha * evidence).argmax(dim=1).eq(wanted).sum())
        best = int(right.flatten().argmax())
        row, column = divmod(best, len(alphas))
        return alphas[column], betas[row], int(right[row, column]) / len(images)


def affinity_weights(features: Tensor, keys: Tensor, beta: float) -> Tensor:
    """exp(-beta (1 - f F^T)): unit features [B, D] and keys [N, D] to float [B, N]."""
    return (-beta * (1 - features @ keys.to(features.dtype).T)).exp()


def class_sums(weights: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The product with one-hot labels, without making them: float [B, N] and int64 [N] to float [B, C]."""
    return weights.new_zeros(len(weights), classes).index_add(1, labels, weights)


def grid(largest: float, count: int) -> list[float]:
    """0.1 + i (largest - 0.1) / count for i below ``count``."""
    return [0.1 + number * (largest - 0.1) / count for number in range(count)]
