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

Momentum, decay and the schedule of the first five are not in the papers but in the library of their code: the first
epoch at a constant 1e-5, then half a cosine that begins at its top and is as long as the whole run, so that a short run
never comes down to nothing. CLIP-Adapter names Adam's kind and no decay: torch's AdamW with decay 0, and since its code
has no recipe, a cosine without a warm-up. The reference takes the last epoch of all but Tip-Adapter-F, whose best epoch
it takes by test images; here ``select`` says, and test images never do.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from pipeline.config import require
from pipeline.models.adapters.adapter import adapter_class

Protocol = Literal["few_shot", "base_to_new", "cross"]
"""Train and test on the same classes; on half of them; on one data set for others (and for its own with shifts)."""


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe:
    """How a method learns; the values are CoOp's for 8 shots or more."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = 0.002
    """Where the cosine begins."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of all that is learned."""
    epsilon: float = 1e-8
    """Of AdamW; 1e-4 in Tip-Adapter, for its half precision."""
    epochs: int = 200
    """Passes over the shots."""
    batch_size: int = 32
    """Images of a step; fewer shots than that make one step."""
    drop_last: bool = True
    """Leave out an epoch's last batch where it is not full."""
    warmup_epochs: int = 1
    """First epochs at ``warmup_rate``."""
    warmup_rate: float = 1e-5
    """A constant rate."""
    falls: Literal["epoch", "step"] = "epoch"
    """Whether the cosine goes down once an epoch, or with every step, to nothing."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop, for methods that read pixels; 0.5 to 1 in Tip-Adapter."""
    flip: float = 0.5
    """Probability of a mirrored image, for these."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers while it learns; what is learned is float32 in any case."""
    select: Literal["validation", "last"] = "validation"
    """Take the epoch with the best validation accuracy (of equals, the least loss), or the last as the papers do."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("learning_rate", "epsilon"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "more than 0")
        for name in ("weight_decay", "warmup_rate", "warmup_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to less than 1")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")

    def steps(self, images: int) -> int:
        """Steps of an epoch over so many images."""
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
    weight_decay=0.01,  # torch's own, which the code leaves as it is
    epsilon=1e-4,
    epochs=20,
    batch_size=256,
    drop_last=False,
    warmup_epochs=0,
    falls="step",
    crop_scale=(0.5, 1.0),
)
_DEEP = AdaptRecipe(learning_rate=0.0035, epochs=5, batch_size=4)


def paper_recipe(method: str, shots: int, protocol: Protocol = "few_shot", data_set: str = "") -> AdaptRecipe | None:
    """The recipe of ``method``'s paper; ``None`` for a method that does not learn by gradients.

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
        "tip_adapter_f": replace(_TIP, epochs=100) if data_set == "eurosat" else _TIP,
    }
    return known[method]


def paper_config(method: str, protocol: Protocol = "few_shot") -> Any:
    """The ``Config`` of ``method`` with the paper's values for ``protocol``.

    Away from few-shot classification CoOp starts from four words (CoCoOp, section 4.1), and MaPLe for other data sets
    learns in three layers.
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
