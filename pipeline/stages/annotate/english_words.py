"""The words of an English caption, and the tag of each by itself.

A word with letters of another script than the Latin one, an address, a file name and every mark but a comma get the tag
``BREAK``: they end a phrase and are in none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import distribution
from pathlib import Path

from pipeline.stages.annotate.english import COLOURS, CORRECTIONS, FUNCTION_WORDS, PREPOSITIONS, QUANTIFIERS
from pipeline.stages.annotate.noun_phrases import ADJECTIVES, BREAK, NOUNS, QUANTIFIER, VERBS

LONGEST_WORD = 40
REMEMBERED_WORDS = 200_000
TITLE = 0.6  # fraction of capitalised words from which on a caption is a title, where capitals mean nothing

_LETTER = "(?:[^\\W_]|[\u0300-\u036f])"
_TOKEN = re.compile(
    r"(?P<other>(?:https?://|www\.)\S+|<[^<>]{1,200}>|&\#?\w{1,10};|[\w.+-]{1,64}@[\w.-]+|@\w+"
    r"|[\w-]{1,100}\.(?:jpe?g|png|gif|webp|pdf|html?|com|org|net)\b)"
    r"|(?P<abbreviation>(?:[A-Za-z]\.){2,})"
    r"|(?P<number>\d+(?:[.,:/]\d+)+(?:st|nd|rd|th|s)?(?!\w)|\d+(?:st|nd|rd|th|s)?(?![\w'\u2019-]))"
    rf"|(?P<word>{_LETTER}+(?:[-\u2010\u2011&]{_LETTER}+|['\u2019](?!s\b){_LETTER}+)*_?)"
    r"|(?P<possessive>['\u2019]s\b|(?<=s)['\u2019](?= \w))"
    r"|(?P<mark>[^ \t\u00a0])",
    re.IGNORECASE,
)
_OTHER_SCRIPT = re.compile(r"[^A-Za-z0-9\u00c0-\u024f\u1e00-\u1eff\u0300-\u036f'\u2019&\u2010\u2011-]")
_QUOTE = re.compile(r"(?<!\w)['\u2018](?=\w)")
_ADJECTIVE = re.compile(r".{2,}(?:ous|ful|less|able|ible|ish|ive|ic|ical|ary|esque|proof)|.+-(?:free|style|size|like)")


@dataclass(slots=True)
class WordSequence:
    """Words and marks of a caption: their spans, their texts in lower case, and their tags."""

    starts: list[int]
    ends: list[int]
    texts: list[str]
    tags: list[str]


def tagged_words(caption: str) -> WordSequence:
    """The words of ``caption``, each with its most frequent tag; takes time linear in its length."""
    tokens = list(_TOKEN.finditer(caption))
    title = _is_title([token.group() for token in tokens if token.lastgroup == "word"])
    quoted = _QUOTE.search(caption) is not None
    words = WordSequence([], [], [], [])
    previous = BREAK
    for token in tokens:
        tag = _tag(token, title or previous == BREAK, words.texts[-1] if words.texts else "", quoted)
        words.starts.append(token.start())
        words.ends.append(token.end())
        words.texts.append(token.group().lower().replace("\u2019", "'"))
        words.tags.append(tag)
        previous = tag
    _join(words, PREPOSITIONS, "IN")
    _join(words, QUANTIFIERS, QUANTIFIER)
    return words


def lexicon_tag(word: str) -> str:
    """The most frequent tag of a lower-case word; empty where neither list nor lexicon has it."""
    known = FUNCTION_WORDS.get(word) or CORRECTIONS.get(word) or _lexicon().get(word) or ""
    return known.partition("|")[0]


@lru_cache(REMEMBERED_WORDS)
def may_be_noun(word: str) -> bool:
    """Whether the lexicon has ``word``, its singular or its plural as a noun."""
    if word in COLOURS:
        return True
    singular = [word[: -len(ending)] for ending in ("s", "es") if word.endswith(ending)]
    if any(lexicon_tag(form) in NOUNS for form in (word, *singular)):
        return True
    return any(lexicon_tag(word + ending) == "NNS" for ending in ("s", "es"))


@lru_cache(REMEMBERED_WORDS)
def may_be_verb(word: str) -> bool:
    """Whether the lexicon has ``word``, or a form of it, as a verb."""
    if lexicon_tag(word) in VERBS:
        return True
    bases = [word, *(word[: -len(ending)] for ending in ("s", "es", "ing") if word.endswith(ending))]
    bases += [base + "e" for base in bases[1:]]
    past = [base.removesuffix("e") + "ed" for base in bases]
    return any(lexicon_tag(base) in VERBS for base in bases) or any(lexicon_tag(form) in VERBS for form in past)


def _tag(token: "re.Match[str]", plain: bool, previous: str, quoted: bool) -> str:
    """The tag of one token; ``plain`` where a capital letter means nothing, ``quoted`` in a caption with quotes."""
    text, group = token.group(), token.lastgroup
    if group == "word":
        return _word_tag(text, plain)
    if group == "number":
        return "CD"
    if group == "abbreviation":
        return "NNP"
    if group == "possessive":
        if FUNCTION_WORDS.get(previous) in ("PRP", "WP", "WRB", "EX", "ADV"):
            return "AUX"  # "it's"
        return BREAK if quoted and len(text) == 1 else "POS"
    return {",": ",", "&": "CC"}.get(text, BREAK)


def _word_tag(text: str, plain: bool) -> str:
    if len(text) > LONGEST_WORD or _OTHER_SCRIPT.search(text):
        return BREAK
    lower = text.lower().replace("\u2019", "'")
    capitals = len(text) > 1 and text.isupper()
    emphasis = capitals and lexicon_tag(lower) in ADJECTIVES  # "a RED dog", but "the US flag"
    if not plain and text[0].isupper() and not emphasis and (capitals or lower not in FUNCTION_WORDS):
        return "NNPS" if lexicon_tag(lower) == "NNS" else "NNP"
    if text[0].isupper() and not lexicon_tag(lower):
        return _guessed(lower) if "-" in lower else "NNP"
    return alone(lower)


@lru_cache(REMEMBERED_WORDS)
def alone(word: str) -> str:
    """The tag of a lower-case word by itself."""
    contracted = re.fullmatch(r"(.+?)(?:n't|'(?:re|ll|ve|d|m|t))", word)
    if contracted:
        return "AUX" if FUNCTION_WORDS.get(contracted[1]) in (None, "AUX", "MD") else "PRP"
    tag = lexicon_tag(word)
    if word.endswith("ed") and "-" in word:
        return _guessed(word)  # "hand-painted"
    if tag in ("", "FW", "LS", "SYM") or not (tag.isalpha() or tag.endswith("$")):
        return _guessed(word)
    # "typing" is a noun in the lexicon; without a plural it is hardly one that an image shows.
    gerund = tag == "NN" and word.endswith("ing") and word not in CORRECTIONS and not lexicon_tag(word + "s")
    return "VBG" if gerund and may_be_verb(word) else tag


def _guessed(word: str) -> str:
    """The tag of an unknown word by its parts and its ending."""
    first, hyphen, last = word.rpartition("-")
    if hyphen:
        part = alone(last)
        return "JJ" if part in ("VBN", "VBD", "VBG", "JJ", "RP", "IN", "CD") or first[:1].isdigit() else "NN"
    if word[0].isdigit():
        return "JJ" if word.endswith("d") else "CD"
    if word.endswith("ing") and len(word) > 5:
        return "VBG"
    if word.endswith("ed") and len(word) > 4:
        return "VBN"
    if word.endswith("ly") and len(word) > 4:
        return "RB"
    if _ADJECTIVE.fullmatch(word) and not word.endswith("ics"):
        return "JJ"
    plural = word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return "NNS" if plural else "NN"


@cache
def _lexicon() -> dict[str, str]:
    """Tags by word, from the file in textblob: importing textblob takes seconds."""
    file = Path(str(distribution("textblob").locate_file("textblob/en/en-lexicon.txt")))
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(";;;"))
    return {line[0]: line[1] for line in lines if len(line) >= 2}


def _is_title(words: Sequence[str]) -> bool:
    """Whether most words after the first have a capital letter, function words left out."""
    content = [word for word in words[1:] if word.lower() not in FUNCTION_WORDS]
    return sum(word[0].isupper() for word in content) >= TITLE * len(content)


def _join(words: WordSequence, phrases: Sequence[tuple[str, ...]], tag: str) -> None:
    """Give all words of each of the ``phrases`` the same tag."""
    firsts = {phrase[0] for phrase in phrases}
    for start, text in enumerate(words.texts):
        if text in firsts:
            for phrase in phrases:
                if tuple(words.texts[start : start + len(phrase)]) == phrase:
                    words.tags[start : start + len(phrase)] = [tag] * len(phrase)
