"""Nouns, verbs and noun phrases by a lexicon and rules, without a model.

A word gets its tag from the function words, from the lexicon of Brill's tagger ("A simple rule-based part of speech
tagger", 1992; 94,000 words, part of the package textblob), or from its ending. Rules about its neighbours then correct
the tag. They are made for English captions, where articles and verbs are often missing.
"""

from collections.abc import Sequence
from importlib.metadata import version

from pipeline.errors import SettingError
from pipeline.stages.annotate.english_rules import corrected
from pipeline.stages.annotate.english_words import tagged_words
from pipeline.stages.annotate.extractor import FIELD, PhraseExtractor, PhraseSpan
from pipeline.stages.annotate.noun_phrases import NOUNS, VERBS, spans_of

RULES_VERSION = 1
"""Raise it with every change of the rules or of the word lists."""


class RulesExtractor:
    """The extractor; the lexicon is loaded with the first caption."""

    def __init__(self) -> None:
        self.version = f"{RULES_VERSION}, textblob {version('textblob')}"

    def extract(self, captions: Sequence[str]) -> list[list[PhraseSpan]]:
        """The spans of each caption, in time linear in its length."""
        return [spans_of(corrected(tagged_words(caption)), NOUNS, VERBS) for caption in captions]


def load(option: str) -> PhraseExtractor:
    """The extractor; raises ``SettingError`` for an option, since it has none."""
    if option:
        raise SettingError(FIELD, f"rules:{option}", "rules, which has no option")
    return RulesExtractor()
