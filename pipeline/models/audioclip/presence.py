"""The rows of a batch that have a modality: a tower reads these alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PresentRows:
    """The rows where ``present``, float [count], is not 0; all of them if it is none.

    Where a rank has no such row, its tower reads one blank row in evaluation mode, which updates no statistics; the
    features are multiplied by 0. So every rank has a gradient for every weight, and takes part in every exchange.
    """

    def __init__(self, present: Tensor | None, count: int) -> None:
        self.count = count
        self.rows = None if present is None else present.nonzero().squeeze(1)

    @property
    def none(self) -> bool:
        """Whether no row has the modality."""
        return self.rows is not None and len(self.rows) == 0

    def taken(self, values: Tensor) -> Tensor:
        """[count, ...] to the rows that are present, or one blank row."""
        if self.none:
            return torch.zeros_like(values[:1])
        return values if self.rows is None or len(self.rows) == self.count else values[self.rows]

    def put_back(self, features: Tensor) -> Tensor:
        """Features of :meth:`taken` in their rows, float [count, D]; zeros elsewhere."""
        if self.none:
            return (features * 0).expand(self.count, -1)
        if self.rows is None or len(self.rows) == self.count:
            return features
        return features.new_zeros(self.count, features.shape[1]).index_copy(0, self.rows, features)

    @contextmanager
    def of(self, *modules: nn.Module) -> Iterator[None]:
        """Evaluation mode of a tower while it reads a blank row."""
        training = [part for module in modules for part in module.modules() if part.training] if self.none else []
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True
