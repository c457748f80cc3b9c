"""The learning rate as a function of the step: linear warm-up, then half a cosine (Loshchilov and Hutter 2016)."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """The rate of step ``step`` of ``steps``, counted from 0.

    It rises in equal parts to ``peak`` in the last warm-up step, then falls to nearly 0 in the last step of all. A
    pure function: a resumed run needs no state of it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * (1 + math.cos(math.pi * progress)) / 2
