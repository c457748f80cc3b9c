"""Random colours and blur for a batch on its device; every image has its own parameters.

The operations equal torchvision's for float images (``transforms.v2.functional``), whose functions take one parameter
for a whole batch. The parameters are those of ``pipeline.loaders.augment``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loaders.augment import BRIGHTNESS, CONTRAST, GREY, HUE, ORDER, SATURATION, SIGMA

WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in grey; ITU-R BT.601, to torchvision's digits


def recolour(image: Tensor, numbers: Tensor, largest_sigma: float) -> Tensor:
    """Float [B, 3, H, W] in [0, 1] to the same: jitter in each row's order, then grey, then blur.

    ``numbers`` are float [B, NUMBERS]; ``largest_sigma`` bounds the blur's width without reading them.
    """
    for operation in numbers[:, ORDER].unbind(1):
        image = _blended(image, operation, numbers)
        image = _where(image, operation == 3, numbers[:, HUE], turn_hue)
    image = torch.where(_column(numbers[:, GREY] > 0), to_grey(image), image)
    radius = min(math.ceil(3 * largest_sigma), min(image.shape[-2:]) - 1)
    return _where(image, numbers[:, SIGMA] > 0, numbers[:, SIGMA], lambda part, sigma: blur(part, sigma, radius))


def to_grey(image: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = image.split(1, dim=1)
    grey: Tensor = WEIGHTS[0] * red + WEIGHTS[1] * green + WEIGHTS[2] * blue
    return grey


def turn_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of each image [B, 3, H, W] by ``turns`` [B] of a full circle."""
    red, green, blue = image.unbind(1)
    value, chroma = image.amax(1), image.amax(1) - image.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = torch.where(value == red, (green - blue) / safe, sixths) + 6 * turns[:, None, None]
    channels = []
    for start in (5, 3, 1):
        place = (start + sixths) % 6
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(image: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of [B, C, H, W] with ``sigma`` [B] pixels and 2 ``radius`` + 1 taps; edges are mirrored."""
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None].clamp(min=1e-3)) ** 2, dim=1)
    rows, channels, height, width = image.shape
    kernel = kernel.repeat_interleave(channels, dim=0)[:, None, None]
    flat = functional.pad(image, [radius] * 4, mode="reflect").reshape(1, rows * channels, *_grown(image, radius))
    across = functional.conv2d(flat, kernel, groups=rows * channels)
    down = functional.conv2d(across, kernel.transpose(2, 3), groups=rows * channels)
    return down.reshape(rows, channels, height, width)


def _grown(image: Tensor, radius: int) -> tuple[int, int]:
    return image.shape[-2] + 2 * radius, image.shape[-1] + 2 * radius


def _blended(image: Tensor, operation: Tensor, numbers: Tensor) -> Tensor:
    """Brightness, contrast or saturation, which mix the image with black, its mean grey or its grey version."""
    grey = to_grey(image)
    nothing, mean = torch.zeros_like(grey), grey.mean(dim=(1, 2, 3), keepdim=True)
    other = torch.where(_column(operation == 1), mean, torch.where(_column(operation == 2), grey, nothing))
    factor = torch.ones_like(operation)
    for number, place in enumerate((BRIGHTNESS, CONTRAST, SATURATION)):
        factor = torch.where(operation == number, numbers[:, place], factor)
    return torch.lerp(other, image, _column(factor)).clamp(0, 1)


def _where(image: Tensor, chosen: Tensor, number: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``change`` applied to the chosen rows: to them alone on a CPU; to all on a GPU, to avoid waiting."""
    if image.is_cuda:
        return torch.where(_column(chosen), change(image, number), image)
    rows = chosen.nonzero().squeeze(1)
    return image.index_copy(0, rows, change(image[rows], number[rows])) if len(rows) else image


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
