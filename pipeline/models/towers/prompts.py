"""The vector of a class: the mean of its prompts.

Radford et al. 2021, arXiv 2103.00020, section 3.1.4: the unit features of a class's name in many prompts are averaged,
and the mean is normalised.
"""

from torch import Tensor
from torch.nn import functional


def average_prompts(features: Tensor, prompts: int) -> Tensor:
    """Unit vectors [C, D] of classes from the unit features [C x prompts, D] of their prompts, class after class."""
    means = features.reshape(len(features) // prompts, prompts, -1).mean(dim=1)
    return functional.normalize(means, dim=-1)
