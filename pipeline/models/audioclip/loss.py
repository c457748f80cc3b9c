"""The contrastive loss of two modalities where samples may lack one of them, in one piece and in tiles.

With features x_i and y_i of the N samples that have both, a scale t, logits S_ij = t x_i.y_j and targets P_ij, the loss
of the global batch is the sum (not the mean) of both directions (AudioCLIP, arXiv 2106.13043, its authors' code):

    L = 1/N sum_i [ log sum_j exp S_ij + log sum_j exp S_ji - 2 sum_j P_ij S_ij ]

P is the identity or, with groups, uniform over the samples of a sample's group: P_ij = [g_i = g_j] / |group of i|. Rows
that lack one of the two are neither anchors nor negatives; their features have no influence and get no gradient.

As in ``pipeline.models.losses``, the mean over ranks is the loss of the global batch, and averaged gradients are exact:
N counts the samples of all ranks. The tiled loss holds one tile of S at a time.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.models.losses import ALONE, TILE, Exchange, Gather, add_products, alone, at_least_float32, tiles

MASKED = -1e4  # a logit whose exponential is 0 beside any cosine times a scale of up to 1,000
_HASH_SIZE = 1 << 24  # integers up to this are exact in float32
_HASHES = 2


def pair_loss(
    first: Tensor,
    second: Tensor,
    present: Tensor,
    logit_scale: Tensor,
    gather: Gather = alone,
    groups: Tensor | None = None,
) -> Tensor:
    """The loss in one piece, for small batches: a scalar, 0 where no sample of any rank has both modalities.

    ``first`` and ``second`` are L2-normalised float [B, D]. ``present``, float [B], is 1 for rows that have both
    modalities, else 0. ``groups``, float [B, G], are equal for rows of one group; none for identity targets.
    ``logit_scale`` is the positive factor itself. Memory grows with the square of the batch.
    """
    first, second, logit_scale = at_least_float32(first, second, logit_scale)
    width, parts = first.shape[1], [] if groups is None else [groups]
    with torch.autocast(first.device.type, enabled=False):
        columns = [part.to(first.dtype) for part in (first, second, present[:, None], *parts)]
        everything = gather(torch.cat(columns, dim=1))
        all_first, all_second, seen = everything[:, :width], everything[:, width : 2 * width], everything[:, 2 * width]
        absent = seen == 0
        by_first = (logit_scale * first @ all_second.T).masked_fill(absent, MASKED).logsumexp(dim=1)
        by_second = (logit_scale * second @ all_first.T).masked_fill(absent, MASKED).logsumexp(dim=1)
        matched = second
        if groups is not None:
            targets = _same_group(columns[3], everything[:, 2 * width + 1 :], seen)
            matched = targets @ all_second / targets.sum(dim=1, keepdim=True).clamp(min=1)
        matching = logit_scale * (first * matched).sum(dim=1)
        share = len(everything) / len(first) / seen.sum().clamp(min=1)
        return share * ((by_first + by_second - 2 * matching) * present).sum()


def tiled_pair_loss(
    first: Tensor,
    second: Tensor,
    present: Tensor,
    logit_scale: Tensor,
    exchange: Exchange = ALONE,
    tile: int = TILE,
    groups: Tensor | None = None,
) -> Tensor:
    """The loss in tiles of ``tile`` x ``tile`` logits; arguments and result as for :func:`pair_loss`."""
    features = at_least_float32(first, second, logit_scale)
    marks = present[:, None] if groups is None else torch.cat([present[:, None], groups], dim=1)
    return cast(Tensor, _TiledPair.apply(*features, marks.to(features[0].dtype), exchange, tile))


def text_groups(tokens: Tensor, padding: int = 0) -> Tensor:
    """Two hashes of each text, float32 [B, 2] with exact integers: equal for equal texts, whatever their padding.

    ``tokens`` are int64 [B, L]. Texts that differ get equal hashes with a probability of 2**-48.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, _HASH_SIZE, (tokens.shape[1], _HASHES), generator=generator).to(tokens.device)
    shifted = (tokens - padding) * (tokens != padding)
    # A product of two numbers below 2**24 and a sum over thousands of them fit into 64 bits.
    return (shifted[:, :, None] * factors).sum(dim=1).remainder(_HASH_SIZE).float()


def _same_group(groups: Tensor, all_groups: Tensor, seen: Tensor) -> Tensor:
    """[b, n], 1 where a row and a column that has both modalities are of one group."""
    equal = groups[:, None] == all_groups[None]
    return equal.all(dim=2).to(seen.dtype) * seen


class _TiledPair(torch.autograd.Function):
    """Columns are the second modality's features with their marks: presence, then groups."""

    @staticmethod
    def forward(
        context: Any, first: Tensor, second: Tensor, scale: Tensor, marks: Tensor, exchange: Exchange, tile: int
    ) -> Tensor:
        factor, width, grouped = scale.reshape(()), first.shape[1], marks.shape[1] > 1
        present, over_second = marks[:, 0], first.new_full((len(first),), -torch.inf)
        matched, group_sizes, count = torch.zeros_like(first), torch.zeros_like(over_second), first.new_zeros(())

        def add(columns: Tensor, over_first: Tensor, own: int | None) -> None:
            count.add_(columns[:, width].sum())
            for rows, part, logits, _ in tiles(first, columns[:, :width], factor, own, tile):
                features, seen, groups = columns[part, :width], columns[part, width], columns[part, width + 1 :]
                by_rows = logits.masked_fill(seen == 0, MASKED).logsumexp(dim=1)
                over_second[rows] = torch.logaddexp(over_second[rows], by_rows)
                by_columns = logits.masked_fill_(present[rows, None] == 0, MASKED).logsumexp(dim=0)
                over_first[part] = torch.logaddexp(over_first[part], by_columns)
                if grouped:
                    targets = _same_group(marks[rows, 1:], groups, seen)
                    matched[rows] += targets @ features
                    group_sizes[rows] += targets.sum(dim=1)

        with torch.autocast(first.device.type, enabled=False):
            columns = torch.cat([second, marks], dim=1)
            over_first = exchange.visit(columns, second.new_full((len(second),), -torch.inf), add, "logsumexp")
            matched = matched / group_sizes[:, None].clamp(min=1) if grouped else second
            matching = factor * (first * matched).sum(dim=1)
        share = exchange.world / count.clamp(min=1)
        context.save_for_backward(first, second, scale, marks, over_second, over_first, group_sizes, share)
        context.exchange, context.tile = exchange, tile
        loss: Tensor = share * ((over_second + over_first - 2 * matching) * present).sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        first, second, scale, marks, over_second, over_first, group_sizes, share = context.saved_tensors
        factor, width, grouped = scale.reshape(()), first.shape[1], marks.shape[1] > 1
        present, to_first = marks[:, 0], torch.zeros_like(first)
        weights = slope * share * present  # of the rows, and of this rank's columns

        def add(columns: Tensor, to_second: Tensor, own: int | None) -> None:
            features, sums, of_columns = columns[:, :width], columns[:, width], columns[:, width + 1]
            seen, groups = columns[:, width + 2], columns[:, width + 3 :]
            for rows, part, logits, diagonal in tiles(first, features, factor, own, context.tile):
                by_columns = logits.masked_fill(present[rows, None] == 0, MASKED)
                by_columns = by_columns.sub_(sums[part]).exp_().mul_(of_columns[part])
                slopes = logits.masked_fill_(seen[part] == 0, MASKED).sub_(over_second[rows, None]).exp_()
                slopes.mul_(weights[rows, None]).add_(by_columns)
                if grouped:
                    targets = _same_group(marks[rows, 1:], groups[part], seen[part])
                    slopes -= 2 * targets * (weights / group_sizes.clamp(min=1))[rows, None]
                else:
                    own_pairs = slopes.diagonal(diagonal)
                    start = max(-diagonal, 0)  # the first row of the tile that is on the diagonal
                    own_pairs.sub_(2 * weights[rows][start : start + len(own_pairs)])
                add_products(slopes, to_first[rows], features[part], to_second[part], first[rows], factor)

        columns = torch.cat([second, over_first[:, None], weights[:, None], marks], dim=1)
        with torch.autocast(first.device.type, enabled=False):
            to_second = context.exchange.visit(columns, torch.zeros_like(second), add, "sum")
        to_scale = (to_first * first).sum().reshape(scale.shape)
        return to_first.mul_(factor), to_second, to_scale, None, None, None
