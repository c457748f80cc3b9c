"""The dynamic head: deformable convolutions over neighbouring levels of a pyramid, with attention over level and task.

Dai, Chen, Xiao, Chen, Liu, Yuan, Zhang, 2021, "Dynamic Head", arXiv 2106.08322, as GLIP has it. Each level l has one
map of offsets and modulations, with which three deformable convolutions (``deformable.py``) read the level below with
stride 2, the level itself, and the level above, which is resized. Each result is weighted by a number from its own
mean; their mean goes through a dynamic ReLU (arXiv 2003.10027), max(a1 x + b1, a2 x + b2), whose slopes depend on the
image.

Difference from the authors' code: the level above is half as large as the map of offsets. Their CUDA kernel does not
check that, and reads the first numbers of the map as if they had the smaller shape. Here the map is resized;
``compat_offsets`` reads it as their kernel does, for weights that were trained with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.glip.deformable import TAPS, DeformableConvolution

OFFSETS = 2 * TAPS
REDUCTION = 4  # of the hidden layer of the dynamic ReLU


class ModulatedConvolution(nn.Module):
    """A deformable convolution of 3 x 3 with modulation, then group normalisation."""

    def __init__(self, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.convolution = DeformableConvolution(width, stride)
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, level: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, H, W], the size of ``offsets`` [B, 18, H, W] and ``weights`` [B, 9, H, W]."""
        found: Tensor = self.norm(self.convolution(level, offsets, weights))
        return found


class DynamicRelu(nn.Module):
    """max(a1 x + b1, a2 x + b2) by channel; the four numbers come from the mean of x (DY-ReLU-B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.slopes = nn.Linear(width, width // REDUCTION), nn.Linear(width // REDUCTION, 4 * width)

    def forward(self, level: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        mean = level.mean(dim=(2, 3))
        numbers = functional.hardsigmoid(self.slopes(functional.relu(self.hidden(mean)))) - 0.5
        a1, b1, a2, b2 = numbers[:, :, None, None].chunk(4, dim=1)
        return torch.maximum(level * (2 * a1 + 1) + b1, level * (2 * a2) + b2)


class DynamicBlock(nn.Module):
    """One block of the head over all levels of a pyramid, the finest first."""

    def __init__(self, width: int, groups: int, compat_offsets: bool = False) -> None:
        super().__init__()
        self.compat_offsets = compat_offsets
        self.offset = nn.Conv2d(width, OFFSETS + TAPS, 3, padding=1)
        self.above = ModulatedConvolution(width, 1, groups)
        self.same = ModulatedConvolution(width, 1, groups)
        self.below = ModulatedConvolution(width, 2, groups)
        self.attention = nn.Linear(width, 1)
        nn.init.normal_(self.attention.weight, std=0.01)
        nn.init.zeros_(self.attention.bias)
        self.relu = DynamicRelu(width)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels [B, C, H_l, W_l] to the same; each is half as large as the one before it, rounded up."""
        return [self.relu(self._mixed(levels, number)) for number in range(len(levels))]

    def _mixed(self, levels: Sequence[Tensor], number: int) -> Tensor:
        level = levels[number]
        offsets, weights = self.offset(level).split([OFFSETS, TAPS], dim=1)
        weights = weights.sigmoid()
        branches = [self.same(level, offsets, weights)]
        if number > 0:
            branches.append(self.below(levels[number - 1], offsets, weights))
        if number + 1 < len(levels):
            branches.append(self._from_above(levels[number + 1], offsets, weights))
        weighted = [branch * self._attention(branch) for branch in branches]
        return torch.stack(weighted).mean(dim=0)

    def _from_above(self, level: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        size = offsets.shape[-2:]
        fit = flat_prefix if self.compat_offsets else _resized
        found = self.above(level, fit(offsets, level.shape[-2:]), fit(weights, level.shape[-2:]))
        return _resized(found, size)

    def _attention(self, branch: Tensor) -> Tensor:
        found: Tensor = functional.hardsigmoid(functional.relu(self.attention(branch.mean(dim=(2, 3)))))
        return found[:, :, None, None]


def flat_prefix(values: Tensor, size: Sequence[int]) -> Tensor:
    """The first C * h * w numbers of each [C, H, W] of ``values`` [B, C, H, W] as [B, C, h, w], for ``size`` (h, w)."""
    channels, (height, width) = values.shape[1], size
    prefix: Tensor = values.flatten(1)[:, : channels * height * width].unflatten(1, (channels, height, width))
    return prefix


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(values, size=tuple(size), mode="bilinear", align_corners=True)
