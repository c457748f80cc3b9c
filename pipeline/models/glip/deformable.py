"""A deformable convolution with modulation, built on torch's bilinear sampling.

Zhu, Hu, Lin, Dai, 2018, "Deformable ConvNets v2", arXiv 1811.11168. Each tap of a filter of 3 x 3 is read at its own
place plus an offset, between four pixels, and is multiplied by a weight:

    y(p) = sum_k W_k m_k(p) x(stride * p + k + o_k(p)),      0 outside of the map

The values and gradients are those of ``torchvision.ops.deform_conv2d``. On a CPU torchvision's backward pass, which
goes over single numbers, takes five to nine times as long. The nine samples of each pixel are not stored for the
backward pass: they would take nine times the memory of the map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

TAPS = 9
SIDE = 3


class DeformableConvolution(nn.Module):
    """A filter of 3 x 3 with padding 1 and a bias, in float32: offsets of bfloat16 would be off by pixels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.randn(width, width, SIDE, SIDE) * 0.01)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, level: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, H, W].

        ``offsets`` are [B, 18, H, W], y and x of each tap in pixels of ``level``, and ``weights`` [B, 9, H, W]. H and W
        are those of a convolution of this stride.
        """
        size = tuple(-(-side // self.stride) for side in level.shape[-2:])
        if size != tuple(offsets.shape[-2:]):
            raise ValueError(f"offsets of {tuple(offsets.shape[-2:])} for a result of {size}")
        with torch.autocast(level.device.type, enabled=False):
            grid = _grid(offsets.float(), level.shape[-2:], self.stride)
            found: Any = _SampledProduct.apply(level.float(), grid, weights.float().flatten(2), self.weight.flatten(1))
            result: Tensor = found.unflatten(2, size) + self.bias[:, None, None]
            return result


def _grid(offsets: Tensor, size: torch.Size, stride: int) -> Tensor:
    """The places of all taps [B, 9, H * W, 2], x and y from -1 to 1 between the edges of a map of ``size``."""
    height, width = size
    rows, columns = offsets.shape[-2:]
    taps = torch.arange(TAPS, device=offsets.device)
    y = torch.arange(rows, device=offsets.device)[:, None] * stride - 1 + (taps // SIDE)[:, None, None]
    x = torch.arange(columns, device=offsets.device)[None] * stride - 1 + (taps % SIDE)[:, None, None]
    moved = offsets.unflatten(1, (TAPS, 2))
    across, down = (2 * (x + moved[:, :, 1]) + 1) / width - 1, (2 * (y + moved[:, :, 0]) + 1) / height - 1
    return torch.stack([across, down], dim=-1).flatten(2, 3)


def _samples(level: Tensor, grid: Tensor) -> Tensor:
    """[B, C, 9, H * W]"""
    return functional.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """[I, J] times each of [B, J, N]; ``matrix @ columns`` would transpose, and so copy, all columns."""
    return torch.bmm(matrix.expand(len(columns), -1, -1), columns)


class _SampledProduct(torch.autograd.Function):
    """The product of a filter [O, C * 9] with weighted samples of a map; the samples are taken again backward."""

    @staticmethod
    def forward(context: Any, level: Tensor, grid: Tensor, weights: Tensor, kernel: Tensor) -> Tensor:
        context.save_for_backward(level, grid, weights, kernel)
        return _product(kernel, _samples(level, grid).mul_(weights[:, None]).flatten(1, 2))

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        level, grid, weights, kernel = context.saved_tensors
        with torch.enable_grad(), torch.autocast(level.device.type, enabled=False):
            level, grid = level.detach().requires_grad_(), grid.detach().requires_grad_()
            samples = _samples(level, grid)
        with torch.no_grad():
            arriving = _product(kernel.T, gradient).unflatten(1, (-1, TAPS))
            columns = (samples * weights[:, None]).flatten(1, 2)
            of_kernel = (gradient @ columns.transpose(1, 2)).sum(dim=0)
            of_weights = (arriving * samples).sum(dim=1)
            of_level, of_grid = torch.autograd.grad(samples, (level, grid), arriving * weights[:, None])
        return of_level, of_grid, of_weights, of_kernel
