"""Noun phrases of tagged words.

Tags are those of the Penn Treebank (Marcus, Santorini, Marcinkiewicz, 1993), with two more: ``BREAK`` for what no
phrase crosses, such as punctuation, and ``Q`` for a quantifier that belongs to a phrase ("some", "several").
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.stages.annotate.extractor import PhraseSpan

BREAK = "BREAK"
QUANTIFIER = "Q"
NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))
VERBS = frozenset(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"))
ADJECTIVES = frozenset(("JJ", "JJR", "JJS"))

# One letter per tag, so that a phrase is a regular expression over letters.
_LETTERS = {
    **dict.fromkeys(NOUNS, "n"),
    **dict.fromkeys(ADJECTIVES, "a"),
    "CD": "c",
    QUANTIFIER: "c",
    "RB": "r",
    "RBR": "r",
    "RBS": "r",
    "POS": "s",
    "CC": "&",
    ",": ",",
}
# Numbers, adjectives (joined by commas or a conjunction, with adverbs before them), nouns; possessives in between.
_ADJECTIVES = r"(?:r*a(?:,?&?r*a)*)"
_PHRASE = re.compile(rf"c*{_ADJECTIVES}?c?n+(?:s{_ADJECTIVES}?n+)*c?")


class TaggedWord(NamedTuple):
    """``caption[start:end]`` and its tag."""

    start: int
    end: int
    tag: str


def noun_phrases(words: Sequence[TaggedWord]) -> list[PhraseSpan]:
    """The longest noun phrases, without articles and possessive pronouns.

    A number after nouns belongs to a name only ("Air Max 90").
    """
    letters = "".join(_LETTERS.get(word.tag, ".") for word in words)
    found = []
    for match in _PHRASE.finditer(letters):
        first, last = match.start(), match.end() - 1
        if letters[last] == "c" and words[last - 1].tag not in ("NNP", "NNPS"):
            last -= 1
        found.append(PhraseSpan(words[first].start, words[last].end, "phrase"))
    return found


def spans_of(words: Sequence[TaggedWord], nouns: frozenset[str], verbs: frozenset[str]) -> list[PhraseSpan]:
    """The words with tags in ``nouns`` and ``verbs``, and the noun phrases; sorted."""
    single = [PhraseSpan(word.start, word.end, "noun") for word in words if word.tag in nouns]
    single += [PhraseSpan(word.start, word.end, "verb") for word in words if word.tag in verbs]
    return sorted(single + noun_phrases(words))
