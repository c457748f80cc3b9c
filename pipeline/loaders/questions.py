"""Questions about images, and the accuracy of an answer.

A sample has its questions in ``boxes.json`` or in ``json``, under the key ``questions``:

    [{"question": "what colour is the star?", "answer": "red"},
     {"question": "what is he holding?", "answers": ["a bat", "bat", ...], "kind": "object"}]

``answers`` are those of several annotators, as texts or as VQA's ``{"answer": "bat"}``. ``kind`` groups questions.

The accuracy is that of VQA (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv 1612.00837): the mean over
the annotators of min(1, matches among the others / 3). With ten annotators, 1, 2, 3 and 4 matches are 0.3, 0.6, 0.9
and 1. With up to three, an answer is right if an annotator gave it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import parse_json, require
from pipeline.loaders.mixture import parts_of, read_data
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.shards.objects import FIELD
from pipeline.shards.sample import Sample

FIELDS = (FIELD, "json")
"""The sample fields that can have questions."""
ENOUGH = 3
"""Matches among the other annotators with which an answer is right."""
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question with the answers of one or more annotators."""

    question: str
    answers: tuple[str, ...]
    kind: str = ""


def read_questions(sample: Sample, field: str) -> list[AskedQuestion]:
    """The questions in ``field`` that have a text and an answer; empty without any.

    Raises:
        UnreadableSample: the field is malformed.
    """
    content = sample.fields.get(field)
    if content is None:
        return []
    try:
        listed = parse_json(content.decode()).get("questions") or []
        found = [_question(one) for one in listed]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableSample(f"questions in {sample.key}.{field} are not as described ({error!r})") from error
    return [one for one in found if one.question and one.answers]


def _question(record: Mapping[str, Any]) -> AskedQuestion:
    several = record["answers"] if "answers" in record else [record["answer"]]
    answers = [one["answer"] if isinstance(one, Mapping) else one for one in several]
    if not isinstance(record["question"], str) or not all(isinstance(one, str) for one in answers):
        raise TypeError("a question or an answer that is no text")
    return AskedQuestion(record["question"].strip(), tuple(one for one in answers if one.strip()), _kind(record))


def _kind(record: Mapping[str, Any]) -> str:
    return re.sub(r"\W+", "_", str(record.get("kind") or ""))


def plain_answer(text: str) -> str:
    """An answer as answers are compared: VQA's rules for case, punctuation, articles and numbers.

    Apostrophes are removed, which makes ``dont`` equal to ``don't`` without the official list of contractions.
    """
    text = re.sub(r"['’`]", "", text.lower())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = re.sub(r"[^\w.\s]|_", " ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """0 to 1: how many of the ``annotators`` agree with ``answer``."""
    given = plain_answer(answer)
    same = [plain_answer(one) == given for one in annotators]
    if len(same) <= ENOUGH:
        return float(any(same))
    return sum(min(1.0, (sum(same) - mine) / ENOUGH) for mine in same) / len(same)


def frequent_answers(questions: Iterable[AskedQuestion], most: int) -> tuple[str, ...]:
    """The ``most`` frequent answers, in the form of :func:`plain_answer`; at ties in alphabetical order.

    Each question counts once, with the answer that most annotators gave.
    """
    counts: Counter[str] = Counter()
    for one in questions:
        given = Counter(plain_answer(text) for text in one.answers)
        counts[min(given, key=lambda text: (-given[text], text))] += 1
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    return tuple(text for text in ranked if text)[:most]


def questions_of(data: str, field: str) -> Iterator[AskedQuestion]:
    """All questions of the snapshots that a ``data`` setting names; unreadable samples have none.

    Raises:
        SettingError: a snapshot without the ``field``.
    """
    for part in parts_of(read_data(data)):
        require(field in part.fields, "questions", field, "one of the data's fields: " + ", ".join(part.fields))
        samples = Samples(part, open_shards=2)
        for number in range(len(samples)):
            try:
                yield from read_questions(samples[number], field)
            except UnreadableSample:
                continue
