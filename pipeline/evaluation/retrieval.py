"""Image-text retrieval: R@1, R@5, R@10 and the median rank, in both directions.

The protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306) that CLIP (arXiv 2103.00020, table 13) reports on Flickr30k
and COCO. An image is a query over all captions, and is a hit if any of its own captions is among the first K; a caption
is a query over all images.

A caption that several images share is one gallery entry and one query, and each of those images is a correct answer: no
model can distinguish equal captions. Sets without equal captions are not affected.

Similarities are computed in tiles; the N x N matrix of a large set (10 GB for 50,000 images) is never stored.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.evaluation.encoder import Encoder, encode_tokens, inference

SCORES_AT_ONCE = 1 << 24
DEPTHS = (1, 5, 10)


def retrieval(model: Encoder, batches: Iterable[Mapping[str, Tensor]], precision: str = "fp32") -> dict[str, float]:
    """Retrieve captions by images and images by captions over all of ``batches``.

    Args:
        model: encodes both.
        batches: mappings with ``image``, uint8 ``[B, 3, H, W]``, and ``text``, int64 ``[T, L]``. If images do not
            have exactly one caption each, ``owner``, int64 ``[T]``, is the image of the batch that a caption
            describes.
        precision: "fp32" or "bf16".

    Returns:
        ``i2t_r1 ... t2i_r10`` in 0 ... 1, ``i2t_median_rank`` and ``t2i_median_rank`` (1 is best), ``chance`` (R@1
        of random guessing, mean of both directions) and ``samples`` (images).
    """
    with inference(model, precision) as device:
        images, tokens, owners = _gather(model, batches, device)
        unique, caption = torch.unique(tokens, dim=0, return_inverse=True)
        texts = encode_tokens(model, unique, device)
        with torch.autocast(device.type, enabled=False):
            return retrieval_metrics(images, texts, torch.stack([owners, caption], dim=1))


def retrieval_metrics(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """The metrics of :func:`retrieval` from features.

    ``images`` ``[N, D]`` and ``texts`` ``[M, D]`` are compared by dot product; ``pairs``, int64 ``[P, 2]``, lists the
    matching images and texts, many to many.
    """
    pairs = torch.unique(pairs, dim=0)
    metrics: dict[str, float] = {}
    for name, ranks in (
        ("i2t", match_ranks(images, texts, pairs)),
        ("t2i", match_ranks(texts, images, pairs.flip(1))),
    ):
        for depth in DEPTHS:
            metrics[f"{name}_r{depth}"] = float((ranks <= depth).double().mean())
        metrics[f"{name}_median_rank"] = float(np.median(ranks.numpy()))
    metrics["chance"] = len(pairs) / (len(images) * len(texts))
    metrics["samples"] = float(len(images))
    return metrics


def match_ranks(queries: Tensor, gallery: Tensor, pairs: Tensor, scores_at_once: int = SCORES_AT_ONCE) -> Tensor:
    """Rank of each query's best match, from 1: ``[Q, D]``, ``[G, D]``, int64 ``[P, 2]`` -> int64 ``[Q]`` on the CPU.

    A wrong entry with the same score as the best match ranks before it (pessimistic ties), so a model that gives every
    pair the same score gets no hit. NaN ranks last; a query without a match ranks ``G + 1``. Memory is
    ``scores_at_once`` similarities, and at least one row.
    """
    pairs = pairs[pairs[:, 0].argsort()].to(queries.device)
    tile = max(1, scores_at_once // max(1, len(gallery)))
    ranks = []
    for start in range(0, len(queries), tile):
        rows = queries[start : start + tile]
        first, last = torch.searchsorted(
            pairs[:, 0].contiguous(), torch.tensor([start, start + len(rows)], device=pairs.device)
        )
        inside = pairs[first:last]
        ranks.append(_tile_ranks(rows @ gallery.T, inside[:, 0] - start, inside[:, 1]).cpu())
    return torch.cat(ranks)


def _tile_ranks(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    match = torch.zeros_like(scores, dtype=torch.bool)
    match[rows, columns] = True
    best = scores.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ~(scores < best) & ~match
    return 1 + ahead.sum(dim=1)


def _gather(
    model: Encoder, batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Image features ``[N, D]``, all captions' tokens ``[T, L]`` and each caption's image ``[T]``."""
    images: list[Tensor] = []
    tokens: list[Tensor] = []
    owners: list[Tensor] = []
    count = 0
    for batch in batches:
        images.append(model.encode_image(batch["image"].to(device)).float())
        tokens.append(batch["text"].cpu())
        own = batch["owner"] if "owner" in batch else torch.arange(len(batch["text"]))
        owners.append(own.cpu() + count)
        count += len(batch["image"])
    require(count > 0, "batches", count, "one image or more")
    longest = max(text.shape[1] for text in tokens)
    padded = [functional.pad(text, (0, longest - text.shape[1])) for text in tokens]
    return functional.normalize(torch.cat(images), dim=-1), torch.cat(padded), torch.cat(owners)
