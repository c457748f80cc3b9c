"""Values of the samples' parts of one medium: the columns that a refresh has stored, or measured by decoding."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, SampleError
from pipeline.shards.media import Medium
from pipeline.stages.filters.view import ShardView

Values = Mapping[str, NDArray[np.float64]]


def part_values(
    view: ShardView, medium: Medium, columns: Sequence[str], measure: Callable[[bytes], Sequence[float]]
) -> tuple[Values, NDArray[np.bool_]]:
    """The values of ``columns``, float64 [n], NaN without a part; and which parts cannot be read, bool [n].

    Where a shard lacks a column, ``measure`` gives all of them for a body; it raises ``SampleError`` for an unreadable
    one.
    """
    try:
        stored = {name: view.column(name) for name in columns}
    except DataError:
        return _measured(view, medium, columns, measure)
    values = {
        name: np.array([math.nan if one is None else one for one in column], np.float64)
        for name, column in stored.items()
    }
    return values, np.zeros(len(view), bool)


def _measured(
    view: ShardView, medium: Medium, columns: Sequence[str], measure: Callable[[bytes], Sequence[float]]
) -> tuple[Values, NDArray[np.bool_]]:
    table, unreadable = np.full((len(view), len(columns)), math.nan), np.zeros(len(view), bool)
    for number, body in enumerate(view.bodies(medium)):
        if body is not None:
            try:
                table[number] = measure(body)
            except SampleError:
                unreadable[number] = True
    return dict(zip(columns, table.T, strict=True)), unreadable
