"""Losses over the pairs of all ranks, in tiles: softmax (InfoNCE), sigmoid (SigLIP), and distillation from a teacher.

With features x_i of images and y_j of texts, B pairs on W ranks, a scale t and a bias b, the logits are
S = t x_i.y_j (+ b), and the losses of the global batch

    softmax:  1/2B sum_i [ log sum_j exp S_ij + log sum_j exp S_ji - 2 S_ii ]      van den Oord et al., arXiv 1807.03748
    sigmoid:  1/B sum_ij softplus(-z_ij S_ij),  z_ij = 1 where i = j, else -1      Zhai et al., arXiv 2303.15343

An image may have K texts y_jk, such as the prompts of its nouns. The softmax over an image's row is then over all K B
texts, with an equal share of the target for each of its own (GroupViT, arXiv 2202.11094, section 3.2):

    softmax:  1/2B sum_i [ log sum_jk exp S_i(jk) + 1/K sum_k ( log sum_j exp S_j(ik) - 2 S_i(ik) ) ]

With the logits T of a teacher for the same pairs, and p and q the softmaxes of T and S over a row or a column,

    distillation:  1/2B sum_i [ KL(p_i. || q_i.) + KL(p_.i || q_.i) ]              Vasu et al., arXiv 2311.17049, 3.2

The tiled losses never hold more of S than one tile. The forward pass stores the logarithms of the sums over rows and
columns; the backward pass recomputes the tiles and their derivatives from these. That takes four matrix products of the
size of S, where the plain softmax loss takes six, and memory linear in B. (Memory: Cheng et al., Inf-CL, arXiv
2410.17243.)

Each rank owns the rows of its images and needs the texts of all ranks. An :class:`Exchange` defines how texts reach a
rank, and how their sums and gradients return: gathered at once, or passed around a ring (arXiv 2303.15343, section
3.3). Images are not sent.

A rank's value is the mean over its own pairs, so the mean over ranks is the loss of the global batch. A gradient is
that of the sum of all ranks' values, as with a gather with gradients. Averaged over ranks, the gradients of all
parameters (scale and bias too) are exact. Losses are computed in float32 (float64 stays) regardless of autocast,
because logits reach 100, where bfloat16 has steps of 0.5.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Gather = Callable[[Tensor], Tensor]
"""float [B, D] of this rank -> float [W * B, D] of all ranks in order, with gradients."""

Visit = Callable[[Tensor, Tensor, int | None], None]
"""Called with columns [n, C], their carried values [n, ...], changed in place, and the start of this rank's columns."""

TILE = 1024


class Exchange(Protocol):
    """How the columns of all ranks meet the rows of this rank; no gradients pass through it."""

    world: int
    """Number of ranks; each has the same number of columns."""

    def visit(self, columns: Tensor, carried: Tensor, work: Visit, combine: Literal["sum", "logsumexp"]) -> Tensor:
        """Call ``work`` with the columns of all ranks, in one or more parts; all ranks must call.

        ``columns`` [b, C] are this rank's, ``carried`` [b, ...] the neutral element of ``combine`` for each. Returns
        the combined results of all ranks' ``work`` for this rank's columns. The last argument of ``work`` is the start
        of this rank's own columns in the part, or ``None`` if the part does not contain them.
        """


class Alone:
    """The exchange of a single process."""

    world = 1

    def visit(self, columns: Tensor, carried: Tensor, work: Visit, combine: Literal["sum", "logsumexp"]) -> Tensor:
        """Visit the columns of the one process."""
        work(columns, carried, 0)
        return carried


ALONE = Alone()


def alone(features: Tensor) -> Tensor:
    """The gather of a single process."""
    return features


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, gather: Gather = alone
) -> Tensor:
    """The softmax loss in one piece, for small batches: local rows against the columns of all ranks; a scalar.

    ``image_features`` and ``text_features`` are L2-normalised float [B, D] of matching pairs, or the texts [B, K, D] of
    K texts of each image. ``logit_scale`` is the positive factor itself. Memory grows with the square of the batch.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        texts = text_features.reshape(len(image_features), -1, image_features.shape[1])
        everything = gather(torch.cat([image_features[:, None], texts], dim=1))  # one collective instead of two
        all_images, all_texts = everything[:, 0], everything[:, 1:].flatten(0, 1)
        per_image = (logit_scale * image_features @ all_texts.T).logsumexp(dim=1)
        per_text = (logit_scale * texts @ all_images.T).logsumexp(dim=2).mean(dim=1)
        matching = logit_scale * (image_features * texts.mean(dim=1)).sum(dim=1)
        return ((per_image + per_text) / 2 - matching).mean()


def tiled_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    exchange: Exchange = ALONE,
    tile: int = TILE,
    compiled: bool = False,
) -> Tensor:
    """The softmax loss in tiles of ``tile`` x ``tile`` logits; arguments and result as :func:`contrastive_loss`.

    ``compiled`` fuses the operations after a tile's matrix product (``torch.compile``), each of which else reads and
    writes the whole tile.
    """
    tensors = at_least_float32(image_features, text_features.flatten(0, -2), logit_scale)
    return cast(Tensor, _Softmax.apply(*tensors, exchange, tile, compiled))


def tiled_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    exchange: Exchange = ALONE,
    tile: int = TILE,
    compiled: bool = False,
) -> Tensor:
    """The sigmoid loss in tiles; ``logit_bias`` is added to the scaled products, other arguments as for the softmax."""
    tensors = at_least_float32(image_features, text_features, logit_scale, logit_bias)
    return cast(Tensor, _Sigmoid.apply(*tensors, exchange, tile, compiled))


def tiled_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    exchange: Exchange = ALONE,
    tile: int = TILE,
) -> Tensor:
    """The divergence from a teacher's similarities in tiles; 0 for equal similarities.

    ``teacher_images`` and ``teacher_texts`` are the teacher's float [B, D'] for the same pairs, of any width. Their
    products are its logits: both L2-normalised, and one multiplied by its scale. They get no gradient. Other
    arguments as for :func:`contrastive_loss`.
    """
    tensors = at_least_float32(image_features, text_features, logit_scale, teacher_images, teacher_texts)
    return cast(Tensor, _Distillation.apply(*tensors, exchange, tile))


class _Softmax(torch.autograd.Function):
    """Columns are texts, image after image, with equally many of each."""

    @staticmethod
    def forward(
        context: Any, images: Tensor, texts: Tensor, scale: Tensor, exchange: Exchange, tile: int, compiled: bool
    ) -> Tensor:
        factor, each = scale.reshape(()), len(texts) // len(images)
        over_texts = images.new_full((len(images),), -torch.inf)
        add_sums = _fused(_added_sums, compiled)

        def add(columns: Tensor, over_images: Tensor, own: int | None) -> None:
            for rows, part, logits, _ in tiles(images, columns, factor, own, tile, each):
                over_texts[rows], over_images[part] = add_sums(logits, over_texts[rows], over_images[part])

        with torch.autocast(images.device.type, enabled=False):
            over_images = exchange.visit(texts, texts.new_full((len(texts),), -torch.inf), add, "logsumexp")
            matching = factor * (images * texts.unflatten(0, (-1, each)).mean(dim=1)).sum(dim=1)
        context.save_for_backward(images, texts, scale, over_texts, over_images)
        context.exchange, context.tile, context.compiled = exchange, tile, compiled
        loss: Tensor = ((over_texts + over_images.view(-1, each).mean(dim=1)) / 2 - matching).mean()
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, over_texts, over_images = context.saved_tensors
        factor, each = scale.reshape(()), len(texts) // len(images)
        share, to_images = slope / len(images), torch.zeros_like(images)
        slopes_of = _fused(_softmax_slopes, context.compiled)

        def add(columns: Tensor, to_texts: Tensor, own: int | None) -> None:
            features, sums, weights = columns[:, :-2], columns[:, -2], columns[:, -1]
            for rows, part, logits, diagonal in tiles(images, features, factor, own, context.tile, each):
                slopes = slopes_of(logits, over_texts[rows], sums[part], share / 2, weights[part])
                slopes.view(len(slopes), -1, each).diagonal(diagonal).sub_(share / each)
                add_products(slopes, to_images[rows], features[part], to_texts[part], images[rows], factor)

        # A column is weighted by its own rank, so that ranks may weight their losses differently.
        weights = (share / (2 * each)).expand(len(texts), 1)
        columns = torch.cat([texts, over_images[:, None], weights], dim=1)
        with torch.autocast(images.device.type, enabled=False):
            to_texts = context.exchange.visit(columns, torch.zeros_like(texts), add, "sum")
        to_scale = (to_images * images).sum().reshape(scale.shape)
        return to_images.mul_(factor), to_texts, to_scale, None, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        exchange: Exchange,
        tile: int,
        compiled: bool,
    ) -> Tensor:
        factor, shift = scale.reshape(()), bias.reshape(())
        per_image = images.new_zeros(len(images))
        sum_of = _fused(_sum_of_softplus, compiled)

        def add(columns: Tensor, _: Tensor, own: int | None) -> None:
            for rows, _part, logits, diagonal in tiles(images, columns, factor, own, tile):
                logits.add_(shift).diagonal(diagonal).neg_()
                per_image[rows] += sum_of(logits)

        with torch.autocast(images.device.type, enabled=False):
            exchange.visit(texts, texts.new_empty(len(texts), 0), add, "sum")
        context.save_for_backward(images, texts, scale, bias)
        context.exchange, context.tile, context.compiled = exchange, tile, compiled
        return per_image.mean()

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias = context.saved_tensors
        factor, shift, share = scale.reshape(()), bias.reshape(()), slope / len(images)
        to_images, to_bias = torch.zeros_like(images), torch.zeros_like(share)
        slopes_of = _fused(_sigmoid_slopes, context.compiled)

        def add(columns: Tensor, to_texts: Tensor, own: int | None) -> None:
            for rows, part, logits, diagonal in tiles(images, columns, factor, own, context.tile):
                logits.add_(shift).diagonal(diagonal).neg_()
                slopes = slopes_of(logits, share)
                slopes.diagonal(diagonal).neg_()
                to_bias.add_(slopes.sum())
                add_products(slopes, to_images[rows], columns[part], to_texts[part], images[rows], factor)

        with torch.autocast(images.device.type, enabled=False):
            to_texts = context.exchange.visit(texts, torch.zeros_like(images), add, "sum")
        to_scale = (to_images * images).sum().reshape(scale.shape)
        return to_images.mul_(factor), to_texts, to_scale, to_bias.reshape(bias.shape), None, None, None


class _Distillation(torch.autograd.Function):
    """Columns 0 and 1 of the sums belong to the student and to the teacher."""

    @staticmethod
    def forward(
        context: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        teacher_images: Tensor,
        teacher_texts: Tensor,
        exchange: Exchange,
        tile: int,
    ) -> Tensor:
        factor = scale.reshape(())
        over_texts = images.new_full((len(images), 2), -torch.inf)
        per_image = images.new_zeros(len(images))

        def add(columns: Tensor, over_images: Tensor, own: int | None) -> None:
            for rows, part, *both in _two_tiles(images, teacher_images, columns, factor, tile):
                for of, logits in enumerate(both):
                    over_texts[rows, of] = torch.logaddexp(over_texts[rows, of], logits.logsumexp(dim=1))
                    over_images[part, of] = torch.logaddexp(over_images[part, of], logits.logsumexp(dim=0))

        def weigh(columns: Tensor, per_text: Tensor, own: int | None) -> None:
            sums = columns[:, -1]
            for rows, part, logits, targets in _two_tiles(images, teacher_images, columns, factor, tile):
                apart = targets - logits
                per_image[rows] += (targets - over_texts[rows, 1, None]).exp_().mul_(apart).sum(dim=1)
                per_text[part] += (targets - sums[part]).exp_().mul_(apart).sum(dim=0)

        with torch.autocast(images.device.type, enabled=False):
            columns = torch.cat([texts, teacher_texts], dim=1)
            over_images = exchange.visit(columns, torch.full_like(over_texts, -torch.inf), add, "logsumexp")
            columns = torch.cat([columns, over_images[:, 1:]], dim=1)
            per_text = exchange.visit(columns, torch.zeros_like(per_image), weigh, "sum")
        context.save_for_backward(images, texts, scale, teacher_images, teacher_texts, over_texts, over_images)
        context.exchange, context.tile = exchange, tile
        sums = over_texts + over_images
        return ((per_image + per_text + sums[:, 0] - sums[:, 1]) / 2).mean()

    @staticmethod
    @once_differentiable
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, teacher_images, teacher_texts, over_texts, over_images = context.saved_tensors
        factor, share = scale.reshape(()), slope / len(images)
        to_images, width = torch.zeros_like(images), images.shape[1]

        def add(columns: Tensor, to_texts: Tensor, own: int | None) -> None:
            sums, weights = columns[:, -3:-1], columns[:, -1]
            for rows, part, logits, targets in _two_tiles(images, teacher_images, columns, factor, context.tile):
                by_columns = (logits - sums[part, 0]).exp_() - (targets - sums[part, 1]).exp_()
                by_rows = logits.sub_(over_texts[rows, 0, None]).exp_()
                by_rows.sub_(targets.sub_(over_texts[rows, 1, None]).exp_())
                slopes = by_rows.mul_(share / 2).add_(by_columns.mul_(weights[part]))
                add_products(slopes, to_images[rows], columns[part, :width], to_texts[part], images[rows], factor)

        weights = (share / 2).expand(len(texts), 1)
        columns = torch.cat([texts, teacher_texts, over_images, weights], dim=1)
        with torch.autocast(images.device.type, enabled=False):
            to_texts = context.exchange.visit(columns, torch.zeros_like(images), add, "sum")
        to_scale = (to_images * images).sum().reshape(scale.shape)
        return to_images.mul_(factor), to_texts, to_scale, None, None, None, None


def _added_sums(logits: Tensor, over_texts: Tensor, over_images: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the sums over a tile's rows and columns, added to those of earlier tiles."""
    rows, columns = logits.logsumexp(dim=1), logits.logsumexp(dim=0)
    return torch.logaddexp(over_texts, rows), torch.logaddexp(over_images, columns)


def _softmax_slopes(logits: Tensor, over_texts: Tensor, sums: Tensor, half: Tensor, weights: Tensor) -> Tensor:
    """The derivative by a tile's logits, but for the matching pairs; changes ``logits``."""
    by_columns = (logits - sums).exp_().mul_(weights)
    return logits.sub_(over_texts[:, None]).exp_().mul_(half).add_(by_columns)


def _sum_of_softplus(logits: Tensor) -> Tensor:
    return functional.softplus(logits).sum(dim=1)


def _sigmoid_slopes(logits: Tensor, share: Tensor) -> Tensor:
    return logits.sigmoid_().mul_(share)


def _fused(work: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """``work``, or its compiled form, which all losses of this process share."""
    return _compiled(work) if compiled else work


@cache
def _compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(work)


def _two_tiles(
    images: Tensor, teacher_images: Tensor, columns: Tensor, factor: Tensor, tile: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, columns, logits and the teacher's logits of every tile; ``columns`` are both texts side by side."""
    width, end = images.shape[1], images.shape[1] + teacher_images.shape[1]
    of_student = tiles(images, columns[:, :width], factor, None, tile)
    of_teacher = tiles(teacher_images, columns[:, width:end], torch.ones_like(factor), None, tile)
    for (rows, part, logits, _), (_, _, targets, _) in zip(of_student, of_teacher, strict=True):
        yield rows, part, logits, targets


def tiles(
    images: Tensor, columns: Tensor, factor: Tensor, own: int | None, tile: int, each: int = 1
) -> Iterator[tuple[slice, slice, Tensor, int]]:
    """Rows, columns and logits of every tile, and the diagonal of its matching pairs (may be outside the tile).

    ``each`` consecutive columns match one row, and a tile has all of them; the diagonal counts them as one column.
    """
    wide = max(tile // each, 1) * each
    for row in range(0, len(images), tile):
        rows = slice(row, row + tile)
        scaled = images[rows] * factor
        for column in range(0, len(columns), wide):
            part = slice(column, column + wide)
            diagonal = len(columns) if own is None else row + (own - column) // each
            yield rows, part, scaled @ columns[part].T, diagonal


def add_products(
    slopes: Tensor, to_images: Tensor, texts: Tensor, to_texts: Tensor, images: Tensor, factor: Tensor
) -> None:
    """Add a tile's part of both gradients; that of the images is not yet multiplied by the factor."""
    to_images.addmm_(slopes, texts)
    to_texts.addmm_(slopes.T, images * factor)


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the first one's precision, at least float32."""
    kind = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(kind) for tensor in tensors)
