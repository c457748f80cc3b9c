"""Corrections of a word's tag by its neighbours, for English captions.

The lexicon has one tag per word: "watch" is a verb, "key" an adjective. The rules take the tags of the words around it.
"""

from pipeline.stages.annotate.english import COLOUR_NOUNS, COMPOUND_PARTICIPLES, PLURAL_MODIFIERS, TRANSITIVE
from pipeline.stages.annotate.english_words import WordSequence, may_be_noun, may_be_verb
from pipeline.stages.annotate.noun_phrases import ADJECTIVES, BREAK, NOUNS, QUANTIFIER, TaggedWord

PREDICATE = "PRED"
"""An adjective after a form of "be", which is in no noun phrase."""

_ADVERBS = frozenset(("RB", "RBR", "RBS", "ADV"))
_BREAKS = frozenset((BREAK, ","))
_OPEN = frozenset((BREAK, ",", "CC"))
_DETERMINERS = frozenset(("DT", "PRP$", "POS", "CD", QUANTIFIER))
_MODIFIERS = _DETERMINERS | ADJECTIVES
_OBJECTS = frozenset(("DT", "PRP$", "PRP", QUANTIFIER))
_FINITE = frozenset(("VB", "VBP", "VBZ"))
_NOMINAL = NOUNS | ADJECTIVES | {"CD"}
_GERUND_AFTER = frozenset("by while after before when without".split())
_SUBORDINATE = frozenset("because although though while whilst if unless whether as since than like".split())
_OF_NOUNS = frozenset("of for with from by as".split())
_SUBJECTS = frozenset("i you he she it we they who that which".split())
_DEMONSTRATIVES = frozenset("this that these those".split())
_ARTICLES = frozenset("a an the".split())


def corrected(words: WordSequence) -> list[TaggedWord]:
    """The words with their tags corrected."""
    tags, texts, count = [BREAK, *words.tags, *[BREAK] * 3], ["", *words.texts, ""], len(words.tags)
    for at in range(1, count + 1):
        if tags[at] in _FINITE:
            tags[at] = _verb_or_noun(tags, texts, at)
        elif tags[at] in ("NN", "NNS", "JJ"):
            tags[at] = _noun_or_verb(tags, texts, at)
    for at in range(count, 0, -1):
        if tags[at] in ADJECTIVES:
            tags[at] = tags[at] if _modifies(tags, at) else _last_adjective(tags, texts, at)
        elif tags[at] in ("VBN", "VBD"):
            tags[at] = _past_participle(tags, texts, at)
        elif tags[at] == "VBG" or (tags[at] == "NN" and texts[at].endswith("ing")):
            tags[at] = _present_participle(tags, texts, at)
        elif tags[at] == "NN" and tags[at + 1] in ADJECTIVES:
            joined = texts[at] in COLOUR_NOUNS or texts[at + 1] in COMPOUND_PARTICIPLES
            tags[at] = "JJ" if joined else "NN"
    return [TaggedWord(*word) for word in zip(words.starts, words.ends, tags[1 : count + 1], strict=True)]


def _verb_or_noun(tags: list[str], texts: list[str], at: int) -> str:
    """A finite verb of the lexicon is a noun after an article, and where it does not agree with its subject."""
    tag, before, after = tags[at], tags[at - 1], tags[at + 1]
    noun = "NNS" if tag == "VBZ" else "NN"
    if texts[at - 1] in _DEMONSTRATIVES and tag != "VB":
        return tag
    if before in _DETERMINERS or (before in ADJECTIVES and at > 1):
        return noun
    if not may_be_noun(texts[at]):
        return tag
    if before == "IN" and texts[at - 1] not in _SUBORDINATE:
        return noun
    if before in ("NN", "NNP") and tag != "VBZ":
        return noun
    if before in _BREAKS and tag != "VBZ" and (after in NOUNS or after in _BREAKS or after == "CC"):
        return noun
    return tag


def _noun_or_verb(tags: list[str], texts: list[str], at: int) -> str:
    """A noun or adjective of the lexicon is a verb after "to", after a pronoun, and between subject and object."""
    tag, before, after = tags[at], tags[at - 1], tags[at + 1]
    if not may_be_verb(texts[at]) or texts[at].endswith(("ing", "ed")):
        return tag
    if texts[at - 1] == "not" and tags[at - 2] in ("AUX", "MD"):
        return "VB"
    if before in ("TO", "MD"):
        sure = before == "MD" or after in _OBJECTS or tags[at - 2] == "WRB"
        return "VB" if sure and tag != "NNS" else tag
    if texts[at - 1] in _SUBJECTS and before in ("PRP", "WP"):
        return "VBZ" if tag == "NNS" else "VBP" if tag == "NN" else tag
    plural = before == "NNS" and texts[at - 1] not in PLURAL_MODIFIERS and tag == "NN"
    if plural and (after == "RP" or after == "IN" and texts[at + 1] not in _OF_NOUNS):
        return "VBP"
    if after in _OBJECTS and tag != "JJ":
        if before == "NNS" and tag == "NN":
            return "VBP"
        if before in ("NN", "NNP") and tag == "NNS":
            return "VBZ"
    return tag


def _modifies(tags: list[str], at: int) -> bool:
    """Whether a noun phrase goes on after the word ``at``."""
    if tags[at + 1] not in ("CC", ","):
        return tags[at + 1] in _NOMINAL
    return tags[at + 3 if tags[at + 2] == "RB" else at + 2] in ADJECTIVES


def _last_adjective(tags: list[str], texts: list[str], at: int) -> str:
    """An adjective without a noun after it: a noun ("woman in red") or a predicate ("the dress is red")."""
    before = tags[at - 1]
    if before in NOUNS or before == "IN":
        return "NN" if may_be_noun(texts[at]) else PREDICATE
    first = at
    while tags[first - 1] in ADJECTIVES or tags[first - 1] in ("VBN", "VBD", "VBG"):
        first -= 1
    known = may_be_noun(texts[at]) and first < at
    return "NN" if known or tags[first - 1] in ("PRP$", "POS") or texts[first - 1] in _ARTICLES else PREDICATE


def _past_participle(tags: list[str], texts: list[str], at: int) -> str:
    """An adjective before a noun ("a dotted key"), else a verb ("a house painted by")."""
    tag, before = tags[at], tags[at - 1]
    if _modifies(tags, at):
        verb = before in ("AUX", "PRP", "NNP", "NNS", "NNPS") or (before == "NN" and tag == "VBD")
        return tag if verb else "JJ"
    return "NN" if before in _DETERMINERS and may_be_noun(texts[at]) else tag


def _present_participle(tags: list[str], texts: list[str], at: int) -> str:
    """An adjective before a noun, a noun after an article, else a verb ("a man riding a wave")."""
    tag, before, after = tags[at], tags[at - 1], tags[at + 1]
    if tag == "NN":
        verb = before not in _MODIFIERS and after in _OBJECTS and may_be_verb(texts[at])
        return "VBG" if verb else tag
    if before in _MODIFIERS:
        if after in _NOMINAL:
            return "JJ"
        return "NN" if before in _DETERMINERS or may_be_noun(texts[at]) else tag
    free = before in _OPEN or (before == "IN" and texts[at - 1] not in _GERUND_AFTER)
    return "JJ" if free and after in _NOMINAL and texts[at] not in TRANSITIVE else tag
