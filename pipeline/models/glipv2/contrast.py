"""The loss between images: anchors are compared with the tokens of all texts of the global batch.

With unit vectors f_i of the anchors that are trained on a box, and g_j of tokens, both before any fusion, logits
s_ij = f_i . g_j / exp(s), and F_ij = 1 where token j names what anchor i is trained on,

    L = 1/2c [ sum_i sum_j F_ij / |F_i.| (lse_j' s_ij' - s_ij) + sum_j sum_i F_ij / |F_.j| (lse_i' s_i'j - s_ij) ]

In the anchor's own image F is its box's tokens. In other images, a token of a class name matches the boxes of the same
class (label propagation), whatever data set they are from; what captions name has no class and matches nothing else.

Each rank computes only the rows of its own anchors and of its own tokens: with A anchors and T tokens in each of B
images on W ranks, two matrices of B A x W B T and B T x W B A instead of W B A x W B T. Features of other ranks have
gradients, so that the mean over ranks is the gradient of one process with the whole batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.glipv2.reader import NO_CLASS, PADDING
from pipeline.models.losses import Gather

FLOOR = -1e4  # logit of padding, whose exponential is 0 in float32


class InterImageHead(nn.Module):
    """Projections of anchors and tokens into one space, and the logarithm of the temperature."""

    def __init__(self, width: int, text_width: int, common: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, common), nn.Linear(text_width, common)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, anchors: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, A, C] and [B, T, D] to unit vectors, float32 [B, A, E] and [B, T, E]."""
        image, text = self.image(anchors.float()), self.text(tokens.float())
        return functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)


@dataclass(frozen=True)
class RegionWords:
    """Anchors and tokens of this rank's images.

    - ``anchors`` float [B, A, E] and ``tokens`` float [B, T, E], unit vectors; A and T are equal on all ranks
    - ``anchor_labels`` int64 [B, A] and ``token_labels`` int64 [B, T]: classes, ``NO_CLASS`` or ``PADDING``
    - ``positive`` bool [B, A, T]: which tokens of its own image name an anchor's object
    - ``images`` int64 [B]: a number that identifies each image in the global batch
    """

    anchors: Tensor
    tokens: Tensor
    anchor_labels: Tensor
    token_labels: Tensor
    positive: Tensor
    images: Tensor


def choose_anchors(positive: Tensor, draws: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` random ones of the ``positive`` anchors, bool [B, N]: their places int64 [B, A], and which of
    these exist, bool [B, A]. The choice is a function of ``draws`` int64 [B]."""
    order = torch.where(positive, _random_keys(draws, positive.shape[1]), -1.0)
    best = order.topk(min(most, order.shape[1]), dim=1)
    return best.indices, best.values >= 0


def inter_image_loss(some: RegionWords, log_scale: Tensor, gather: Gather) -> Tensor:
    """The sum over this rank's anchors and tokens of the loss above, without the division by c; float32."""
    count = some.anchors.shape[1]
    features = gather(torch.cat([some.anchors, some.tokens], dim=1))
    numbers = gather(torch.cat([some.images[:, None], some.anchor_labels, some.token_labels], dim=1))
    anchors, tokens = features[:, :count], features[:, count:]
    images, anchor_labels, token_labels = numbers[:, 0], numbers[:, 1 : 1 + count], numbers[:, 1 + count :]
    same = some.images[:, None] == images
    rows = torch.einsum("bae,cte->bact", some.anchors, tokens) / log_scale.exp()
    named = _matches(some.anchor_labels, token_labels, some.positive, same)
    columns = torch.einsum("bte,cae->btca", some.tokens, anchors) / log_scale.exp()
    shown = _matches(some.token_labels, anchor_labels, some.positive.transpose(1, 2), same)
    by_anchor = soft_cross_entropy(rows, named, token_labels != PADDING) * (some.anchor_labels != PADDING)
    by_token = soft_cross_entropy(columns, shown, anchor_labels != PADDING) * (some.token_labels != PADDING)
    return (by_anchor.sum() + by_token.sum()) / 2


def soft_cross_entropy(logits: Tensor, positive: Tensor, real: Tensor) -> Tensor:
    """The cross-entropy of ``logits`` [B, n, C, m] over their last two dimensions, [B, n].

    The target is shared equally among the ``positive``, a subset of the ``real`` [C, m]; 0 without any.
    """
    flat = logits.masked_fill(~real, FLOOR).flatten(2)
    count = positive.flatten(2).sum(dim=2)
    matching = (flat * positive.flatten(2)).sum(dim=2) / count.clamp(min=1)
    return torch.where(count > 0, flat.logsumexp(dim=2) - matching, 0.0)


def _matches(mine: Tensor, all_of_them: Tensor, own: Tensor, same: Tensor) -> Tensor:
    """Bool [B, n, C, m] for labels [B, n] and [C, m]: ``own`` [B, n, m] in the ``same`` image, else equal classes."""
    equal = (mine[:, :, None, None] == all_of_them) & (mine > NO_CLASS)[:, :, None, None]
    return torch.where(same[:, None, :, None], own[:, :, None], equal) & (all_of_them != PADDING)


def _random_keys(draws: Tensor, count: int) -> Tensor:
    """Pseudorandom numbers, float64 [B, count] of 0 to 1, on the device of ``draws`` and without its generator."""
    mixed = draws[:, None] + torch.arange(1, count + 1, device=draws.device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return ((mixed ^ (mixed >> 31)) & (2**53 - 1)).double() / 2**53
