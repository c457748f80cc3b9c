"""Captions that are empty after cleaning."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Text(Filter):
    """Drop captions that are empty after cleaning: ``no_text``."""

    name: ClassVar[str] = "text"
    rank: ClassVar[int] = 0

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by :func:`pipeline.stages.filters.captions.clean_text`."""
        return Verdict({"no_text": np.array([not text for text in view.captions()], bool)})
