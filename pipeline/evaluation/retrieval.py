"""Retrieval between media: R@1, R@5, R@10 and the median rank, in both directions of every pair of media.

The protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306) that CLIP (arXiv 2103.00020, table 13) reports on Flickr30k
and COCO, and CLAP (arXiv 2211.06687) on AudioCaps and Clotho. An image is a query over all captions, and is a hit if
any of its own captions is among the first K; a caption is a query over all images. A pair of media uses the samples
that have both.

A caption that several samples share is one gallery entry and one query, and each of those samples is a correct answer:
no model can distinguish equal captions. Sets without equal captions are not affected.

Similarities are computed in tiles; the N x N matrix of a large set (10 GB for 50,000 images) is never stored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.media import TEXT, encode_inputs

SCORES_AT_ONCE = 1 << 24
DEPTHS = (1, 5, 10)


def retrieval(
    model: Any, batches: Iterable[Mapping[str, Any]], precision: str = "fp32", media: Sequence[str] = ("image", TEXT)
) -> dict[str, float]:
    """Retrieve each of ``media`` by each other one over all of ``batches``.

    Args:
        model: encodes the media, see :mod:`pipeline.evaluation.media`.
        batches: mappings with the inputs of a medium M, such as ``image``, uint8 ``[B, 3, H, W]``, or ``text``, int64
            ``[T, L]``, and ``M_rows``, int64, the number of the sample of each input in the batch; without it, one
            input per sample. ``samples`` is the size of the batch; without it, that of its first medium.
        precision: "fp32" or "bf16".
        media: two or more, with texts last, since only texts may be several per sample.

    Returns:
        ``i2t_r1 ... t2i_r10`` in 0 ... 1, ``i2t_median_rank`` and ``t2i_median_rank`` (1 is best) for images and
        texts, and those with the first letters of the other media (``a2t_r1``) for every pair of media that a sample
        has; ``chance`` (R@1 of random guessing, mean of all directions) and ``samples``.
    """
    with inference(model, precision) as device:
        inputs, samples = _gather(model, batches, media, device)
        metrics: dict[str, float] = {}
        chances = []
        for first, second in combinations(media, 2):
            pairs = _joined(inputs[first].owners, inputs[second].owners, samples)
            if len(pairs):
                names = first[0], second[0]
                with torch.autocast(device.type, enabled=False):
                    found = retrieval_metrics(inputs[first].features, inputs[second].features, pairs, names)
                chances.append(found.pop("chance"))
                metrics |= found
    require(bool(chances), "media", tuple(media), "two that a sample has")
    return {**metrics, "chance": float(np.mean(chances)), "samples": float(samples)}


def retrieval_metrics(
    first: Tensor, second: Tensor, pairs: Tensor, names: tuple[str, str] = ("i", "t")
) -> dict[str, float]:
    """The metrics of :func:`retrieval` for two media with these letters, but ``samples``, from features.

    ``first`` ``[N, D]`` and ``second`` ``[M, D]`` are compared by dot product; ``pairs``, int64 ``[P, 2]``, lists the
    matching ones, many to many. Features without a match are left out.
    """
    pairs = torch.unique(pairs, dim=0)
    (used, rows), (other_used, columns) = (torch.unique(column, return_inverse=True) for column in pairs.T)
    first, second, pairs = first[used], second[other_used], torch.stack([rows, columns], dim=1)
    metrics: dict[str, float] = {}
    one, other = names
    for name, ranks in (
        (f"{one}2{other}", match_ranks(first, second, pairs)),
        (f"{other}2{one}", match_ranks(second, first, pairs.flip(1))),
    ):
        for depth in DEPTHS:
            metrics[f"{name}_r{depth}"] = float((ranks <= depth).double().mean())
        metrics[f"{name}_median_rank"] = float(np.median(ranks.numpy()))
    return {**metrics, "chance": len(pairs) / (len(first) * len(second))}


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


@dataclass
class _MediumFeatures:
    """Features of one medium, float [N, D], and their ``owners``, int64 [P, 2]: samples and features, many to many."""

    features: Tensor
    owners: Tensor


@dataclass
class _GatheredParts:
    inputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


def _gather(
    model: Any, batches: Iterable[Mapping[str, Any]], media: Sequence[str], device: torch.device
) -> tuple[dict[str, _MediumFeatures], int]:
    """The features of each medium, and the number of samples. Texts are encoded at the end, equal ones once."""
    parts = {medium: _GatheredParts() for medium in media}
    count = 0
    for batch in batches:
        present = [medium for medium in media if medium in batch]
        for medium in present:
            inputs = batch[medium]
            own = batch.get(f"{medium}_rows", torch.arange(len(inputs)))
            parts[medium].samples.append(own.cpu() + count)
            encoded = inputs.cpu() if medium == TEXT else encode_inputs(model, medium, inputs, device)
            parts[medium].inputs.append(encoded)
        count += batch.get("samples", len(batch[present[0]]))
    require(count > 0, "batches", count, "one sample or more")
    return {medium: _as_features(model, medium, one, device) for medium, one in parts.items()}, count


def _as_features(model: Any, medium: str, parts: _GatheredParts, device: torch.device) -> _MediumFeatures:
    if not parts.inputs:
        return _MediumFeatures(torch.empty(0, 0), torch.empty(0, 2, dtype=torch.int64))
    samples = torch.cat(parts.samples)
    if medium != TEXT:
        return _MediumFeatures(torch.cat(parts.inputs), torch.stack([samples, torch.arange(len(samples))], dim=1))
    longest = max(text.shape[1] for text in parts.inputs)
    padded = torch.cat([functional.pad(text, (0, longest - text.shape[1])) for text in parts.inputs])
    unique, number = torch.unique(padded, dim=0, return_inverse=True)
    return _MediumFeatures(encode_tokens(model, unique, device), torch.stack([samples, number], dim=1))


def _joined(first: Tensor, second: Tensor, samples: int) -> Tensor:
    """Pairs of features of the same samples, int64 [P, 2]; ``first`` owns one feature per sample at most."""
    own = torch.full((samples,), -1)
    own[first[:, 0]] = first[:, 1]
    found = own[second[:, 0]]
    return torch.stack([found, second[:, 1]], dim=1)[found >= 0]
