"""From logits of tokens to boxes of phrases, for a whole batch at once: section 3.1 of GLIP and its released code.

A phrase's probability at an anchor is the mean over its tokens, p = mean sigmoid(logit); its score is
sqrt(p * sigmoid(centerness)). Every image has its own text: the means are one batched product with a matrix
[B, phrases, tokens], whose rows sum to 1, or to 0 for a phrase without tokens, which is never found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms

from pipeline.models.glip.assignment import Anchors
from pipeline.models.glip.config import Config
from pipeline.models.glip.network import AnchorFeatures, TokenWeights, align

MOVES = (10.0, 10.0, 5.0, 5.0)  # factors of a box's offsets, which make them similar in size
CODER = BoxCoder(MOVES)
SMALLEST = 1e-2  # pixels: boxes with shorter sides are left out


@dataclass(frozen=True)
class Candidates:
    """The best anchors of each image, before non-maximum suppression: ``boxes`` [B, K, 4], ``scores`` [B, K], 0 where
    there is none, and the number of each one's phrase, ``phrases`` [B, K]."""

    boxes: Tensor
    scores: Tensor
    phrases: Tensor


@dataclass(frozen=True)
class FoundPhrases:
    """Of one image, on the CPU: ``boxes`` [n, 4], ``scores`` [n], the numbers of their ``phrases`` [n], and ``masks``
    [n, m, m] of methods that have them."""

    boxes: Tensor
    scores: Tensor
    phrases: Tensor
    masks: Tensor | None = None


def find_candidates(
    anchors: Anchors, found: AnchorFeatures, weights: TokenWeights, averaging: Tensor, config: Config
) -> Candidates:
    """The anchors of each level with the highest scores, at most ``config.level_detections`` a level."""
    probability = align(found.features, weights).sigmoid() @ averaging.transpose(1, 2)
    scores = (probability * found.centerness.sigmoid()[..., None]).sqrt()
    scores = torch.where(probability > config.least_score, scores, 0.0)
    kept, places, first = [], [], 0
    phrases = averaging.shape[1]
    for level in scores.split(anchors.counts, dim=1):
        flat = level.flatten(1)
        best = flat.topk(min(config.level_detections, flat.shape[1]))
        kept.append(best.values)
        places.append(best.indices + first * phrases)
        first += level.shape[1]
    place = torch.cat(places, dim=1)
    rows = place // phrases
    moves = found.moves.gather(1, rows[..., None].expand(-1, -1, 4))
    boxes = CODER.decode_single(moves.flatten(0, 1), anchors.boxes[rows].flatten(0, 1)).view_as(moves)
    return Candidates(boxes, torch.cat(kept, dim=1), place % phrases)


def suppress(candidates: Candidates, extents: Sequence[tuple[int, int]], config: Config) -> list[FoundPhrases]:
    """What is found in each image, best first; boxes are clipped to the ``extents``.

    One call removes overlapping boxes of the same phrase in all images.
    """
    limits = candidates.boxes.new_tensor([[width, height] * 2 for height, width in extents])
    boxes = torch.minimum(candidates.boxes.clamp(min=0), limits[:, None])
    large = (boxes[..., 2:] - boxes[..., :2] > SMALLEST).all(dim=-1)
    image, place = torch.where((candidates.scores > 0) & large)
    boxes, scores = boxes[image, place], candidates.scores[image, place]
    phrases = candidates.phrases[image, place]
    groups = image * (int(phrases.max()) + 1 if len(phrases) else 1) + phrases
    kept = batched_nms(boxes, scores, groups, config.detection_overlap)
    boxes, scores, phrases, image = (values[kept].cpu() for values in (boxes, scores, phrases, image))
    parts = [torch.where(image == number)[0][: config.detections] for number in range(len(extents))]
    return [FoundPhrases(boxes[part], scores[part], phrases[part]) for part in parts]


def together(parts: Sequence[Candidates], offsets: Sequence[int]) -> Candidates:
    """The candidates of several prompts, whose phrases are numbered from ``offsets``."""
    numbered = [part.phrases + offset for part, offset in zip(parts, offsets, strict=True)]
    return Candidates(
        torch.cat([part.boxes for part in parts], dim=1),
        torch.cat([part.scores for part in parts], dim=1),
        torch.cat(numbered, dim=1),
    )
