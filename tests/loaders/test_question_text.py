"""Texts of questions and of pre-training in a batch."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.loaders.batches import SamplePosition
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.loaders.question_text import PretrainingTextReader, QuestionReader, partner
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample

TOKENIZER = SpanTokenizer.load("drawn-questions")
ASKED: list[dict[str, Any]] = [
    {"question": "what colour is the star?", "answers": ["red"] * 2 + ["blue"] * 8},
    {"question": "how many stars are there?", "answer": "two"},
    {"question": "is there a red star?", "answer": "maybe"},
]


def sample(questions: list[dict[str, Any]] | None = None, captions: list[str] | None = None, key: str = "7") -> Sample:
    fields = {
        "questions.json": json.dumps({"questions": ASKED if questions is None else questions}).encode(),
        "json": json.dumps({"captions": captions or []}).encode(),
    }
    return Sample(key, fields)


def reader(**changes: Any) -> QuestionReader:
    settings: dict[str, Any] = {"tokenizer": TOKENIZER, "most": 20, "questions": "questions.json"}
    return QuestionReader(**{**settings, "answers": ("red", "blue", "2"), **changes})


def test_evaluation_reads_the_first_question_and_training_all_in_turn() -> None:
    first = reader().read(sample())
    assert TOKENIZER.decode(first["tokens"]) == "what colour is the star?"
    assert first["answers"].tolist() == pytest.approx([0.6, 1, 0])
    seen = [TOKENIZER.decode(reader().read(sample(), SamplePosition(epoch, 0))["tokens"]) for epoch in range(40)]
    assert len(set(seen)) == 3 and min(seen.count(one) for one in set(seen)) >= 5


def test_questions_without_a_possible_answer() -> None:
    """Soft targets of zero, or left out where one answer has to be right."""
    others = [{"question": "is there a red star?", "answer": "maybe"}]
    assert reader().read(sample(others))["answers"].tolist() == [0, 0, 0]
    known = reader(known=True)
    seen = [TOKENIZER.decode(known.read(sample(), SamplePosition(epoch, 0))["tokens"]) for epoch in range(40)]
    assert "is there a red star?" not in seen and len(set(seen)) == 2
    for some in (others, []):
        with pytest.raises(UnreadableSample, match="7 has no question that can be used"):
            known.read(sample(some))


def test_batches_are_padded() -> None:
    rows = [reader().read(sample()), reader(most=4).read(sample())]
    batch = reader().collate(rows)
    assert batch["tokens"].shape == (2, 8) and batch["token_mask"].sum(dim=1).tolist() == [8, 4]
    assert batch["answers"].shape == (2, 3)


def pretraining(**changes: Any) -> PretrainingTextReader:
    settings: dict[str, Any] = {"tokenizer": TOKENIZER, "most": 20, "caption": "json:captions"}
    settings |= {"questions": "questions.json", "answers": ("red", "blue", "2")}
    return PretrainingTextReader(**{**settings, **changes})


def test_captions_and_questions_are_read_alike_often() -> None:
    one = sample(captions=["a red star.", "two discs."])
    seen = [pretraining().read(one, SamplePosition(epoch, 0))["text"] for epoch in range(200)]
    assert len(set(seen)) == 5 and min(seen.count(text) for text in set(seen)) > 20
    alone = pretraining(questions="", answers=())
    assert alone.fields == ("json",) and pretraining().fields == ("json", "questions.json")
    assert {alone.read(one, SamplePosition(epoch, 0))["text"] for epoch in range(20)} == {"a red star.", "two discs."}


def test_half_an_emoji_is_a_question_mark() -> None:
    one = pretraining(questions="", answers=()).read(sample(captions=["a \ud83d star."]))
    assert one["text"] == "a ? star."


def test_half_of_the_rows_get_their_neighbours_text() -> None:
    rows = [
        pretraining(questions="", answers=()).read(
            sample(captions=[f"{'very ' * (number % 7)}red star number {number}"]), SamplePosition(0, number)
        )
        for number in range(401)
    ]
    batch = pretraining(questions="", answers=()).collate(rows)
    matched = batch["matched"].bool()
    assert 0.4 < float(matched.float().mean()) < 0.6 and matched[-1]
    masked = batch["masked_tokens"] >= 0
    chance = float(masked.sum()) / float((batch["token_mask"].sum(dim=1) - 2).sum())
    assert chance == pytest.approx(0.15, abs=0.02)
    for number, row in enumerate(rows):
        source = row if matched[number] else rows[partner(number, len(rows))]
        length = len(source["tokens"])
        whole = batch["tokens"][number, :length].clone()
        places = batch["masked_at"][number][masked[number]]
        whole[places] = batch["masked_tokens"][number][masked[number]]
        assert whole.tolist() == TOKENIZER(source["text"], 20).ids.tolist()
        assert 0 not in places and length - 1 not in places


def test_equal_texts_match_wherever_they_are() -> None:
    settings = pretraining(questions="", answers=(), mismatched=1.0)
    rows = [settings.read(sample(captions=["a star."]), SamplePosition(0, number)) for number in range(4)]
    assert settings.collate(rows)["matched"].tolist() == [1, 1, 1, 1]


def test_answers_count_for_questions_about_the_own_image() -> None:
    settings = pretraining(mismatched=1.0)
    other = [{**ASKED[0], "answers": ["blue"] * 2 + ["red"] * 8}]
    rows = [
        settings.read(sample(asked, [], key), SamplePosition(0, n))
        for n, (key, asked) in enumerate((("a", ASKED[:1]), ("b", other)))
    ]
    rows += [settings.read(sample([], ["a disc."], "c"), SamplePosition(0, 2))]
    rows += [settings.read(sample(ASKED[2:], [], "d"), SamplePosition(0, 3))]
    batch = settings.collate(rows)
    assert batch["asked"].tolist() == [True, True, False, False]
    assert batch["matched"].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(batch["answers"][:2], [[0.6, 1, 0], [1, 0.6, 0]], rtol=1e-6)
    assert not settings.read(sample(ASKED[:1], []), None)["masked_tokens"].numel()  # evaluation masks nothing
    assert batch["asked"].dtype == torch.bool


def test_a_sample_without_a_text_is_unreadable() -> None:
    with pytest.raises(UnreadableSample):
        pretraining(questions="", answers=()).read(sample(captions=[" "]))
    with pytest.raises(UnreadableSample):
        pretraining().read(sample([], [" "]))
