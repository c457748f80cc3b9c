"""Questions about images, and the accuracy of an answer.

A sample has its questions in ``questions.json``, ``boxes.json`` or ``json``, under the key ``questions``:

    [{"question": "what colour is the star?", "answer": "red"},
     {"question": "what is he holding?", "answers": ["a bat", "bat", ...], "kind": "object"}]

``answers`` are those of several annotators, as texts or as VQA's ``{"answer": "bat"}``. ``kind`` groups questions. A
question without an answer is left out; values of other types make the sample unreadable.

The accuracy is that of VQA (Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv 1612.00837): the mean over
the annotators of min(1, matches among the others / 3). With ten annotators, 1, 2, 3 and 4 matches are 0.3, 0.6, 0.9
and 1. With up to three, an answer is right if an annotator gave it. The accuracies of all possible answers are the soft
targets of training (Teney et al. 2017, arXiv 1708.02711).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import parse_json, require
from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.mixture import TrainingData, parts_of
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.samples import Samples, UnreadableSample
from pipeline.shards.objects import FIELD
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.sample import Sample
from pipeline.shards.text import decoded, storable

FIELDS = (QUESTIONS, FIELD, "json")
"""The sample fields that can have questions; where one has to be chosen, in this order."""
ENOUGH = 3
"""Matches among the other annotators with which an answer is right."""
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""The marks that VQA removes; others, such as ``:`` of a time or ``$``, are part of an answer."""
_NEGATED = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_SHORTENED = {
    "'ve": "could might must not should they we what where who would you",
    "'s": "he how somebody someone that there what when where who why",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
}
"""Words before an ending, as in VQA's table: without ``well``, ``shed``, ``its`` and others of two meanings."""
_WITH_TWO = {
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
_CONTRACTIONS = {
    **{f"{word}nt": f"{word}n't" for word in _NEGATED.split()},
    **{word + end[1:]: word + end for end, words in _SHORTENED.items() for word in words.split()},
    **{
        word + lacking: word + end
        for end, words in _WITH_TWO.items()
        for word in words.split()
        for lacking in (end.replace("'", "", 1), end[:-3] + "ve")
    },
    **{"maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas"},
}
"""Contractions without an apostrophe, and with it."""


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
        found = [_question(one) for one in parse_json(decoded(content)).get("questions") or []]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableSample(f"questions in {sample.key}.{field} are not as described ({error!r})") from error
    return [one for one in found if one.question and one.answers]


def _question(record: Mapping[str, Any]) -> AskedQuestion:
    """One question, without answers if it has none; raises ``TypeError`` for values of other types."""
    given = _listed(record.get("answers")) or [record.get("answer")]
    texts = [one["answer"] if isinstance(one, Mapping) else one for one in given if one is not None]
    if not all(isinstance(one, str) for one in (record["question"], *texts)):
        raise TypeError("a question or an answer that is no text")
    return AskedQuestion(storable(record["question"]).strip(), _answers(texts), _kind(record))


def _listed(answers: Any) -> list[Any]:
    if not isinstance(answers, list | None):
        raise TypeError("answers that are no list")
    return answers or []


def _answers(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for text in map(storable, texts) if text.strip())


def _kind(record: Mapping[str, Any]) -> str:
    return re.sub(r"\W+", "_", storable(str(record.get("kind") or "")))


def plain_answer(text: str) -> str:
    """An answer as answers are compared: VQA's rules for case, punctuation, numbers, articles and contractions.

    A mark becomes a space; in a text where it is beside a space, or where a comma is inside of a number, it is removed.
    Full stops go, but for those before a digit.
    """
    whole = text = " ".join(text.lower().replace("\u2019", "'").split())
    grouped = re.search(r"\d,\d", whole) is not None
    for mark in _PUNCTUATION:
        beside = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside or grouped else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """0 to 1: how many of the ``annotators`` agree with ``answer``."""
    given = plain_answer(answer)
    same = [plain_answer(one) == given for one in annotators]
    if len(same) <= ENOUGH:
        return float(any(same))
    return sum(min(1.0, (sum(same) - mine) / ENOUGH) for mine in same) / len(same)


def check_answers(answers: Sequence[str]) -> None:
    """Raise ``SettingError`` for possible answers that are equal, or empty, in their plain form."""
    plain = {text: plain_answer(text) for text in answers}
    counts = Counter(plain[text] for text in answers)
    same = next((text for text in answers if not plain[text] or counts[plain[text]] > 1), None)
    require(same is None, "answers", same, "answers that differ in their plain form, by VQA's rules, and have one")


class AnswerList:
    """The possible answers of a model, which are compared in their plain form."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self._numbers: dict[str, list[int]] = {}
        for number, text in enumerate(self.answers):
            self._numbers.setdefault(plain_answer(text), []).append(number)

    def targets(self, question: AskedQuestion) -> NDArray[np.float32]:
        """Float32 [A]: the accuracy of each answer, 0 to 1; zeros where none of the annotators' answers is possible."""
        found = np.zeros(len(self.answers), np.float32)
        for text in {plain_answer(one) for one in question.answers}:
            found[self._numbers.get(text, [])] = answer_accuracy(text, question.answers)
        return found


def chosen_question(
    sample: Sample, questions: Sequence[AskedQuestion], seed: int, at: SamplePosition | None
) -> AskedQuestion:
    """The question that is read: in evaluation the first one, in training a random one in each epoch.

    Raises:
        UnreadableSample: there is none.
    """
    if not questions:
        raise UnreadableSample(f"{sample.key} has no question that can be used")
    number = 0 if at is None else int(random_bits(seed, RandomStream.TEXTS, *at, 1)[0] % len(questions))
    return questions[number]


def frequent_answers(questions: Iterable[AskedQuestion], most: int, least: int = 1) -> tuple[str, ...]:
    """The ``most`` frequent answers, each to ``least`` questions or more, in the form of :func:`plain_answer`.

    At ties they are in alphabetical order. Each question counts once, with the answer that most annotators gave.
    """
    counts: Counter[str] = Counter()
    for one in questions:
        given = Counter(plain_answer(text) for text in one.answers)
        counts[min(given, key=lambda text: (-given[text], text))] += 1
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    return tuple(text for text in ranked if text and counts[text] >= least)[:most]


def questions_of(data: TrainingData, field: str) -> Iterator[AskedQuestion]:
    """All questions of the data; unreadable samples have none.

    Raises:
        SettingError: a snapshot without the ``field``.
    """
    for part in parts_of(data):
        require(field in part.fields, "questions", field, "one of the data's fields: " + ", ".join(part.fields))
        samples = Samples(part, open_shards=2)
        for number in range(len(samples)):
            try:
                yield from read_questions(samples[number], field)
            except UnreadableSample:
                continue
