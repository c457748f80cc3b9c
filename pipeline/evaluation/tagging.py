"""Multi-label classification: average precision and area under the ROC curve of each class over all samples.

The metrics of AudioSet (Gemmeke et al. 2017, "Audio Set: An ontology and human-labeled dataset for audio events"): mAP
and the mean AUC, each the mean over classes that occur. Scikit-learn computes both; its average precision is the sum of
precisions at each threshold, weighted by the increase of recall, without interpolation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.media import encode_inputs, inputs_of
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.samples import json_of_sample
from pipeline.shards.objects import plain_word
from pipeline.shards.sample import Sample

Score = Callable[[Mapping[str, Any], torch.device], Tensor]
"""Scores float [B, C] of a batch, computed on a device."""


@dataclass(frozen=True, kw_only=True)
class LabelsReader:
    """``labels``: which of the ``classes`` each sample has, bool [B, C].

    The value under ``json_key`` is a list of class names or numbers, or a text with names between ``separator``. Names
    are compared as by :class:`pipeline.loaders.readers.LabelReader`. An empty list is a sample without any class.
    """

    classes: tuple[str, ...]
    json_key: str
    separator: str = ";"
    key: str = "labels"
    fields: Sequence[str] = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Class numbers.

        Raises:
            UnreadableSample: the json is broken.
            DataError: no list or text there, or none of the classes.
        """
        value = json_of_sample(sample).get(self.json_key)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(self.separator) if name.strip()]
        if not isinstance(value, list):
            raise DataError(f"sample {sample.key} has no list of classes under {self.json_key!r} in its json")
        return {self.key: [self._number(sample, name) for name in value]}

    def collate(self, rows: list[Row]) -> Batch:
        """Bool [B, C]."""
        found = torch.zeros(len(rows), len(self.classes), dtype=torch.bool)
        for row, numbers in zip(found, rows, strict=True):
            row[numbers[self.key]] = True
        return {self.key: found}

    def _number(self, sample: Sample, name: object) -> int:
        number = self._numbers.get(plain_word(name)) if isinstance(name, str) else name
        known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.classes)
        if not known:
            raise DataError(f"{name!r} in {sample.key}'s {self.json_key!r} is none of the {len(self.classes)} classes")
        return int(str(number))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {plain_word(name): number for number, name in reversed(list(enumerate(self.classes)))}


def tagging(
    model: Any, batches: Iterable[Mapping[str, Any]], score: Score, precision: str = "fp32"
) -> dict[str, float]:
    """:func:`tagging_metrics` of ``score`` on ``batches``, which have its inputs and ``labels``, bool [B, C]."""
    scores, truth = [], []
    with inference(model, precision) as device:
        for batch in batches:
            scores.append(score(batch, device).float().cpu())
            truth.append(batch["labels"])
    return tagging_metrics(torch.cat(scores).numpy(), torch.cat(truth).numpy())


def by_prompts(model: Any, medium: str, class_vectors: Tensor) -> Score:
    """Cosines with class vectors, float [C, D]."""

    def score(batch: Mapping[str, Any], device: torch.device) -> Tensor:
        features = encode_inputs(model, medium, batch, device)
        with torch.autocast(device.type, enabled=False):
            return features @ class_vectors.to(device).float().T

    return score


def by_head(model: Any, medium: str, classes: Sequence[str]) -> Score:
    """Logits of a model with ``tag_M`` for a medium M, whose ``classes`` have all of the named ones.

    Raises:
        SettingError: a class that the head does not have.
    """
    known = {plain_word(name): number for number, name in enumerate(model.classes)}
    unknown = [name for name in classes if plain_word(name) not in known]
    require(not unknown, "classes", unknown[:5], "those of the model's head")
    places = torch.tensor([known[plain_word(name)] for name in classes])
    head = getattr(model, f"tag_{medium}")
    return lambda batch, device: head(*inputs_of(batch, medium, device))[:, places.to(device)]


def tagging_metrics(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Metrics of scores float [N, C] against truth bool [N, C].

    Returns:
        ``map`` over the classes that occur, ``mauc`` over those that occur and are not on every sample, ``chance`` (the
        mAP of constant scores, which is the mean frequency of the classes), ``classes`` that occur, ``samples``. NaN
        ranks last.

    Raises:
        DataError: no sample has a class.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    occurring = truth.any(axis=0)
    if not occurring.any():
        raise DataError(f"none of {len(truth)} samples has one of the {truth.shape[1]} classes")
    scores, truth = np.nan_to_num(scores[:, occurring], nan=float(np.finfo(np.float32).min)), truth[:, occurring]
    mixed = ~truth.all(axis=0)
    areas = [roc_auc_score(truth[:, number], scores[:, number]) for number in np.flatnonzero(mixed)]
    found = {"mauc": float(np.mean(areas))} if areas else {}
    return {
        "map": float(average_precision_score(truth, scores, average="macro")),
        **found,
        "chance": float(truth.mean()),
        "classes": float(occurring.sum()),
        "samples": float(len(truth)),
    }
