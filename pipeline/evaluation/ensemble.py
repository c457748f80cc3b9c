"""Ensembles of a method with another classifier, by files of its scores.

A file of scores is parquet with the columns ``key`` (text) and ``scores`` (a list of C numbers: logits, any scale), and
the metadata ``classes``, a JSON list of the C class names in their order. A key is the ``url`` of a row in its source,
as it is in the sample's json and in the parquet file of a shard; for a snapshot's samples it is their key.

PointCLIP (arXiv 2112.02413, section 3.4) adds the logits of a trained network to its own. Here

    logits = (1 - w) own + w other

so w = 0 is the method alone and w = 1 the other classifier; w is given, or the best of 21 values on validation samples,
never on the test set.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.config import require
from pipeline.errors import DataError, SettingError, unreadable
from pipeline.shards.storage import split_file

CLASSES = b"classes"
STEPS = 20
FORM = "a parquet file with the columns key and scores, and the metadata classes; see docs/points.md"


@dataclass(frozen=True)
class Scores:
    """Scores of another classifier, float32 [N, C], by key."""

    place: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    values: Tensor

    def of(self, keys: Sequence[str], classes: Sequence[str]) -> Tensor:
        """float32 [M, C] of these samples, with the columns in the order of ``classes``.

        Raises:
            SettingError: a class without scores. DataError: a sample without scores.
        """
        self.check_classes(classes)
        self.check_keys(keys)
        places = {key: row for row, key in enumerate(self.keys)}
        rows = self.values[[places[key] for key in keys]]
        return rows[:, [self.classes.index(name) for name in classes]]

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise ``SettingError`` for a class without scores."""
        lacking = [name for name in classes if name not in self.classes]
        require(not lacking, "ensemble", self.place, f"scores of all classes; it lacks {', '.join(lacking[:5])}")

    def check_keys(self, keys: Sequence[str]) -> None:
        """Raise ``DataError`` for a sample without scores."""
        known = set(self.keys)
        absent = [key for key in keys if key not in known]
        if absent:
            raise DataError(f"{self.place} has no scores of {len(absent)} of {len(keys)} samples, such as {absent[0]}")


def read_scores(place: str) -> Scores:
    """The file of scores at a path or URI.

    Raises:
        SettingError: missing, of another form, with keys or classes twice, or with numbers that are not finite.
    """
    folder, name = split_file(place)
    try:
        table = pq.read_table(pa.BufferReader(folder.read_bytes(name)))
        named = json.loads((table.schema.metadata or {})[CLASSES])
        keys = tuple(str(key) for key in table["key"].to_pylist())
        values = torch.from_numpy(np.array(table["scores"].to_pylist(), np.float32))
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise unreadable("ensemble", place, FORM, error) from error
    texts = isinstance(named, list) and all(isinstance(name, str) for name in named)
    require(texts, "ensemble", place, f"{FORM}; its classes are no list of names")
    classes = tuple(named)
    twice = sorted({name for name in classes if classes.count(name) > 1})
    require(not twice, "ensemble", place, f"each class once; it has several of {', '.join(twice[:5])}")
    fits = values.ndim == 2 and values.shape == (len(keys), len(classes))
    require(fits, "ensemble", place, f"{FORM}; it has scores {tuple(values.shape)} of {len(classes)} classes")
    require(bool(values.isfinite().all()), "ensemble", place, "numbers that are finite")
    require(len(set(keys)) == len(keys), "ensemble", place, "each key once")
    return Scores(place, classes, keys, values)


def scores_file(keys: Sequence[str], classes: Sequence[str], scores: Tensor) -> bytes:
    """The content of a file of scores, float [N, C]."""
    rows = pa.array(scores.float().cpu().numpy().tolist(), pa.list_(pa.float32()))
    table = pa.table({"key": pa.array(list(keys), pa.string()), "scores": rows})
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({CLASSES: json.dumps(list(classes)).encode()}), content)
    return content.getvalue()


def joined(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """(1 - w) own + w other, float [N, C]."""
    return (1 - weight) * own + weight * other


def search_weight(own: Tensor, other: Tensor, labels: Tensor) -> float:
    """The most accurate weight among 0, 0.05, ..., 1 for scores float [N, C] and labels int64 [N]; the first of equals.

    Raises:
        SettingError: no samples.
    """
    if not len(labels):
        raise SettingError("ensemble_weight", None, "a number, where there are no validation samples")
    weights = [step / STEPS for step in range(STEPS + 1)]
    right = [int((joined(own, other, weight).argmax(dim=1) == labels).sum()) for weight in weights]
    return weights[right.index(max(right))]
