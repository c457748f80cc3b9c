"""Questions of samples, the plain form of answers, and VQA's accuracy."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.loaders.questions import (
    AnswerList,
    AskedQuestion,
    answer_accuracy,
    frequent_answers,
    plain_answer,
    read_questions,
)
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.sources.drawn.sample import draw_sample
from pipeline.sources.drawn.truth import to_bytes


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Red Car.", "red car"),
        ("a  an the", ""),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("don't", "don't"),
        ("Dont", "don't"),
        ("they\u2019re", "they're"),
        ("it is well", "it is well"),
        ("were", "were"),
        (".5", ".5"),
        ("5:30", "5:30"),
        ("$5", "$5"),
        ("black, white", "black white"),
        ("sign @ 1,000 (feet)", "sign 1000 feet"),
        ("black/white", "black white"),
        ("yes!!", "yes"),
        ("\tyes\n", "yes"),
        ("snow-board", "snow board"),
        ("cant", "can't"),
        ("can", "can"),
        ("aint", "ain't"),
        ("shant", "shan't"),
        ("youd", "you'd"),
        ("whyre", "why're"),
        ("notve", "not've"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("hed've", "he'd've"),
        ("they'dve", "they'd've"),
        ("shed", "shed"),
        ("its", "its"),
        ("we well", "we well"),
        ("a/-b c-d", "b c d"),
        ("été", "été"),
    ],
)
def test_plain_answers(text: str, plain: str) -> None:
    assert plain_answer(text) == plain and plain_answer(plain) == plain


def leave_one_out(answer: str, annotators: list[str]) -> float:
    """The official definition: over all sets of nine of the ten annotators."""
    subsets = list(itertools.combinations(range(10), 9))
    return sum(min(1, sum(annotators[n] == answer for n in subset) / 3) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("agreeing", range(11))
def test_ten_annotators(agreeing: int) -> None:
    annotators = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    found = answer_accuracy("Red", annotators)
    assert found == pytest.approx(leave_one_out("red", annotators))
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, *[1.0] * 7][agreeing])


@pytest.mark.parametrize("seed", range(30))
def test_soft_targets_by_brute_force(seed: int) -> None:
    """Every possible answer against the definition, with ten random annotators of five answers in many spellings."""
    random = np.random.default_rng(seed)
    spelt = {
        "2": ["two", "2", "Two."],
        "red car": ["the red car", "Red car!"],
        "yes": ["yes"],
        "no": ["no"],
        "it": ["it"],
    }
    names = list(spelt)
    plain = [names[n] for n in random.choice(5, 10, p=random.dirichlet(np.ones(5)))]
    asked = AskedQuestion("q", tuple(str(random.choice(spelt[one])) for one in plain))
    possible = ["Yes", "2", "a dog", "red car", "no"]
    wanted = [leave_one_out(plain_answer(one), plain) for one in possible]
    assert AnswerList(possible).targets(asked).tolist() == pytest.approx(wanted)


def test_answers_outside_of_the_possible_ones_have_no_target() -> None:
    targets = AnswerList(["red", "blue"]).targets(AskedQuestion("q", ("green",) * 10))
    assert targets.tolist() == [0, 0] and targets.dtype == np.float32


def test_few_annotators() -> None:
    assert answer_accuracy("two", ["2"]) == 1 and answer_accuracy("two", ["3"]) == 0
    assert answer_accuracy("a dog", ["cat", "dog", "cow"]) == 1


def sample(record: Any, field: str = "json") -> Sample:
    return Sample("7", {field: record if isinstance(record, bytes) else json.dumps(record).encode()})


def test_the_forms_of_answers() -> None:
    listed = [
        {"question": "a?", "answer": "x", "kind": "count of/things"},
        {"question": "b?", "answers": ["x", "y", " "]},
        {"question": "c?", "answers": [{"answer": "x", "answer_id": 1}, {"answer": "z"}]},
        {"question": " ", "answer": "x"},
        {"question": "d?", "answers": []},
        {"question": "d?", "answers": None},
        {"question": "d?", "answer": None},
        {"question": "d?"},
        {"question": "e?", "answers": [], "answer": "x"},
    ]
    assert read_questions(sample({"questions": listed}), "json") == [
        AskedQuestion("a?", ("x",), "count_of_things"),
        AskedQuestion("b?", ("x", "y")),
        AskedQuestion("c?", ("x", "z")),
        AskedQuestion("e?", ("x",)),
    ]
    assert read_questions(sample({}), "json") == [] and read_questions(sample({}), "boxes.json") == []
    assert read_questions(sample({"questions": None}), "json") == []


@pytest.mark.parametrize(
    "record",
    [
        b"{",
        b"[]",
        b"\xff",
        {"questions": 3},
        {"questions": ["what?"]},
        {"questions": [{"answer": "x"}]},
        {"questions": [{"question": "a?", "answers": "red"}]},
        {"questions": [{"question": "a?", "answers": {"answer": "red"}}]},
        {"questions": [{"question": "a?", "answer": 3}]},
        {"questions": [{"question": 3, "answer": "x"}]},
        {"questions": [{"question": "a?", "answers": [3]}]},
        {"questions": [{"question": "a?", "answers": [{"text": "x"}]}]},
    ],
)
def test_malformed_questions(record: Any) -> None:
    with pytest.raises(UnreadableSample, match="questions in 7.json"):
        read_questions(sample(record), "json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_questions_in_other_encodings(encoding: str) -> None:
    content = json.dumps({"questions": [{"question": "été?", "answer": "oui"}]}, ensure_ascii=False).encode(encoding)
    assert read_questions(sample(content), "json") == [AskedQuestion("été?", ("oui",))]


def test_lone_surrogates_are_replaced() -> None:
    """A tokenizer cannot read them."""
    listed = [{"question": "a \ud800?", "answers": ["\udfff", "red"], "kind": "\ud800"}]
    (found,) = read_questions(sample({"questions": listed}), "json")
    assert found == AskedQuestion("a ??", ("?", "red"), "_")
    assert len(SpanTokenizer.load("drawn-questions")(found.question, 20).ids) > 2


def test_the_drawn_world_asks() -> None:
    drawn = draw_sample("val", 0, 3, 64)
    assert drawn.record is not None
    found = read_questions(sample(to_bytes(drawn.record), "boxes.json"), "boxes.json")
    assert [one.question for one in found] == [one["question"] for one in drawn.record["questions"]]
    assert len(found) == 4 and all(one.kind and len(one.answers) == 1 for one in found)


def test_frequent_answers_count_each_question_once() -> None:
    asked = [
        AskedQuestion("a?", ("Two", "2", "three")),
        AskedQuestion("b?", ("two",)),
        AskedQuestion("c?", ("a dog",) * 10),
        AskedQuestion("d?", ("cat",)),
        AskedQuestion("e?", ("the",)),
    ]
    assert frequent_answers(asked, 10) == ("2", "cat", "dog")
    assert frequent_answers(asked, 1) == ("2",)
    assert frequent_answers(asked, 10, least=2) == ("2",) and frequent_answers(asked, 10, least=3) == ()
