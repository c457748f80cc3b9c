"""The learning rate as a function of the step: linear warm-up, then half a cosine (arXiv 1608.03983), milestones, a
power of the remaining part of the run, or an exponential."""

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: int,
    first: float = 0.0,
    final: float = 0.0,
    milestones: Sequence[float] = (),
    power: float | None = None,
    exponential: float | None = None,
) -> float:
    """The rate of step ``step`` of ``steps``, counted from 0.

    It rises linearly from ``first`` (before any step) to ``peak`` in the last warm-up step. Then it falls to nearly
    ``final`` in the last step or, with ``milestones`` (parts of the run), to a tenth after each of them, or with
    ``power`` as that power of the remaining part of the run. It is a pure function, so a resumed run needs no scheduler
    state.
    """
    if step < warmup_steps:
        return first + (peak - first) * (step + 1) / warmup_steps
    if milestones:
        return peak * 0.1 ** sum(step >= part * steps for part in milestones)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if exponential is not None:
        return peak * math.pow(exponential, progress)
    if power is not None:
        return final + (peak - final) * math.pow(1 - progress, power)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
