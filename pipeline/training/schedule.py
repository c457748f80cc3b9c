"""The learning rate as a function of the step: linear warm-up, then half a cosine (Loshchilov and Hutter 2016)."""

import math


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, first: float = 0.0, final: float = 0.0
) -> float:
    """The rate of step ``step`` of ``steps``, counted from 0.

    It rises in equal parts from ``first`` (before any step) to ``peak`` in the last warm-up step, then falls to nearly
    ``final`` in the last step of all. A pure function: a resumed run needs no state of it.
    """
    if step < warmup_steps:
        return first + (peak - first) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
