"""PointCLIP: Point Cloud Understanding by CLIP. The inter-view adapter, for a few labelled clouds of each class.

Zhang, Guo, Zhang, Li, Miao, Cui, Qiao, Gao, Li, 2021, arXiv 2112.02413, section 3.3. From the raw features F [V, D] of
the V views of a cloud it makes a global feature, and from that a residual for every view. With trained gates g [V]

    global = dropout( relu( BN( W1 flatten( dropout( BN( g F ) ) ) ) ) )        W1: V D -> D
    adapted = relu( W3 relu( W2 global ) )                                      W2: D -> D, W3: D -> V D
    F' = a adapted + (1 - a) flatten(F)
    logits_c = s < F' / |F'|, T_c / |T_c| >                                     T_c: the class vector, V times

The first BN has D channels and counts views as samples. The loss is the cross-entropy with smoothed targets: 1 - e for
the label and e / (C - 1) for each other class. CLIP is frozen, and the class vectors are those of the templates.

To hold a run against: ModelNet40 with RN101, 16 shots and the prompt "point cloud of a big {}.": 86.71 % (authors'
code). Left out: the authors' random scale and translation of training clouds, since features are computed once.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, Shots, unit


@dataclass(frozen=True, kw_only=True)
class Config:
    """The authors' values."""

    views: int = 10
    """Views of a cloud; 10 with --projection few_shot, 6 with zero_shot."""
    ratio: float = 0.6
    """Blend ratio a of the adapted features, 0 to 1: 0 is CLIP."""
    gate: float = 0.5
    """Initial gates g."""
    dropout: float = 0.075
    """Probability of dropout, 0 to less than 1."""
    smoothing: float = 0.2
    """Part e of the target that is spread over the other classes, 0 to less than 1."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""

    def __post_init__(self) -> None:
        require(self.views >= 1, "views", self.views, "1 or more")
        require(0 <= self.ratio <= 1, "ratio", self.ratio, "0 to 1")
        for name in ("dropout", "smoothing"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to less than 1")


class InterViewAdapter(Adapter):
    """Gates, a global feature of all views, and a residual for each view."""

    reads: ClassVar[Literal["features", "pixels", "views"]] = "views"
    config: Config

    def build(self) -> None:
        """The layers."""
        config, width = self.config, self.clip.features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.gates = nn.Parameter(torch.full((config.views,), config.gate))
            self.view_norm = nn.BatchNorm1d(width)
            self.gather = nn.Linear(config.views * width, width)
            self.global_norm = nn.BatchNorm1d(width)
            self.spread = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.views * width), nn.ReLU()
            )
        self._random = torch.Generator(self.clip.device).manual_seed(config.seed)

    def rebind(self) -> None:
        """The templates' class vectors."""
        self.vectors = self.clip.class_vectors(self.classes, self.templates)

    def prepare(self, shots: Shots) -> None:
        """Check the number of views; raises ``SettingError``."""
        self._check_views(shots.features)

    def adapted(self, views: Tensor) -> Tensor:
        """Raw features of views, float [B, V, D], to adapted ones, float [B, V, D]."""
        self._check_views(views)
        gated = views * self.gates[:, None]
        normed = self._dropped(self.view_norm(gated.flatten(0, 1)).view_as(gated))
        whole = self._dropped(functional.relu(self.global_norm(self.gather(normed.flatten(1)))))
        residual: Tensor = self.spread(whole).view_as(views)
        return self.config.ratio * residual + (1 - self.config.ratio) * views

    def logits(self, images: Tensor) -> Tensor:
        """Raw features of views, float [B, V, D], to float [B, C]."""
        features = unit(self.adapted(images).flatten(1)).view_as(images)
        # The repeated unit class vectors have the length sqrt(V).
        mean = features.sum(dim=1) / self.config.views**0.5
        logits: Tensor = self.clip.scale * mean @ self.vectors.to(mean.dtype).T
        return logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy with smoothed targets."""
        require(len(labels) > 1, "batch_size", len(labels), "two clouds or more, for batch normalisation")
        return smoothed_cross_entropy(self.logits(images), labels, self.config.smoothing)

    def _dropped(self, values: Tensor) -> Tensor:
        """Dropout by a generator of its own, so that a run repeats itself."""
        rate = self.config.dropout
        if not self.training or not rate:
            return values
        kept = torch.rand(values.shape, generator=self._random, device=values.device) >= rate
        return values * kept / (1 - rate)

    def _check_views(self, views: Tensor) -> None:
        count = views.shape[1]
        allowed = f"{count}, the views of a cloud by --projection"
        require(count == self.config.views, "pointclip: views", self.config.views, allowed)


def smoothed_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """float [B, C] that sums to 1: 1 - e for the label, e / (C - 1) for each other class."""
    rest = smoothing / (classes - 1)
    return torch.full((len(labels), classes), rest, device=labels.device).scatter(1, labels[:, None], 1 - smoothing)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The mean cross-entropy of logits, float [B, C], with :func:`smoothed_targets`."""
    return functional.cross_entropy(logits, smoothed_targets(labels, logits.shape[1], smoothing).to(logits.dtype))
