"""Distances between views of an image and texts, with weights and stops."""

import torch
from torch import Tensor


def spherical_distance(one: Tensor, other: Tensor) -> Tensor:
    """Half the squared angle between unit vectors [..., D]: 2 arcsin(|u - v| / 2)^2, float [...]."""
    half: Tensor = ((one - other).norm(dim=-1) / 2).clamp(max=1).arcsin()
    return 2 * half.square()


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """Minus the cosine of unit vectors [..., D]: float [...], -1 to 1."""
    return -(one * other).sum(dim=-1)


def weighted(distances: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
    """VQGAN-CLIP's loss of prompts: |w| s d, with the sign s of the weight; without a gradient where s d is below the
    stop.

    ``distances`` float [P, A] of P prompts and A views; ``weights`` and ``stops``, which may be infinite, float [P].
    """
    signed = distances * weights.sign()[:, None]
    return weights.abs()[:, None] * torch.where(signed > stops[:, None], signed, signed.detach())
