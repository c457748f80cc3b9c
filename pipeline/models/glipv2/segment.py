"""Masks of what phrases name: a mask head whose last product is with the phrase, as boxes are aligned with it.

A box is cut out of the fused pyramid (RoIAlign, 14 x 14, arXiv 1703.06870) and goes through convolutions and a
transposed one, to features h_xy of 28 x 28 cells. With unit features w_m of the fused tokens, the logit of a cell is
the mean over the phrase's tokens of h_xy . P w_m + b . w_m + b_0, which is the product with the mean of the tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import MultiScaleRoIAlign

from pipeline.models.glip.config import LEVELS
from pipeline.models.glipv2.reader import MASK_CELLS, UNKNOWN


class PhraseMaskHead(nn.Module):
    """Boxes of a pyramid and their phrases to masks."""

    def __init__(self, width: int, text_width: int, convolutions: Sequence[int], groups: int) -> None:
        super().__init__()
        levels = [str(level) for level in range(LEVELS)]
        self.crop = MultiScaleRoIAlign(levels, output_size=MASK_CELLS // 2, sampling_ratio=2)
        self.layers = MaskRCNNHeads(width, list(convolutions), dilation=1, norm_layer=partial(nn.GroupNorm, groups))
        self.enlarge = nn.ConvTranspose2d(convolutions[-1], convolutions[-1], 2, stride=2)
        nn.init.kaiming_normal_(self.enlarge.weight, mode="fan_out", nonlinearity="relu")
        self.project = nn.Linear(text_width, convolutions[-1])
        self.token_bias = nn.Parameter(torch.zeros(text_width))
        self.prior_bias = nn.Parameter(torch.tensor(0.0))

    def forward(
        self, levels: Sequence[Tensor], boxes: list[Tensor], phrases: list[Tensor], size: tuple[int, int]
    ) -> Tensor:
        """Logits float32 [N, 28, 28] of all boxes of a batch, image by image.

        Args:
            levels: the fused pyramid, [B, C, H_l, W_l].
            boxes: x1, y1, x2, y2 in pixels of each image, [n, 4].
            phrases: the :func:`phrase_features` of the boxes of each image, [n, D].
            size: height and width of the images.
        """
        crops = self.crop({str(n): level.float() for n, level in enumerate(levels)}, boxes, [size] * len(boxes))
        cells = functional.relu(self.enlarge(self.layers(crops))).float()
        words = torch.cat(phrases).float()
        with torch.autocast(cells.device.type, enabled=False):
            products = torch.einsum("nchw,nc->nhw", cells, self.project(words))
            bias: Tensor = words @ self.token_bias + self.prior_bias
            return products + bias[:, None, None]


def phrase_features(hidden: Tensor, averaging: Tensor) -> Tensor:
    """The mean unit features of phrases, float32 [B, P, D], of tokens [B, M, D] and their ``averaging`` [B, P, M]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return averaging @ functional.normalize(hidden.float(), dim=-1)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The binary cross-entropy of [N, 28, 28] with ``masks`` uint8, averaged over cells, summed over known masks."""
    known = (masks != UNKNOWN).float()
    each = functional.binary_cross_entropy_with_logits(logits, masks.float().clamp(max=1), reduction="none")
    return (each * known).sum() / MASK_CELLS**2


def has_mask(batch: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """Bool [B, G]: the ``real`` boxes with an annotated mask."""
    return real & (batch["masks"][..., 0, 0] != UNKNOWN)
