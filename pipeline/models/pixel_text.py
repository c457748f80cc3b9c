"""Pixels against texts: scores, their spatial regularisation, and a loss that never has all pixels x labels.

Li, Weinberger, Belongie, Koltun, Ranftl, 2022, arXiv 2201.03546 (LSeg); the formulas are in ``pipeline.models.lseg``.
Scores are computed a strip of rows at a time, again in the backward pass. Labels may differ from image to image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.loaders.segmentation import VOID
from pipeline.models.segments import STRIP, stretched_rows, strips

SCALE = 1 / 0.07
Block = Literal["none", "bottleneck", "depthwise"]
Activation = Literal["lrelu", "relu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrelu": partial(functional.leaky_relu, negative_slope=0.01),
    "relu": functional.relu,
    "tanh": torch.tanh,
}


class SpatialBlock(nn.Module):
    """The spatial regularisation of score maps: one convolution of 3 x 3, applied to each label by itself."""

    def __init__(self, kind: Block, depth: int, activation: Activation = "lrelu") -> None:
        super().__init__()
        self.kind, self.depth, self.activation = kind, depth, activation
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, scores: Tensor) -> Tensor:
        """[B, N, h, w] to the same."""
        return self.applied(scores, self.convolution.weight, self.convolution.bias)

    def applied(self, scores: Tensor, weight: Tensor, bias: Tensor | None, absent: Tensor | None = None) -> Tensor:
        """:meth:`forward` with these weights, without the ``absent`` labels, bool [B, N, 1, 1]."""
        activation = ACTIVATIONS[self.activation]
        for number in range(self.depth):
            scores = self.once(scores, weight, bias, absent)
            if number < self.depth - 1:
                scores = activation(scores)
        return scores

    def once(self, scores: Tensor, weight: Tensor, bias: Tensor | None, absent: Tensor | None = None) -> Tensor:
        """One time, without activation."""
        found = functional.conv2d(scores.flatten(0, 1)[:, None], weight, bias, padding=1)[:, 0].view_as(scores)
        if self.kind != "bottleneck":
            return found
        present = scores if absent is None else scores.masked_fill(absent, -math.inf)
        return found + present.amax(dim=1, keepdim=True)


def scores_of(pixels: Tensor, vectors: Tensor) -> Tensor:
    """Pixel vectors [B, D, h, w] and text vectors [N, D] or [B, N, D] to scores [B, N, h, w], -1 / 0.07 to 1 / 0.07."""
    scores: Tensor = (SCALE * (vectors @ pixels.flatten(2))).unflatten(2, pixels.shape[2:])
    return scores


def pixel_text_loss(
    pixels: Tensor,
    vectors: Tensor,
    labels: Tensor,
    block: SpatialBlock | None = None,
    strip: int = STRIP,
    listed: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of ``labels`` [B, H, W], summed over the pixels that are not ``VOID``.

    ``pixels`` are unit vectors float32 [B, D, h, w]. Their scores for the text vectors [N, D] go through the ``block``
    and are resized to H x W, with aligned corners. At most ``strip`` logits exist at a time, in both passes.

    An image is compared with its ``listed`` labels only, int64 [B, K], without duplicates and padded with ``VOID``; by
    default with all. Labels that are not in their image's list are left out.
    """
    texts = Texts(vectors.float()) if listed is None else Texts.of_lists(vectors.float(), listed)
    wanted = labels if listed is None else listed_positions(labels, listed, len(vectors))
    weight, bias = (None, None) if block is None else (block.convolution.weight, block.convolution.bias)
    with torch.autocast(pixels.device.type, enabled=False):
        loss: Tensor = _PixelTextLoss.apply(pixels.float(), texts, wanted, block, strip, weight, bias)
    return loss


def listed_positions(labels: Tensor, listed: Tensor, count: int) -> Tensor:
    """Class numbers [B, H, W] below ``count`` as positions in their image's list [B, K]; ``VOID`` where not listed."""
    table = labels.new_full((len(labels), count + 1), VOID)  # the last column is the one of void
    where = torch.where(listed == VOID, count, listed)
    table.scatter_(1, where, torch.arange(listed.shape[1], device=labels.device).expand_as(listed).to(labels))
    table[:, count] = VOID
    found = table.gather(1, torch.where(labels == VOID, count, labels).flatten(1).long())
    return found.view_as(labels)


@dataclass(frozen=True)
class Texts:
    """Text vectors [N, D] for all images, or [B, K, D] for each, where ``absent``, bool [B, K, 1, 1], are padding."""

    vectors: Tensor
    absent: Tensor | None = None

    @classmethod
    def of_lists(cls, vectors: Tensor, listed: Tensor) -> "Texts":
        """Those of lists [B, K] of the vectors [N, D]."""
        return cls(vectors[listed.clamp(min=0)], (listed == VOID)[:, :, None, None])


class _PixelTextLoss(torch.autograd.Function):
    """:func:`pixel_text_loss` with gradients for pixels, weight and bias; the text vectors are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        texts: Texts,
        labels: Tensor,
        block: SpatialBlock | None,
        strip: int,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(pixels, labels, weight, bias)
        ctx.texts, ctx.block, ctx.strip = texts, block, strip
        total = pixels.new_zeros(())
        for piece in _pieces(pixels, texts, labels, block, strip):
            total += piece.loss(pixels[:, :, piece.rows], texts, labels, block, weight, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        pixels, labels, weight, bias = ctx.saved_tensors
        total = torch.zeros_like(pixels)
        kernel = [torch.zeros_like(one) for one in (weight, bias) if one is not None]
        for piece in _pieces(pixels, ctx.texts, labels, ctx.block, ctx.strip):
            with torch.enable_grad(), torch.autocast(pixels.device.type, enabled=False):
                some = pixels[:, :, piece.rows].detach().requires_grad_()
                own = [one.detach().requires_grad_() for one in (weight, bias) if one is not None]
                loss = piece.loss(some, ctx.texts, labels, ctx.block, *(own or (None, None)))
                found = torch.autograd.grad(loss, [some, *own])
            total[:, :, piece.rows] += found[0]
            for whole, part in zip(kernel, found[1:], strict=True):
                whole += part
        scaled = [one.mul_(incoming[0]) for one in (total, *kernel)]
        return scaled[0], None, None, None, None, *(scaled[1:] or (None, None))


@dataclass(frozen=True)
class _Piece:
    """Rows ``first`` to ``last`` of the labels, and the ``rows`` of the pixels that they depend on, of ``stored``."""

    first: int
    last: int
    rows: slice
    stored: int

    def loss(
        self,
        pixels: Tensor,
        texts: Texts,
        labels: Tensor,
        block: SpatialBlock | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The summed loss of these rows."""
        height, width = labels.shape[1:]
        scores = scores_of(pixels, texts.vectors)
        if block is not None and weight is not None:
            scores = block.applied(scores, weight, bias, texts.absent)
        logits = stretched_rows(scores, self.first, self.last, height, width, self.rows.start, self.stored)
        if texts.absent is not None:
            logits = logits.masked_fill(texts.absent, -math.inf)
        wanted = labels[:, self.first : self.last]
        return functional.cross_entropy(logits, wanted, ignore_index=VOID, reduction="sum")


def _pieces(pixels: Tensor, texts: Texts, labels: Tensor, block: SpatialBlock | None, strip: int) -> list[_Piece]:
    """Strips of rows whose logits have at most ``strip`` numbers, with a row around for each pass of the block."""
    (count, _, stored, _), (height, width) = pixels.shape, labels.shape[1:]
    halo, found = 0 if block is None else block.depth, []
    for first, last in strips(height, count * texts.vectors.shape[-2] * width, strip):
        low, high = (int(row * (stored - 1) / max(height - 1, 1)) for row in (first, last - 1))
        found.append(_Piece(first, last, slice(max(0, low - halo), min(stored, high + 2 + halo)), stored))
    return found
