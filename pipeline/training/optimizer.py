"""AdamW with the CLIP paper's values, SGD, both together, and learning rates that differ by depth or by tower."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.models.method import Method
from pipeline.training.schedule import learning_rate

SCALE = "rate_scale"  # in a parameter group: factor of the run's learning rate
OWN = "sgd"  # in a parameter group: whether it follows the schedule of AdamWWithSgd's second optimiser


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings that all optimisers share: the learning rate schedule, and its factors by layer and tower."""

    learning_rate: float = 5e-4
    """Peak learning rate, at the end of the warm-up."""
    first_learning_rate: float = 0.0
    """Learning rate at the start of the warm-up."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    drops: tuple[float, ...] = ()
    """Milestones as parts of the run between 0 and 1; the rate falls to a tenth at each. They replace the cosine."""
    decay_power: float | None = None
    """Power of the remaining part of the run that the rate follows instead of the cosine; 0.9 is usual for
    segmentation."""
    exponential: float | None = None
    """Part of the learning rate that is left at the end of the run, more than 0, up to 1: the rate falls exponentially
    instead of by the cosine. A factor of 0.96 per epoch for 50 epochs leaves 0.13."""
    weight_decay: float = 0.2
    """Weight decay; not applied to gains, biases and scalars."""
    layer_decay: float | None = None
    """Factor between the learning rates of a layer and the next higher one, up to 1 (BEiT and MAE fine-tune with 0.65
    to 0.75); parameters outside of towers use the full rate."""
    image_rate: float | None = None
    """Factor of the learning rate for the image tower."""
    text_rate: float | None = None
    """Factor of the learning rate for the text tower."""
    tower_rates: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate for towers by name, such as audio 0.1; may include image and text."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        for name in ("first_learning_rate", "final_learning_rate"):
            require(0 <= getattr(self, name) <= self.learning_rate, name, getattr(self, name), "0 to learning_rate")
        require(all(0 < part < 1 for part in self.drops), "drops", self.drops, "more than 0, less than 1")
        power = self.decay_power
        require(power is None or power > 0, "decay_power", power, "more than 0, or none")
        require(power is None or not self.drops, "decay_power", power, "none with drops")
        left = self.exponential
        require(left is None or 0 < left <= 1, "exponential", left, "more than 0, up to 1, or none")
        alone = left is None or (not self.drops and power is None)
        require(alone, "exponential", left, "none with drops or decay_power")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        decay = self.layer_decay
        require(decay is None or 0 < decay <= 1, "layer_decay", decay, "more than 0, up to 1, or none")
        for name in ("image_rate", "text_rate"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, name, rate, "more than 0, or none")
        for tower, rate in self.tower_rates.items():
            require(rate > 0, "tower_rates", f"{tower} {rate}", "a rate of more than 0 for each tower")
        twice = self._fields_of_towers().keys() & self.tower_rates.keys()
        require(not twice, "tower_rates", sorted(twice), "towers without an option of their own")

    def rates(self) -> dict[str, float]:
        """The factors of the learning rate, for each tower that has one."""
        return {**self._fields_of_towers(), **self.tower_rates}

    def _fields_of_towers(self) -> dict[str, float]:
        own = {"image": self.image_rate, "text": self.text_rate}
        return {tower: rate for tower, rate in own.items() if rate is not None}


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    The values are the CLIP paper's for its vision transformers (table 18); its ResNets use beta2 0.999, epsilon 1e-8.
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
    """Gradient descent with momentum, the usual optimiser of detectors; the weight decay is added to the gradient."""

    learning_rate: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    """Nesterov's momentum; needs a momentum of more than 0."""
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to less than 1")
        require(self.momentum > 0 or not self.nesterov, "nesterov", True, "False without momentum")


@dataclass(frozen=True, kw_only=True)
class AdamWWithSgd(AdamW):
    """AdamW for most weights, and gradient descent with its own rate and schedule for some towers."""

    sgd_towers: tuple[str, ...] = ("image",)
    """Towers of the method that gradient descent trains; AdamW trains all other weights."""
    sgd_learning_rate: float = 1e-3
    """Learning rate of gradient descent from the first step on; the warm-up is AdamW's alone."""
    sgd_momentum: float = 0.0
    """Momentum of gradient descent, 0 to less than 1."""
    sgd_weight_decay: float = 0.0
    """Weight decay of gradient descent."""
    sgd_drops: tuple[float, ...] = ()
    """Milestones of gradient descent as parts of the run; its rate falls to a tenth at each, and is constant else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sgd_learning_rate > 0, "sgd_learning_rate", self.sgd_learning_rate, "more than 0")
        require(0 <= self.sgd_momentum < 1, "sgd_momentum", self.sgd_momentum, "0 to less than 1")
        require(self.sgd_weight_decay >= 0, "sgd_weight_decay", self.sgd_weight_decay, "0 or more")
        require(all(0 < part < 1 for part in self.sgd_drops), "sgd_drops", self.sgd_drops, "more than 0, less than 1")
        require(bool(self.sgd_towers), "sgd_towers", self.sgd_towers, "one tower or more")
        rated = self.rates().keys() & set(self.sgd_towers)
        require(not rated, "sgd_towers", sorted(rated), "towers without a factor of AdamW's rate")

    @property
    def sgd(self) -> Sgd:
        """The settings of gradient descent."""
        return Sgd(
            learning_rate=self.sgd_learning_rate,
            momentum=self.sgd_momentum,
            weight_decay=self.sgd_weight_decay,
            drops=self.sgd_drops,
            exponential=None if self.sgd_drops else 1.0,
        )


Optimizer = AdamW | Sgd | AdamWWithSgd


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters as one, with one state and one list of groups."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Step each part with its groups; fused parts read ``found_inf`` as :func:`take_step` sets it."""
        start = 0
        for part in self._parts:
            # Loading a state replaces groups and state, so a part gets both anew.
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            part.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            part.step()
            start = end


def make_optimizer(config: Optimizer, method: Method) -> torch.optim.Optimizer:
    """The optimiser over the method's parameter groups, split by learning rate; see :func:`set_rates`.

    Raises:
        SettingError: the config names a tower that the method lacks.
    """
    groups = _groups(config, method)
    if not isinstance(config, AdamWWithSgd):
        return _optimizer(config, groups)
    _check_towers("sgd_towers", config.sgd_towers, method)
    names = {name for name, layer in method.layers().items() if layer.tower in config.sgd_towers}
    moved = {id(value) for name, value in method.named_parameters() if name in names}
    adam, sgd = ([part for group in groups if (part := _part(group, moved, of))["params"]] for of in (False, True))
    require(bool(adam) and bool(sgd), "sgd_towers", config.sgd_towers, "towers that are trained, but not all of them")
    return CombinedOptimizer([_optimizer(config, adam), _optimizer(config.sgd, [{**one, OWN: True} for one in sgd])])


def _part(group: Mapping[str, Any], chosen: Collection[int], inside: bool) -> dict[str, Any]:
    """The group with those of its parameters whose ``id`` is among the chosen ones, or is not."""
    return {**group, "params": [value for value in group["params"] if (id(value) in chosen) == inside]}


def _optimizer(config: AdamW | Sgd, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if isinstance(config, Sgd):
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, betas=betas, eps=config.epsilon, **common)


def rate_scales(config: OptimizerConfig, method: Method) -> dict[str, float]:
    """The factor of each parameter's learning rate, by name; 1 for parameters that are not listed.

    Raises:
        SettingError: ``tower_rates`` names a tower that the method lacks.
    """
    decay = 1.0 if config.layer_decay is None else config.layer_decay
    rates, layers = config.rates(), method.layers()
    _check_towers("tower_rates", config.tower_rates, method)
    return {name: rates.get(layer.tower, 1.0) * decay**layer.above for name, layer in layers.items()}


def _check_towers(field_name: str, towers: Iterable[str], method: Method) -> None:
    """Raise ``SettingError`` if the method lacks one of ``towers``."""
    known = {layer.tower for layer in method.layers().values()}
    unknown = sorted(set(towers) - known)
    require(not unknown, field_name, unknown, f"towers of the method: {', '.join(sorted(known)) or 'it has none'}")


def set_rates(optimizer: torch.optim.Optimizer, config: Optimizer, done: int, warmup_steps: int, steps: int) -> float:
    """Set each group's learning rate for the step after ``done`` steps: its schedule's rate times its factor.

    Returns the rate without a factor, of AdamW where there are two optimisers.
    """
    rate = _rate(config, done, warmup_steps, steps)
    own = _rate(config.sgd, done, 0, steps) if isinstance(config, AdamWWithSgd) else rate
    for group in optimizer.param_groups:
        group["lr"] = (own if group.get(OWN) else rate) * group.get(SCALE, 1.0)
    return rate


def _rate(config: OptimizerConfig, done: int, warmup_steps: int, steps: int) -> float:
    return learning_rate(
        done,
        peak=config.learning_rate,
        warmup_steps=warmup_steps,
        steps=steps,
        first=config.first_learning_rate,
        final=config.final_learning_rate,
        milestones=config.drops,
        power=config.decay_power,
        exponential=config.exponential,
    )


def _groups(config: OptimizerConfig, method: Method) -> list[dict[str, Any]]:
    """The method's groups, each split into parts of one rate, lowest first (the deepest layers)."""
    scales = rate_scales(config, method)
    scale_of = {id(value): scales.get(name, 1.0) for name, value in method.named_parameters()}
    divided = []
    for group in method.parameter_groups():
        for scale in sorted({scale_of[id(value)] for value in group["params"]}) or [1.0]:
            members = [value for value in group["params"] if scale_of[id(value)] == scale]
            divided.append({**group, "params": members, SCALE: scale})
    return divided


def take_step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Step, unless ``skipped``, float32 [] on the parameters' device, is 1; clears the gradients in any case.

    Fused optimisers read ``found_inf`` on the device, as they do for ``torch.amp.GradScaler``.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
