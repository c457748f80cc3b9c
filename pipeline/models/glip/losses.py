"""GLIP's three losses over all anchors of a batch; sums, which the method divides by numbers of the global batch.

Every loss is computed for all anchors, and weighted by 0 where an anchor takes no part: shapes do not depend on the
contents of a batch, so nothing waits for the GPU. What is weighted by 0 is finite, so its gradient is 0 and not NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from pipeline.models.glip.assignment import shared_and_union

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
EPSILON = 1e-7


def alignment_loss(logits: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
    """The focal loss (arXiv 1708.02002) of ``logits`` [B, N, M] and binary ``targets``, summed over real ``tokens``.

    ``targets`` are 1 for all tokens of the phrase of an anchor's box, not divided by their number. ``tokens`` is bool
    [B, M]; start, end and punctuation are tokens without a box.
    """
    each: Tensor = sigmoid_focal_loss(logits, targets.to(logits.dtype), ALPHA, GAMMA)
    return (each * tokens[:, None]).sum()


def box_loss(boxes: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """1 - generalised IoU of ``boxes`` [..., 4] and ``truth``, all with area, weighted by ``weights`` [...]."""
    return ((1 - generalized_overlaps(boxes, truth)) * weights).sum()


def centerness_loss(logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """The binary cross-entropy of ``logits`` [...] with ``targets`` of 0 to 1, summed over the ``positive``."""
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (each * positive).sum()


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How near ``points`` [..., 2] are to the centre of ``boxes`` [..., 4]: 1 there, 0 at the edges and outside.

    sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)), from FCOS (arXiv 1904.01355).
    """
    low, high = points - boxes[..., :2], boxes[..., 2:] - points
    near, far = torch.minimum(low, high), torch.maximum(low, high)
    return (near.clamp(min=0) / far.clamp(min=1e-6)).prod(dim=-1).sqrt()


def generalized_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """The generalised IoU (arXiv 1902.09630) of boxes [..., 4], element by element, -1 to 1.

    torchvision's loss picks the boxes that meet, so its shapes depend on them.
    """
    shared, union = shared_and_union(first, second)
    low, high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    around = (high - low).prod(dim=-1)
    return shared / (union + EPSILON) - (around - union) / (around + EPSILON)
