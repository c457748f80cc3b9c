"""How near written captions are to reference captions: BLEU (NLTK's) and CIDEr-D.

BLEU is Papineni et al. 2002, over the whole set and without smoothing. CIDEr-D is Vedantam et al. 2015, arXiv
1411.5726, equation 6: with vectors g_n of the frequencies of n-grams times log(images / images whose references have
the n-gram),

    CIDEr-D = 10/4 sum_(n = 1..4) mean_references exp(-(l_c - l_r)^2 / 2 sigma^2) min(g_n(c), g_n(r)) . g_n(r)
                                                     / |g_n(c)| |g_n(r)|                             sigma = 6

The mean over images is the metric; it is not limited to 1. Words are runs of letters and digits in lower case. The
official tool uses the tokenizer of the Penn Treebank in Java and drops punctuation, so figures differ slightly.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

Gram = tuple[str, ...]
LONGEST = 4
SIGMA = 6.0


def caption_words(text: str) -> list[str]:
    """``["a", "dog's", "toy"]`` of ``A dog's toy.``"""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def caption_metrics(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``cider`` and ``bleu1`` to ``bleu4`` of one caption per image against its one or more ``references``."""
    candidates = [caption_words(text) for text in written]
    known = [[caption_words(text) for text in some] for some in references]
    scores = cider(candidates, known)
    return {"cider": sum(scores) / len(scores), **bleu(candidates, known)}


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """``bleu1`` to ``bleu4`` of the whole set, 0 to 1."""
    from nltk.translate.bleu_score import corpus_bleu

    found = {}
    for most in range(1, LONGEST + 1):
        matched = _has_match(candidates, references, most)
        weights = (1 / most,) * most
        found[f"bleu{most}"] = float(corpus_bleu(references, candidates, weights)) if matched else 0.0
    return found


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each image's words; the frequencies of n-grams are those of all ``references``."""
    shown: Counter[Gram] = Counter()
    for some in references:
        shown.update({gram for words in some for gram in _grams(words)})
    images = math.log(max(len(references), 1))
    return [
        10 * sum(_likeness(words, one, shown, images) for one in some) / len(some)
        for words, some in zip(candidates, references, strict=True)
    ]


def _likeness(candidate: Sequence[str], reference: Sequence[str], shown: Counter[Gram], images: float) -> float:
    """The mean over n of the clipped cosines, times the penalty of the length; 0 to 1."""
    mine, theirs = (_weighted(words, shown, images) for words in (candidate, reference))
    penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * SIGMA**2))
    return penalty * sum(_clipped_cosine(one, other) for one, other in zip(mine, theirs, strict=True)) / LONGEST


def _clipped_cosine(mine: dict[Gram, float], theirs: dict[Gram, float]) -> float:
    product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
    lengths = math.hypot(*mine.values()) * math.hypot(*theirs.values())
    return product / lengths if lengths else 0.0


def _weighted(words: Sequence[str], shown: Counter[Gram], images: float) -> list[dict[Gram, float]]:
    """Of each n, the n-grams with their weights."""
    found: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
    for gram, count in _grams(words).items():
        found[len(gram) - 1][gram] = count * (images - math.log(max(shown[gram], 1)))
    return found


def _has_match(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], length: int) -> bool:
    """Whether any candidate shares an n-gram of this ``length``: without, BLEU is 0 and NLTK warns."""
    return any(
        len(gram) == length and any(gram in _grams(words) for words in some)
        for candidate, some in zip(candidates, references, strict=True)
        for gram in _grams(candidate)
    )


def _grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )
