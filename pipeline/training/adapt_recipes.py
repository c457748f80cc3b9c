"""The papers' recipes for adapting a frozen CLIP from a few labelled images, as values.

    method         optimiser             rate    epochs                        batch  rate falls  from
    coop           SGD 0.9, decay 5e-4   0.002   50, 100, 200 by shots         32     each epoch  CoOp, section 4.1
                   (1, 2 and 4, 8 and 16 shots; 50 on ImageNet)
    cocoop         the same              0.002   10                            1      each epoch  CoCoOp, section 4
    maple          the same              0.0035  5                             4      each epoch  MaPLe, section 4
                   (trained for other data sets: 0.0026, 2 epochs, 3 layers)
    ivlp           the same              0.0035  5                             4      each epoch  MaPLe's code
    vpt            the same              0.0025  5                             4      each epoch  MaPLe's code
    clip_adapter   AdamW                 1e-5    200                           32     each epoch  CLIP-Adapter, sec. 4
    tip_adapter_f  AdamW, epsilon 1e-4   0.001   20 (100 on EuroSAT)           256    each step   Tip-Adapter, sec. 4.1
    pointclip      SGD 0.9, decay 5e-4   0.01    250                           32     each epoch  PointCLIP's code

Momentum, decay and the schedule of those with SGD come from the library of their code, not from the papers. The first
epoch has a constant rate of 1e-5. Then half a cosine starts at its peak and has the length of the whole run, so a short
run does not reach zero. CLIP-Adapter names Adam and no decay: this is torch's AdamW with decay 0 and, since its code
has no recipe, a cosine without a warm-up. The reference takes the last epoch of all methods but Tip-Adapter-F, whose
best epoch it chooses by test images. Here ``select`` decides, and never uses test images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from pipeline.config import require
from pipeline.models.adapters.adapter import Adapter, adapter_class

Protocol = Literal["few_shot", "base_to_new", "cross"]
"""Train and test on the same classes; on half of them; on one data set for others (and for its own with shifts)."""


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe:
    """The training recipe of a method; the defaults are CoOp's for 8 shots or more."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = 0.002
    """Learning rate at the start of the cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of all trained parameters."""
    epsilon: float = 1e-8
    """Epsilon of AdamW; 1e-4 in Tip-Adapter, for its half precision."""
    epochs: int = 200
    """Passes over the shots."""
    batch_size: int = 32
    """Images per step; fewer shots make one step."""
    drop_last: bool = True
    """Drop an epoch's last batch if it is not full."""
    warmup_epochs: int = 1
    """Number of first epochs with ``warmup_rate``."""
    warmup_rate: float = 1e-5
    """Constant learning rate of the warm-up."""
    falls: Literal["epoch", "step"] = "epoch"
    """Update the cosine once per epoch, or per step; per step it falls to zero."""
    crop_scale: tuple[float, float] | None = None
    """Range of a random crop's area, 0 to 1, for methods that read pixels; none for 0.08 to 1. Other methods read
    stored features, whose crops are those of ``Views``."""
    flip: float | None = None
    """Probability of mirroring an image, for methods that read pixels; none for 0.5."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the towers in training; trained parameters are always float32."""
    select: Literal["validation", "last"] = "validation"
    """Use the epoch with the best validation accuracy (at ties the lowest loss), or the last as the papers do."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("learning_rate", "epsilon"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "more than 0")
        for name in ("weight_decay", "warmup_rate", "warmup_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to less than 1")
        if self.crop_scale is not None:
            low, high = self.crop_scale
            require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        require(self.flip is None or 0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    def check_for(self, kind: type[Adapter]) -> None:
        """Raise ``SettingError`` for settings of crops if ``kind`` does not read images."""
        for name in ("crop_scale", "flip"):
            value = getattr(self, name)
            allowed = f"none for {kind.__name__}, which reads stored features: set --{name.replace('_', '-')}"
            require(value is None or kind.reads == "pixels", name, value, allowed)

    def crops(self) -> dict[str, Any]:
        """The training transform of images: random crops, by default those of CoOp's code."""
        scale = (0.08, 1.0) if self.crop_scale is None else self.crop_scale
        return {"crop": "resized", "scale": scale, "flip": 0.5 if self.flip is None else self.flip}

    def steps(self, images: int) -> int:
        """Steps per epoch for this number of images."""
        whole = images // self.batch_size
        return max(1, whole if self.drop_last else -(-images // self.batch_size))

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of step ``step`` of ``steps`` in epoch ``epoch``, all counted from 0."""
        if epoch < self.warmup_epochs:
            return self.warmup_rate
        after = epoch - self.warmup_epochs
        if self.falls == "epoch":
            progress = after / self.epochs
        else:
            progress = (after * steps + step) / max(1, (self.epochs - self.warmup_epochs) * steps)
        return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2


_CLIP_ADAPTER = AdaptRecipe(optimizer="adamw", learning_rate=1e-5, weight_decay=0.0, epochs=200, warmup_epochs=0)
_TIP = AdaptRecipe(
    optimizer="adamw",
    learning_rate=0.001,
    weight_decay=0.01,  # torch's default, which the code does not change
    epsilon=1e-4,
    epochs=20,
    batch_size=256,
    drop_last=False,
    warmup_epochs=0,
    falls="step",
)
_DEEP = AdaptRecipe(learning_rate=0.0035, epochs=5, batch_size=4)


def paper_recipe(method: str, shots: int, protocol: Protocol = "few_shot", data_set: str = "") -> AdaptRecipe | None:
    """The recipe of ``method``'s paper; ``None`` for a method without gradient training.

    Raises:
        SettingError: an unknown method, or no shots.
    """
    require(shots >= 1, "shots", shots, "1 or more")
    if not adapter_class(method).learns:
        return None
    if method == "coop":
        few = 50 if shots == 1 else 100 if shots <= 4 else 200
        return AdaptRecipe(epochs=50 if data_set == "imagenet" else few)
    if method == "maple" and protocol == "cross":
        return replace(_DEEP, learning_rate=0.0026, epochs=2)
    known = {
        "cocoop": AdaptRecipe(epochs=10, batch_size=1),
        "maple": _DEEP,
        "ivlp": _DEEP,
        "vpt": replace(_DEEP, learning_rate=0.0025),
        "clip_adapter": _CLIP_ADAPTER,
        "pointclip": AdaptRecipe(learning_rate=0.01, epochs=250),
        "tip_adapter_f": replace(_TIP, epochs=100) if data_set == "eurosat" else _TIP,
    }
    return known[method]


def paper_templates(method: str, data_set: str) -> str:
    """The templates that ``method``'s paper uses for ``data_set``, as a setting of the evaluations: ``auto`` for those
    of the card. Tip-Adapter's figures on ImageNet and its variants use seven (its code's ``ImageNet.template``)."""
    is_tip = method in ("tip_adapter", "tip_adapter_f")
    return "imagenet-simple" if is_tip and data_set.partition("_")[0] == "imagenet" else "auto"


def paper_config(method: str, protocol: Protocol = "few_shot") -> Any:
    """The ``Config`` of ``method`` with the paper's values for ``protocol``.

    In other protocols than few-shot classification, CoOp starts from four words (CoCoOp, section 4.1), and MaPLe learns
    in three layers for other data sets.
    """
    values: dict[str, Any] = {}
    if method == "coop" and protocol != "few_shot":
        values = {"context": 4, "start": "a photo of a"}
    if method == "maple" and protocol == "cross":
        values = {"depth": 3}
    return import_module(adapter_class(method).__module__).Config(**values)


def make_optimizer(recipe: AdaptRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own optimiser; the rate is set anew at every step."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, eps=recipe.epsilon, weight_decay=recipe.weight_decay)
