"""AdamW with the CLIP paper's values, SGD, and learning rates that fall with a layer's depth or differ by tower."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.method import Method

SCALE = "rate_scale"  # in a parameter group: what the run's learning rate is multiplied by


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What the optimisers share: how the learning rate runs, and how it differs by layer and tower."""

    learning_rate: float = 5e-4
    """Peak learning rate, reached at the end of the warm-up."""
    first_learning_rate: float = 0.0
    """Where the warm-up begins."""
    final_learning_rate: float = 0.0
    """Where the rate falls to, by half a cosine."""
    drops: tuple[float, ...] = ()
    """Milestones, parts of the run between 0 and 1. At each the rate falls to a tenth; there is no cosine then."""
    weight_decay: float = 0.2
    """Not applied to gains, biases and scalars."""
    layer_decay: float | None = None
    """Each layer of a tower learns at so much of the rate of the one above it (BEiT and MAE fine-tune with 0.65 to
    0.75); what is in no tower learns at the full rate."""
    image_rate: float | None = None
    """Times the learning rate, for the image tower."""
    text_rate: float | None = None
    """Times the learning rate, for the text tower."""
    tower_rates: Mapping[str, float] = field(default_factory=dict)
    """Times the learning rate, for towers by name, such as audio 0.1; image and text may be named here as well."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        for name in ("first_learning_rate", "final_learning_rate"):
            require(0 <= getattr(self, name) <= self.learning_rate, name, getattr(self, name), "0 to learning_rate")
        require(all(0 < part < 1 for part in self.drops), "drops", self.drops, "more than 0, less than 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        decay = self.layer_decay
        require(decay is None or 0 < decay <= 1, "layer_decay", decay, "more than 0, up to 1, or none")
        for name in ("image_rate", "text_rate"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, name, rate, "more than 0, or none")
        for tower, rate in self.tower_rates.items():
            require(rate > 0, "tower_rates", f"{tower} {rate}", "a rate of more than 0 for each tower")
        twice = self._fields_of_towers().keys() & self.tower_rates.keys()
        require(not twice, "tower_rates", sorted(twice), "towers whose rate is not given by an option of their own")

    def rates(self) -> dict[str, float]:
        """What the learning rate is multiplied by, for each tower that has a rate of its own."""
        return {**self._fields_of_towers(), **self.tower_rates}

    def _fields_of_towers(self) -> dict[str, float]:
        own = {"image": self.image_rate, "text": self.text_rate}
        return {tower: rate for tower, rate in own.items() if rate is not None}


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    The values are the CLIP paper's for its vision transformers (table 18); its ResNets took beta2 0.999, epsilon 1e-8.
    """

    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "0 to less than 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "0 to less than 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Sgd(OptimizerConfig):
    """Gradient descent with momentum, by which detectors are trained; the decay is added to the gradient."""

    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to less than 1")


Optimizer = AdamW | Sgd


def make_optimizer(config: Optimizer, method: Method) -> torch.optim.Optimizer:
    """The optimiser over the method's parameter groups, divided by learning rate; see :func:`set_rate`."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if isinstance(config, Sgd):
        return torch.optim.SGD(_groups(config, method), momentum=config.momentum, **common)
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(_groups(config, method), betas=betas, eps=config.epsilon, **common)


def rate_scales(config: OptimizerConfig, method: Method) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by; those that are not named have 1.

    Raises:
        SettingError: ``tower_rates`` names a tower that the method does not have.
    """
    decay = 1.0 if config.layer_decay is None else config.layer_decay
    rates, layers = config.rates(), method.layers()
    towers = {layer.tower for layer in layers.values()}
    unknown = sorted(config.tower_rates.keys() - towers)
    known = ", ".join(sorted(towers)) or "it has none"
    require(not unknown, "tower_rates", unknown, f"towers of the method: {known}")
    return {name: rates.get(layer.tower, 1.0) * decay**layer.above for name, layer in layers.items()}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step: ``rate``, times what each group has of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(SCALE, 1.0)


def _groups(config: OptimizerConfig, method: Method) -> list[dict[str, Any]]:
    """The method's groups, each divided into parts of one rate, the lowest (the deepest layers) first."""
    scales = rate_scales(config, method)
    scale_of = {id(value): scales.get(name, 1.0) for name, value in method.named_parameters()}
    divided = []
    for group in method.parameter_groups():
        for scale in sorted({scale_of[id(value)] for value in group["params"]}) or [1.0]:
            members = [value for value in group["params"] if scale_of[id(value)] == scale]
            divided.append({**group, "params": members, SCALE: scale})
    return divided


def take_step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Step, unless ``skipped``, float32 [] on the parameters' device, is 1; the gradients are gone in any case.

    Fused optimisers look at ``found_inf`` themselves, on the device, for ``torch.amp.GradScaler``.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
