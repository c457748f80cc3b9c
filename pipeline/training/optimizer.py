"""AdamW with the CLIP paper's values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.method import Method


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    The values are the CLIP paper's for its vision transformers (table 18); its ResNets took beta2 0.999, epsilon 1e-8.
    """

    learning_rate: float = 5e-4
    """Peak learning rate, reached at the end of the warm-up."""
    first_learning_rate: float = 0.0
    """Where the warm-up begins."""
    final_learning_rate: float = 0.0
    """Where the rate falls to."""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    """Not applied to gains, biases and scalars."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        for name in ("first_learning_rate", "final_learning_rate"):
            require(0 <= getattr(self, name) <= self.learning_rate, name, getattr(self, name), "0 to learning_rate")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "0 to less than 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "0 to less than 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "more than 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")


def make_optimizer(config: AdamW, method: Method) -> torch.optim.AdamW:
    """The optimiser over the method's parameter groups."""
    return torch.optim.AdamW(
        method.parameter_groups(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def take_step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Step, unless ``skipped``, float32 [] on the parameters' device, is 1; the gradients are gone in any case.

    Fused optimisers look at ``found_inf`` themselves, on the device, for ``torch.amp.GradScaler``.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
