"""The annotators of the drawn world: mostly right, in several words, the same for every worker."""

from collections import defaultdict

import pytest

from pipeline.errors import SettingError
from pipeline.loaders.questions import answer_accuracy, plain_answer, read_questions
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.sources.drawn import world
from pipeline.sources.drawn.annotators import other_words
from pipeline.sources.drawn.questions import Question
from pipeline.sources.drawn.sample import draw_sample
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.drawn.truth import to_bytes


def test_ten_annotators_mostly_agree() -> None:
    accuracy, given = defaultdict(list), defaultdict(list)
    for index in range(200):
        drawn = draw_sample("val", 0, index, 64, questions=7, annotators=10)
        plain = draw_sample("val", 0, index, 64, questions=7)
        assert drawn.record is not None and plain.record is not None and drawn.image == plain.image
        for one, single in zip(drawn.record["questions"], plain.record["questions"], strict=True):
            assert len(one["answers"]) == 10 and {key: one[key] for key in single} == single
            accuracy[one["kind"]].append(answer_accuracy(one["answer"], one["answers"]))
            right = {plain_answer(text) for text in (one["answer"], *other_words(Question(**single)))}
            wrong = [text for text in one["answers"] if plain_answer(text) not in right]
            given[one["kind"]] += [len(wrong)]
            assert "" not in one["answers"]
    assert len(accuracy) == 7
    for kind, values in accuracy.items():
        assert sum(values) / len(values) > 0.97, kind
        assert 0.05 < sum(given[kind]) / (10 * len(values)) < 0.2, kind
        assert max(given[kind]) >= 3 and min(given[kind]) == 0, kind


def test_they_are_the_same_on_every_worker_and_in_the_sample() -> None:
    source = Drawn(split="val", samples=3, size=64, annotators=10)
    (piece,) = source.slices(5, Folder("."))
    for index, row in enumerate(source.rows(piece)):
        record = draw_sample("val", 0, index, 64, annotators=10).record
        assert record is not None and row.members["boxes.json"] == to_bytes(record)
        asked = read_questions(Sample("0", {"boxes.json": row.members["boxes.json"]}), "boxes.json")
        assert [len(one.answers) for one in asked] == [10] * len(asked)


def test_they_answer_about_rooms_too() -> None:
    source = Drawn(split="val", samples=2, size=64, annotators=10, depth=True)
    (piece,) = source.slices(5, Folder("."))
    for row in source.rows(piece):
        asked = read_questions(Sample("0", {"boxes.json": row.members["boxes.json"]}), "boxes.json")
        assert asked and [len(one.answers) for one in asked] == [10] * len(asked)


def test_one_annotator_changes_no_folder() -> None:
    def digest(**options: int) -> str:
        (piece,) = Drawn(samples=3, size=64, **options).slices(5, Folder("."))
        return piece.digest

    assert digest() == digest(annotators=1) and digest() != digest(annotators=2) != digest(annotators=10)
    for count in (0, 11):
        with pytest.raises(SettingError, match="annotators"):
            digest(annotators=count)


@pytest.mark.parametrize(
    ("kind", "question", "answer", "words"),
    [
        ("count", "how many stars are there?", "two", ("2",)),
        (
            "side",
            "which is further left, the star or the disc?",
            "star",
            ("a star", "the star", *world.noun("star").synonyms),
        ),
        ("presence", "is there a red star?", "no", ("No", "no.")),
        ("colour", "what colour is it?", "red", ("scarlet", "crimson")),
    ],
)
def test_other_words_for_the_same_answer(kind: str, question: str, answer: str, words: tuple[str, ...]) -> None:
    assert other_words(Question(kind, question, answer)) == words
