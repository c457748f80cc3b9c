"""Linear probe: logistic regression on CLIP's image features, the baseline of CoOp's paper.

Radford et al. 2021, arXiv 2103.00020, section 3.1.3 and appendix A.3: L-BFGS with at most 1,000 iterations. Validation
images choose the strength of the L2 penalty. It does not use class names, so with few shots zero-shot is better.

Features and search are those of CoOp's code (lpclip):

    features    raw, not of unit length, of the evaluation transform, without random crops
    C           the first best of 1e6, 1e4, ... 1e-6; then eight halvings, in log C, of a decade to either side of it
    halving     the end with the higher accuracy stays, at a tie the lower end; the other moves to the middle
    the result  the end that stays in the last halving

To hold a run against: ImageNet with RN50 and 1/2/4/8/16 shots, 22.17/31.90/41.20/49.52/56.13.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, Shots

COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The values of CoOp's code."""

    iterations: int = 1000
    """Maximum number of L-BFGS iterations."""
    halvings: int = 8
    """Steps of the finer search for C."""

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        require(self.halvings >= 0, "halvings", self.halvings, "0 or more")


class LinearProbe(Adapter):
    """Logistic regression on raw features."""

    learns = False
    random_views = False
    config: Config
    weight: Tensor
    bias: Tensor
    strength: Tensor

    @property
    def rebinds(self) -> bool:
        """False: a row of weights belongs to its class."""
        return False

    def build(self) -> None:
        """Zeros until :meth:`select` fits them."""
        classes = len(self.learned_classes)
        self.register_buffer("weight", torch.zeros(classes, self.clip.features))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("strength", torch.zeros((), dtype=torch.float64))

    def rebind(self) -> None:
        """Nothing depends on the names."""

    def select(self, shots: Shots, validation: Shots) -> None:
        """Fit all views of the shots, with the best penalty on ``validation``.

        Raises:
            SettingError: shots of a single class.
        """
        views, present = shots.features.shape[1], len(shots.labels.unique())
        require(present >= 2, "shots", present, "shots of two classes or more, for a linear probe")
        inputs, targets = _numpy(shots.features.flatten(0, 1)), _numpy(shots.labels.repeat_interleave(views))
        held, wanted = _numpy(validation.first_view()), _numpy(validation.labels)

        def fit(logarithm: float) -> tuple[float, Any]:
            fitted = regression(10**logarithm, self.config.iterations).fit(inputs, targets)
            return float(np.mean(fitted.predict(held) == wanted)), fitted

        self._take(_best(fit, self.config.halvings))

    def choices(self) -> dict[str, float]:
        """The chosen ``C``."""
        return {"C": float(self.strength)}

    def logits(self, images: Tensor) -> Tensor:
        """Raw features [B, D] to float [B, C]."""
        return images @ self.weight.to(images.dtype).T + self.bias.to(images.dtype)

    def _take(self, fitted: Any) -> None:
        weight, bias = class_rows(fitted, len(self.bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.strength.fill_(fitted.C)


def _best(fit: Callable[[float], tuple[float, Any]], halvings: int) -> Any:
    """The model of a coarse search over log10 C and a finer one, a decade to either side of the best."""
    logarithms = [math.log10(strength) for strength in COARSE]
    tried = {logarithm: fit(logarithm) for logarithm in logarithms}
    centre = max(logarithms, key=lambda logarithm: tried[logarithm][0])
    low, high = centre - 1, centre + 1
    for _ in range(halvings):
        for end in (low, high):
            if end not in tried:
                tried[end] = fit(end)
        middle = (low + high) / 2
        if tried[low][0] < tried[high][0]:
            centre, low = high, middle
        else:
            centre, high = low, middle
    return tried[centre][1]


def regression(strength: float, iterations: int) -> Any:
    """scikit-learn's logistic regression with an L2 penalty of 1 / ``strength``, to be fitted by L-BFGS."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=iterations, solver="lbfgs")


def class_rows(fitted: Any, classes: int) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C] of a fitted :func:`regression`; classes without training images never win."""
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # for two classes scikit-learn has one row
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    seen = torch.from_numpy(fitted.classes_)
    weights = weight.new_zeros(classes, weight.shape[1]).index_copy(0, seen, weight)
    return weights, bias.new_full((classes,), -torch.inf).index_copy(0, seen, bias)


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
