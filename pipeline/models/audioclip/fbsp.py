"""A trained spectrogram of complex frequency B-spline wavelets, which replaces the matrix of a Fourier transform.

Guzhov, Raue, Hees, Dengel, 2021, "ESResNe(X)t-fbsp: Learning Robust Time-Frequency Transformation of Audio", arXiv
2104.11587. Row k has three trained numbers: an order m, a bandwidth b and a frequency f. With N times t from -pi to pi
and sinc(u) = sin(u) / u, it is

    w_k(t) = sqrt(b / N) sinc(b t / m)^m exp(-i f t)      m = 0, b = 1, f = k at the start

The power of a negative sinc is complex: |sinc|^m exp(i pi m). At the start every row has length 1 and is nearly a row
of the Fourier transform; t includes both ends, so high frequencies are not exactly those of a transform.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.models.losses import Gather, alone

EPSILON = 1e-8  # the authors', in times, orders and norms


class Spectrum(NamedTuple):
    """Real and imaginary parts, float [..., rows], and the wavelets' penalty, a scalar."""

    real: Tensor
    imaginary: Tensor
    penalty: Tensor


class FbspTransform(nn.Module):
    """Compares frames with ``rows`` wavelets. Its parameters have the authors' names."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(rows))
        self.fb = nn.Parameter(torch.ones(rows))
        self.fc = nn.Parameter(torch.arange(rows, dtype=torch.float32))

    def wavelets(self, length: int, gather: Gather = alone) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts of all rows, float [rows, length]; see :class:`_UnitGradient` for ``gather``."""
        order, bandwidth, frequency = (
            cast(Tensor, _UnitGradient.apply(parameter, gather))[:, None] for parameter in (self.m, self.fb, self.fc)
        )
        times = math.pi * torch.linspace(-1, 1, length, dtype=order.dtype, device=order.device) + EPSILON
        window = _sinc(bandwidth * times / (order + EPSILON))
        magnitude = window.abs().clamp(min=torch.finfo(window.dtype).tiny).pow(order)
        phase = order * math.pi * (window < 0) - frequency * times
        scaled = (bandwidth / length).sqrt() * magnitude
        return scaled * phase.cos(), scaled * phase.sin()

    def forward(self, frames: Tensor, gather: Gather = alone) -> Spectrum:
        """Windowed frames, float [..., length]; the penalty is the mean of (row length - 1)^2."""
        real, imaginary = self.wavelets(frames.shape[-1], gather)
        lengths = (real.square() + imaginary.square()).sum(dim=1).sqrt()
        penalty = (lengths - 1).square().mean()
        return Spectrum(functional.linear(frames, real), functional.linear(frames, imaginary), penalty)


def frame_count(samples: int, length: int, hop: int) -> int:
    """Number of frames of ``length`` samples at distances of ``hop`` that cover ``samples``."""
    return 1 + max(-(-(samples - length) // hop), 0)


def framed(signal: Tensor, length: int, hop: int) -> Tensor:
    """[..., T] to [..., frames, length]; half of the missing samples are zeros before the signal, half after it."""
    missing = (frame_count(signal.shape[-1], length, hop) - 1) * hop + length - signal.shape[-1]
    before = missing // 2
    return functional.pad(signal, (before, missing - before)).unfold(-1, length, hop)


def _sinc(argument: Tensor) -> Tensor:
    safe = torch.where(argument == 0, 1, argument)
    return torch.where(argument == 0, 1, safe.sin() / safe)


class _UnitGradient(torch.autograd.Function):
    """The parameter itself; its gradient is divided by its largest entry, as the authors' hooks do.

    With several ranks, the mean of their gradients is divided: what one process with the whole batch would get.
    """

    @staticmethod
    def forward(context: Any, parameter: Tensor, gather: Gather) -> Tensor:
        context.gather = gather
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None]:
        mean = context.gather(slope[None].contiguous()).mean(dim=0)
        return mean / (mean.abs().max() + EPSILON), None
