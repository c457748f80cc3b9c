"""The language of captions, identified by py3langid (langid.py: Lui and Baldwin, ACL 2012).

DataComp keeps captions that fastText identifies as English (arXiv 2304.14108), LAION uses gcld3 (arXiv 2210.08402),
both at any probability; neither library is maintained any more. py3langid distinguishes 97 languages in some 20
microseconds per caption. Captions of one or two words are hard for any identifier: set a probability to drop the
doubtful ones.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Language(Filter):
    """Drop captions in other languages, or identified with a low probability: ``language``, ``language_unsure``."""

    name: ClassVar[str] = "language"
    rank: ClassVar[int] = 2
    languages: tuple[str, ...] = ("en",)
    """ISO 639-1 codes to keep."""
    min_language_probability: float = 0.0

    def check(self) -> None:
        """Require known codes and a valid probability."""
        known = identifier().labels
        unknown = [code for code in self.languages if code not in known]
        require(bool(self.languages) and not unknown, "languages", unknown, "one or more of " + " ".join(sorted(known)))
        probability = self.min_language_probability
        require(0 <= probability <= 1, "min_language_probability", probability, "0 to 1")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by the most probable language of the cleaned caption."""
        found = [identify(text) for text in view.captions()]
        other = np.array([code not in self.languages for code, _ in found], bool)
        unsure = np.array([probability < self.min_language_probability for _, probability in found], bool)
        return Verdict({"language": other, "language_unsure": unsure})


def identify(text: str) -> tuple[str, float]:
    """ISO 639-1 code of the most probable language of ``text``, and its probability."""
    code, probability = identifier().classify(text)
    return str(code), float(probability)


@functools.cache
def identifier() -> Any:
    """The identifier, loaded once per process (half a second)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
