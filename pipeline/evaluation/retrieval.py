"""Retrieval between media: R@1, R@5, R@10, the median and the mean rank, in both directions of every pair of media.

The protocol of Karpathy & Fei-Fei 2015 (arXiv 1412.2306) that CLIP (arXiv 2103.00020, table 13) reports on Flickr30k
and COCO, and CLAP (arXiv 2211.06687) on AudioCaps and Clotho. An image is a query over all captions, and is a hit if
any of its own captions is among the first K; a caption is a query over all images. A pair of media uses the samples
that have both.

A caption that several samples share is one gallery entry and one query, and each of those samples is a correct answer:
no model can distinguish equal captions. Sets without equal captions are not affected.

A :class:`Ranking` may differ in two ways. With ``by_sample``, a query over texts ranks samples by the best of their
captions, the protocol of CLIP4Clip (arXiv 2104.08860) for videos with several captions. With ``dual_softmax``, scores
are the product of the softmaxes over the gallery and over all queries (Cheng et al., arXiv 2109.04290, multiply the
similarity by the latter). It looks at all queries, so its numbers do not compare with those of a single query.

Similarities are computed in tiles; the N x N matrix of a large set (10 GB for 50,000 images) is never stored.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.evaluation.encoder import TEXTS_AT_ONCE, encode_tokens, inference
from pipeline.evaluation.media import TEXT, encode_inputs, inputs_of, paired_media

SCORES_AT_ONCE = 1 << 22
DEPTHS = (1, 5, 10)
DEFAULT_SCALE = 100.0  # CLIP's at the end of its training
Scores = Callable[[Tensor, Tensor], Tensor]
"""Similarities float [Q, G] of queries [Q, ...] and of the whole gallery [G, ...]."""


def dot_products(queries: Tensor, gallery: Tensor) -> Tensor:
    """The similarities of features, float [Q, D] and [G, D]."""
    return queries @ gallery.T


@dataclass(frozen=True)
class Ranking:
    """How the gallery is ranked; see the module."""

    by_sample: bool = False
    dual_softmax: bool = False


def retrieval(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    precision: str = "fp32",
    media: Sequence[str] = ("image", TEXT),
    ranking: Ranking = Ranking(),
) -> dict[str, float]:
    """Retrieve each of ``media`` by each other one over all of ``batches``.

    Args:
        model: encodes the media, see :mod:`pipeline.evaluation.media`.
        batches: mappings with the inputs of a medium M, such as ``image``, uint8 ``[B, 3, H, W]``, or ``text``, int64
            ``[T, L]``, and ``M_rows``, int64, the number of the sample of each input in the batch; without it, one
            input per sample. ``samples`` is the size of the batch; without it, that of its first medium.
        precision: "fp32" or "bf16".
        media: two or more, with texts last, since only texts may be several per sample.
        ranking: how the gallery is ranked.

    Returns:
        ``i2t_r1 ... t2i_r10`` in 0 ... 1, ``i2t_median_rank``, ``i2t_mean_rank`` and so on (1 is best) for images and
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
                    features = inputs[first].features, inputs[second].features
                    scores, scale = _similarity(model)
                    found = retrieval_metrics(*features, pairs, names, ranking, scores, scale)
                chances.append(found.pop("chance"))
                metrics |= found
    require(bool(chances), "media", tuple(media), "two that a sample has")
    return {**metrics, "chance": float(np.mean(chances)), "samples": float(samples)}


def retrieval_metrics(
    first: Tensor,
    second: Tensor,
    pairs: Tensor,
    names: tuple[str, str] = ("i", "t"),
    ranking: Ranking = Ranking(),
    scores: Scores = dot_products,
    scale: float = 1.0,
) -> dict[str, float]:
    """The metrics of :func:`retrieval` for two media with these letters, but ``samples``, from features.

    ``first`` ``[N, ...]`` and ``second`` ``[M, ...]`` are compared by ``scores``, which takes them in this order;
    ``pairs``, int64 ``[P, 2]``, lists the matching ones, many to many. Features without a match are left out. ``scale``
    is the factor of the scores in the dual softmax.
    """
    pairs = torch.unique(pairs, dim=0)
    (used, rows), (other_used, columns) = (torch.unique(column, return_inverse=True) for column in pairs.T)
    first, second, pairs = first[used], second[other_used], torch.stack([rows, columns], dim=1)
    forward, backward = scores, lambda queries, gallery: scores(gallery, queries).T
    if ranking.dual_softmax:
        forward = dual_softmax(forward, first, second, scale)
        backward = dual_softmax(backward, second, first, scale)
    there = pairs
    if ranking.by_sample and names[1] == "t":
        there = torch.arange(len(first)).repeat(2, 1).T
        forward = best_of_samples(forward, pairs, len(first))
    metrics: dict[str, float] = {}
    one, other = names
    for name, ranks in (
        (f"{one}2{other}", match_ranks(first, second, there, scores=forward)),
        (f"{other}2{one}", match_ranks(second, first, pairs.flip(1), scores=backward)),
    ):
        for depth in DEPTHS:
            metrics[f"{name}_r{depth}"] = float((ranks <= depth).double().mean())
        metrics[f"{name}_median_rank"] = float(np.median(ranks.numpy()))
        metrics[f"{name}_mean_rank"] = float(ranks.double().mean())
    return {**metrics, "chance": len(pairs) / (len(first) * len(second))}


def best_of_samples(scores: Scores, pairs: Tensor, samples: int) -> Scores:
    """Scores of samples instead of their texts, the best of each: ``pairs``, int64 [P, 2], are samples and texts."""
    owners, texts = pairs.T

    def best(queries: Tensor, gallery: Tensor) -> Tensor:
        of_texts = scores(queries, gallery)[:, texts.to(gallery.device)]
        found = of_texts.new_full((len(queries), samples), -torch.inf)
        return found.scatter_reduce_(1, owners.to(gallery.device).expand_as(of_texts), of_texts, "amax")

    return best


def dual_softmax(
    scores: Scores, queries: Tensor, gallery: Tensor, scale: float, scores_at_once: int = SCORES_AT_ONCE
) -> Scores:
    """The logarithm of softmax over the gallery x softmax over ``queries``, of ``scale`` x ``scores``.

    Without the sum over the gallery, which is the same for all entries of a query.
    """
    sums = torch.full((len(gallery),), -torch.inf, device=gallery.device)
    for rows in queries.split(max(1, scores_at_once // max(1, len(gallery)))):
        sums = torch.logaddexp(sums, (scale * scores(rows, gallery)).logsumexp(dim=0))
    return lambda rows, entries: 2 * scale * scores(rows, entries) - sums


def match_ranks(
    queries: Tensor,
    gallery: Tensor,
    pairs: Tensor,
    scores_at_once: int = SCORES_AT_ONCE,
    scores: Scores = dot_products,
) -> Tensor:
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
        ranks.append(_tile_ranks(scores(rows, gallery), inside[:, 0] - start, inside[:, 1]).cpu())
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
    in_pairs = bool(paired_media(model))
    count = 0
    for batch in batches:
        present = [medium for medium in media if medium in batch]
        for medium in present:
            inputs = batch[medium]
            own = batch.get(f"{medium}_rows", torch.arange(len(inputs)))
            parts[medium].samples.append(own.cpu() + count)
            if medium == TEXT:
                encoded = inputs.cpu()
            elif in_pairs:
                encoded = model.pair_features(medium, *inputs_of(batch, medium, device))
            else:
                encoded = encode_inputs(model, medium, batch, device)
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
    if not paired_media(model):
        return _MediumFeatures(encode_tokens(model, unique, device), torch.stack([samples, number], dim=1))
    chunks = [model.pair_features(TEXT, part.to(device)) for part in unique.split(TEXTS_AT_ONCE)]
    return _MediumFeatures(torch.cat(chunks), torch.stack([samples, number], dim=1))


def _similarity(model: Any) -> tuple[Scores, float]:
    """The similarities of a model's features, and the factor with which it was trained on their softmax."""
    if paired_media(model):
        return model.pair_scores, 1.0
    scale = getattr(model, "logit_scale", None)
    return dot_products, DEFAULT_SCALE if scale is None else float(scale.exp())


def _joined(first: Tensor, second: Tensor, samples: int) -> Tensor:
    """Pairs of features of the same samples, int64 [P, 2]; ``first`` owns one feature per sample at most."""
    own = torch.full((samples,), -1)
    own[first[:, 0]] = first[:, 1]
    found = own[second[:, 0]]
    return torch.stack([found, second[:, 1]], dim=1)[found >= 0]
