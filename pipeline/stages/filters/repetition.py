"""Repetitive captions, by Gopher's rules (Rae et al., 2021, arXiv 2112.11446, table A1).

The most frequent n-gram of words may contain at most 20 % (n=2), 18 % (n=3) or 16 % (n=4) of a caption's characters,
and all n-grams that occur twice at most 15 % (n=5) down to 10 % (n=10). The rules are made for documents; in a short
caption any n-gram exceeds these limits. So the first rule applies only to n-grams that occur ``min_repeats`` times.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView

MOST_FREQUENT: Mapping[int, float] = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATED: Mapping[int, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True, kw_only=True)
class Repetition(Filter):
    """Drop captions that repeat themselves: ``repetition``."""

    name: ClassVar[str] = "repetition"
    rank: ClassVar[int] = 3
    min_repeats: int = 3
    """Smallest number of repeats of an n-gram of 2 to 4 words, at least 2, at which its limit applies. Not from a
    paper."""

    def check(self) -> None:
        """Require at least two, since one would drop every caption."""
        require(self.min_repeats >= 2, "min_repeats", self.min_repeats, "2 or more")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the words of the cleaned caption, in lower case."""
        repeats = [is_repetitive(text, self.min_repeats) for text in view.captions()]
        return Verdict({"repetition": np.array(repeats, bool)})


def is_repetitive(text: str, min_repeats: int = 3) -> bool:
    """Whether ``text`` breaks one of the rules."""
    words = text.lower().split()
    if len(words) == len(set(words)):
        return False
    return any(_most_frequent(words, n, min_repeats) > share for n, share in MOST_FREQUENT.items()) or any(
        _duplicated(words, n) > share for n, share in DUPLICATED.items()
    )


def _most_frequent(words: list[str], n: int, min_repeats: int) -> float:
    """Fraction of the words' characters in the n-gram with the most characters."""
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    held = (count * sum(map(len, gram)) for gram, count in grams.items() if count >= min_repeats)
    return max(held, default=0) / sum(map(len, words))


def _duplicated(words: list[str], n: int) -> float:
    """Fraction of the words' characters in n-grams that occur more than once, each character counted once."""
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    counts = Counter(grams)
    inside = {start + offset for start, gram in enumerate(grams) if counts[gram] > 1 for offset in range(n)}
    return sum(len(words[index]) for index in inside) / sum(map(len, words))
