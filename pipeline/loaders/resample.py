"""Antialiased bicubic resizing as matrix products, for many images at once on a GPU."""

import torch
from torch import Tensor

AT_ONCE = 64  # images whose matrices and float pixels are in memory together


def resize_each(pixels: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of several sizes to one size, as Pillow's bicubic does, to within two levels of 255.

    ``pixels`` is uint8 [N, 3, H, W], each image in the upper left corner; ``heights`` and ``widths`` are int64 [N], on
    the same device. Returns uint8 [N, 3, height, width]. Nothing waits for the device.
    """
    parts = zip(pixels.split(AT_ONCE), heights.split(AT_ONCE), widths.split(AT_ONCE), strict=True)
    return torch.cat([_resized(*part, size) for part in parts])


def _resized(pixels: Tensor, heights: Tensor, widths: Tensor, size: tuple[int, int]) -> Tensor:
    """Columns first, rounded in between, as in Pillow."""
    rows = _matrices(heights, size[0], pixels.shape[2])
    columns = _matrices(widths, size[1], pixels.shape[3])
    narrow = torch.einsum("nsw,nchw->nchs", columns, pixels.float()).round().clamp(0, 255)
    return torch.einsum("nth,nchs->ncts", rows, narrow).round().clamp(0, 255).to(torch.uint8)


def _matrices(lengths: Tensor, size: int, limit: int) -> Tensor:
    """float32 [N, size, limit]: the filter's weights of the first ``lengths`` of ``limit`` pixels for each result."""
    device = lengths.device
    step = (lengths / size)[:, None]
    centres = (torch.arange(size, device=device) + 0.5) * step
    places = torch.arange(limit, device=device)
    distance = (places + 0.5 - centres[:, :, None]) / step.clamp(min=1.0)[:, :, None]
    weights = bicubic(distance) * (places < lengths[:, None])[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def bicubic(distance: Tensor) -> Tensor:
    """Keys' filter with a = -1/2 (1981), which is 0 from a distance of 2 on."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
