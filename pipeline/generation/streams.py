"""Random numbers of an optimised image: a function of its seed, the step and the purpose.

So an image is the same alone and in a batch, and a resumed optimisation needs no state of a generator. The numbers are
made on the CPU: they are the same on every device.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """Purposes of random numbers; the values are part of the results."""

    START = 1
    """The first state of an image."""
    VIEWS = 2
    """Augmentation in a step."""
    PROMPTS = 3
    """Augmentation of image prompts."""


def generators(seeds: Sequence[int], step: int, purpose: Draw) -> list[torch.Generator]:
    """A generator for each image, at the start of its numbers of this step."""
    states = (np.random.SeedSequence([seed, step, int(purpose)]).generate_state(2) for seed in seeds)
    return [torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1])) for state in states]


def uniform(random: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Numbers from 0 to 1, float32 [N, *shape], those of each generator by itself."""
    return torch.stack([torch.rand(shape, generator=one) for one in random])


def normal(random: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers, float32 [N, *shape]."""
    return torch.stack([torch.randn(shape, generator=one) for one in random])
