"""The evaluations of captions and of questions: counts, columns, settings, and models that cannot do it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.evaluation.task import tasks
from pipeline.loaders.grid import CellAttention
from pipeline.loaders.questions import AskedQuestion
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from tests.grounded import jpeg, publish

CAPTIONS = ("a red star", "two blue discs", "three green keys on a wall")


class Speaker:
    """Knows the images by their brightness; answers a question with its last word."""

    language = answering = True

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.seen = wrong, 0

    def describe(self, images: list[Tensor]) -> list[str]:
        found = [CAPTIONS[(self.seen + number) % 3] for number in range(len(images))]
        self.seen += len(images)
        return ["nothing at all" if number < self.wrong else text for number, text in enumerate(found)]

    def answer(self, images: list[Tensor], questions: list[list[str]]) -> list[list[str]]:
        assert all(image.dtype == torch.uint8 for image in images)
        return [[text.rstrip("?").split()[-1] for text in some] for some in questions]


def samples() -> list[Sample]:
    questions = [
        [{"question": "is it red?", "answers": ["red"] * 8 + ["blue"] * 2, "kind": "colour"}],
        [
            {"question": "is it red?", "answers": ["red", *["blue"] * 9], "kind": "colour"},
            {"question": "how many, two?", "answer": "2", "kind": "count"},
        ],
        [],
    ]
    return [
        Sample(
            str(number),
            {"jpg": jpeg(seed=number), "txt": text.encode(), "json": json.dumps({"questions": some}).encode()},
        )
        for number, (text, some) in enumerate(zip(CAPTIONS, questions, strict=True))
    ]


@pytest.fixture
def data(tmp_path: Path) -> Snapshot:
    return publish(tmp_path / "data", samples())


def test_captions(data: Snapshot) -> None:
    prepared = Evaluations(captioning=(f"it={data.folder}",)).prepare()
    found = evaluate(Speaker(), prepared)
    assert found["captioning/it/bleu1"] == 1 and found["captioning/it/samples"] == 3
    assert found["captioning/it/cider"] > 5
    assert evaluate(Speaker(wrong=2), prepared)["captioning/it/cider"] < found["captioning/it/cider"] / 2
    columns = {column.name for column in tasks()["captioning"].report.columns}
    assert columns == {name.rpartition("/")[2] for name in found}


def test_questions(data: Snapshot) -> None:
    """1 and 0.3 for the colours, 1 for the number; the most frequent answer is blue or red, each of one question."""
    prepared = Evaluations(vqa=(f"it={data.folder},questions=json",)).prepare()
    found = evaluate(Speaker(), prepared)
    assert found["vqa/it/accuracy"] == pytest.approx(2.3 / 3) and found["vqa/it/questions"] == 3
    assert found["vqa/it/accuracy_colour"] == pytest.approx(1.3 / 2) and found["vqa/it/accuracy_count"] == 1
    assert found["vqa/it/samples"] == 2, "one image has no question"
    assert found["vqa/it/constant"] == pytest.approx(1 / 3), "of equally frequent ones the first: 2"
    assert found["vqa/it/constant_by_kind"] == pytest.approx((0.6 + 1 + 1) / 3), "blue, and 2"


def test_constant_answers_count_with_the_accuracy() -> None:
    from pipeline.evaluation.tasks.vqa import question_metrics

    asked = [
        AskedQuestion("a?", ("red",) * 10),
        AskedQuestion("b?", ("red",) * 9 + ("blue",)),
        AskedQuestion("c?", ("x",)),
    ]
    found = question_metrics(asked, ["red", "blue", "y"])
    constant = pytest.approx(2 / 3)
    assert found == {"accuracy": pytest.approx(1.3 / 3), "constant": constant, "constant_by_kind": constant}


def test_figures(data: Snapshot) -> None:
    for kind, text, name in (("captioning", "", "captions"), ("vqa", ",questions=json", "answers")):
        prepared = Evaluations(**{kind: (f"it={data.folder}{text}",)}).prepare()
        figures = tasks()[kind].figures(Speaker(), prepared.sets[0], "step 3")
        assert set(figures) == {name}


@pytest.mark.parametrize("kind", ["captioning", "vqa"])
def test_models_that_cannot_and_settings_that_are_wrong(kind: str, data: Snapshot) -> None:
    options: dict[str, Any] = {kind: (f"it={data.folder},questions=json" if kind == "vqa" else f"it={data.folder}",)}
    with pytest.raises(SettingError, match="checkpoint.*finetune_glipv2"):
        evaluate(object(), Evaluations(**options).prepare())
    with pytest.raises(SettingError, match="caption" if kind == "captioning" else "vqa_questions"):
        Evaluations(**{kind: (f"it={data.folder},{'caption' if kind == 'captioning' else 'questions'}=mp4",)}).prepare()


def test_questions_need_a_field_that_the_data_have(data: Snapshot) -> None:
    with pytest.raises(SettingError, match="vqa_questions.*boxes.json"):
        Evaluations(vqa=(f"{data.folder},questions=boxes.json",)).prepare()


def test_the_field_of_the_questions_is_found(data: Snapshot, tmp_path: Path) -> None:
    """In json; and in questions.json before json, where boxes.json has none."""
    assert evaluate(Speaker(), Evaluations(vqa=(f"it={data.folder}",)).prepare())["vqa/it/questions"] == 3
    asked = json.dumps({"questions": [{"question": "is it red?", "answer": "red"}]}).encode()
    more = [
        Sample(one.key, {**one.fields, "boxes.json": b"{}", **({"questions.json": asked} if one.key == "0" else {})})
        for one in samples()
    ]
    snapshot = publish(tmp_path / "more", more)
    found = evaluate(Speaker(), Evaluations(vqa=(f"it={snapshot.folder}",)).prepare())
    assert found["vqa/it/questions"] == 3 and found["vqa/it/accuracy"] == pytest.approx((1 + 0.3 + 1) / 3)
    assert "vqa/it/accuracy_colour" in found


def test_figures_of_answers_and_of_where_a_model_looks(data: Snapshot) -> None:
    """The attention is drawn for models that have it."""

    class Looker(Speaker):
        def attention(self, images: list[Tensor], questions: list[str]) -> list[CellAttention]:
            assert len(images) == len(questions)
            return [CellAttention(torch.rand(2, 3) / 6, (20.0, 30.0)) for _ in images]

    sets = Evaluations(vqa=(f"own={data.folder},questions=json",)).prepare()
    (one,) = sets.sets
    task = tasks()["vqa"]
    assert set(task.figures(Speaker(), one, "")) == {"answers"}
    found = task.figures(Looker(), one, "step 3")
    assert set(found) == {"answers", "attention"}
    axes = [axis for axis in found["attention"].axes if axis.images]
    assert [len(axis.images) for axis in axes] == [1, 2] * 2  # the third image has no question
    assert all(tuple(axis.images[-1].get_extent()) == (-0.5, 89.5, 39.5, -0.5) for axis in axes[1::2])


def test_figures_show_images_that_have_a_question(tmp_path: Path) -> None:
    """Here the first eight have none."""
    silent = [Sample(f"{n:02}", {"jpg": jpeg(seed=n), "json": b'{"questions": []}'}) for n in range(9)]
    data = publish(tmp_path / "later", [*silent, Sample("9", samples()[0].fields)])
    (one,) = Evaluations(vqa=(f"own={data.folder},questions=json",)).prepare().sets
    assert set(tasks()["vqa"].figures(Speaker(), one, "")) == {"answers"}
