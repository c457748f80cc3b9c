"""Caption length, as in DataComp's basic filter (Gadre et al., 2023, arXiv 2304.14108, section 4.2 and appendix).

Keeps captions with more than two words and more than five characters, after cleaning.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Length(Filter):
    """Drop captions that are too short or too long: ``few_words``, ``few_characters``, ``many_words``."""

    name: ClassVar[str] = "length"
    rank: ClassVar[int] = 1
    min_words: int = 3
    min_characters: int = 6
    max_words: int = 1000
    """Largest number of words; longer captions are whole pages. Not from a paper."""

    def check(self) -> None:
        """Require consistent bounds."""
        require(0 <= self.min_words <= self.max_words, "min_words", self.min_words, f"0 to {self.max_words}")
        require(self.min_characters >= 0, "min_characters", self.min_characters, "0 or more")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by numbers of characters and of words, separated by white space."""
        captions = view.captions()
        words = np.array([len(text.split()) for text in captions], int)
        characters = np.array([len(text) for text in captions], int)
        return Verdict(
            {
                "few_words": words < self.min_words,
                "few_characters": characters < self.min_characters,
                "many_words": words > self.max_words,
            }
        )
