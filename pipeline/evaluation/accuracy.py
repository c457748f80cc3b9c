"""Accuracy of classifications: top-1 and top-5 over samples, over classes, and over the folds of a set.

The mean over folds gives each fold the same weight, whatever its size: the protocol of ESC-50 (Piczak 2015, 5 folds)
and of UrbanSound8K (Salamon et al. 2014, 10 folds).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import require

TOP = 5
MEANS = ("top1", "top5", "mean_per_class")


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of classes that rank before the correct one: scores ``[B, C]``, labels int64 ``[B]`` -> int64 ``[B]``.

    At equal scores the lower class number ranks first, as with argmax; so a model that gives every class the same score
    always predicts class 0. NaN never counts as correct.
    """
    right = scores.gather(1, labels[:, None])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    level = scores == right
    ahead = ~(level | (scores < right)) | (level & (numbers < labels[:, None]))
    return ahead.sum(dim=1)


class Counts:
    """Per-class counts, int64 ``[C]``, of all samples so far."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.seen, self.first, self.among = torch.zeros(3, classes, dtype=torch.int64).unbind()

    def add(self, ranks: Tensor, labels: Tensor) -> None:
        """Count samples by :func:`label_ranks`, int64 ``[B]``, and their labels, int64 ``[B]``."""
        self.seen += torch.bincount(labels, minlength=self.classes)
        self.first += torch.bincount(labels[ranks == 0], minlength=self.classes)
        self.among += torch.bincount(labels[ranks < TOP], minlength=self.classes)

    def metrics(self) -> dict[str, float]:
        """``top1``, ``top5``, ``mean_per_class`` of the occurring classes, ``chance`` of ``top1``, and ``samples``."""
        total = int(self.seen.sum())
        require(total > 0, "batches", total, "one image or more")
        occurring = self.seen > 0
        return {
            "top1": int(self.first.sum()) / total,
            "top5": int(self.among.sum()) / total,
            "mean_per_class": float((self.first[occurring] / self.seen[occurring]).double().mean()),
            "chance": 1 / self.classes,
            "samples": float(total),
        }


class FoldCounts:
    """Per-class counts of each fold; samples without a fold are one."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.by_fold: dict[str, Counts] = {}

    def add(self, ranks: Tensor, labels: Tensor, folds: Sequence[str] | None = None) -> None:
        """Count samples by their ranks and labels, int64 [B], see :class:`Counts`, and their folds."""
        names = [""] * len(labels) if folds is None else list(folds)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            self.by_fold.setdefault(name, Counts(self.classes)).add(ranks[rows], labels[rows])

    def metrics(self) -> dict[str, float]:
        """Those of :meth:`Counts.metrics`; with folds their means, ``folds``, and ``top1/<fold>`` of each."""
        require(bool(self.by_fold), "batches", 0, "one sample or more")
        found = {
            name: counts.metrics() for name, counts in sorted(self.by_fold.items(), key=lambda one: fold_order(one[0]))
        }
        if list(found) == [""]:
            return found[""]
        means = {name: sum(one[name] for one in found.values()) / len(found) for name in MEANS}
        sizes = {"chance": 1 / self.classes, "samples": sum(one["samples"] for one in found.values())}
        return {
            **means,
            **sizes,
            "folds": float(len(found)),
            **{f"top1/{name}": one["top1"] for name, one in found.items()},
        }


def fold_order(name: str) -> tuple[int, int, str]:
    """Sort key: numbers before texts, by value."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
