"""The values of a column: folds, labels, splits, licences.

With it a data set of official folds gives a snapshot for each test fold, without a second copy of the shards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Values(Filter):
    """Keep samples by a column of the shards' parquet or of the samples' json; drops ``other_value``.

    Values are compared as text. A list has all of its entries as values, and a sample without a value has none.
    """

    name: ClassVar[str] = "values"
    rank: ClassVar[int] = 1
    values_column: str = ""
    """Column of the values, such as fold or label."""
    values_keep: tuple[str, ...] = ()
    """Keep only samples with one of these values; empty for any."""
    values_drop: tuple[str, ...] = ()
    """Drop samples with one of these values."""

    def check(self) -> None:
        """Require a column and values."""
        require(bool(self.values_column), "values_column", self.values_column, "the name of a column")
        either = bool(self.values_keep or self.values_drop)
        require(either, "values_keep", self.values_keep, "a value to keep, or one in values_drop")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """See the class."""
        keep, drop = set(self.values_keep), set(self.values_drop)
        found = [set(_texts(value)) for value in view.column(self.values_column)]
        return Verdict(
            {"other_value": np.array([bool(one & drop or (keep and not one & keep)) for one in found], bool)}
        )


def _texts(value: Any) -> Iterable[str]:
    if value is None:
        return ()
    return map(str, value) if isinstance(value, (list, tuple)) else (str(value),)
