"""Captions with nothing in them once they are cleaned."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Text(Filter):
    """Drop captions of which cleaning leaves nothing: reason ``no_text``."""

    name: ClassVar[str] = "text"
    rank: ClassVar[int] = 0

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """By :func:`pipeline.stages.filters.captions.clean_text`."""
        return Verdict({"no_text": np.array([not text for text in view.captions()], bool)})
