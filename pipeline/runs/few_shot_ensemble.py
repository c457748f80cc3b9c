"""The logits of few-shot trials by the urls of their samples, and ensembles of a trial with another classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pipeline.evaluation.ensemble import Scores, joined, read_scores, scores_file, search_weight
from pipeline.loaders.samples import Samples, json_of_sample
from pipeline.models.adapters.adapter import Adapter
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder, split_file
from pipeline.training.adapt import Accuracy, Labelled, accuracy_of, batch_logits

ENSEMBLE = "ensemble"
"""Name of the ensemble's accuracy among the scores of a trial."""


@dataclass(frozen=True)
class PartLogits:
    """Logits of a part of a data set, float32 [N, C], with the urls of its samples and their labels, int64 [N]."""

    keys: tuple[str, ...]
    logits: torch.Tensor
    labels: torch.Tensor

    def accuracy(self) -> Accuracy:
        """Of the logits."""
        return accuracy_of([(self.logits, self.labels)], self.logits.shape[1])


def part_logits(adapter: Adapter, data: Labelled, keys: Sequence[str]) -> PartLogits:
    """The logits of ``data``, whose samples have these ``keys``."""
    logits, labels = (torch.cat(column) for column in zip(*batch_logits(adapter, data), strict=True))
    return PartLogits(tuple(keys), logits, labels)


@cache
def urls_of(uri: str) -> tuple[str, ...]:
    """The urls of all samples of a snapshot, in order: their names in the source."""
    samples = Samples(read_snapshot(uri), open_shards=2)
    return tuple(str(json_of_sample(samples[number]).get("url", "")) for number in range(len(samples)))


@cache
def digest_of_scores(place: str) -> str:
    """SHA-256 hex of the file of scores at ``place``."""
    folder, name = split_file(place)
    return folder.digest(name)


def scores_at(place: str) -> Scores:
    """The file of scores at ``place``, read once by this process."""
    return _scores(place, digest_of_scores(place))


@cache
def _scores(place: str, digest: str) -> Scores:
    return read_scores(place)


def write_scores(folder: Folder, name: str, classes: Sequence[str], logits: Mapping[str, PartLogits]) -> None:
    """Write ``<name>-<part>.parquet`` for each part, see :mod:`pipeline.evaluation.ensemble`."""
    for part, one in logits.items():
        folder.write_atomic(f"{name}-{part}.parquet", scores_file(one.keys, classes, one.logits))


def ensemble_accuracy(
    place: str, weight: float | None, classes: Sequence[str], logits: Mapping[str, PartLogits]
) -> tuple[Accuracy, float]:
    """The accuracy of the ensemble with the scores at ``place`` on the part ``test``, and the weight of these scores.

    Without a ``weight`` it is the best one on the part ``validation``.

    Raises:
        SettingError, DataError: the file of scores does not fit, see :mod:`pipeline.evaluation.ensemble`.
    """
    others, test = scores_at(place), logits["test"]
    if weight is None:
        held = logits["validation"]
        weight = search_weight(held.logits, others.of(held.keys, classes), held.labels)
    both = joined(test.logits, others.of(test.keys, classes), weight)
    return accuracy_of([(both, test.labels)], len(classes)), weight
