"""Answers to questions about images, with VQA's accuracy."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import require
from pipeline.evaluation.data import Data, SnapshotData, evaluation_batches
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.figures import attention_grid, image_grid
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.questions import FIELDS, AskedQuestion, answer_accuracy, frequent_answers, read_questions
from pipeline.loaders.readers import ImageReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_AT_ONCE, SHOWN = 16, 8
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    questions: str = option(
        AUTO,
        "vqa_questions",
        "Sample field with the questions: questions.json, boxes.json or json; auto takes the first of these that has "
        "some.",
    )

    def __post_init__(self) -> None:
        known = (AUTO, *FIELDS)
        require(self.questions in known, "vqa_questions", self.questions, "one of " + ", ".join(known))


@dataclass(frozen=True, kw_only=True)
class QuestionsReader:
    """``asked``: the questions of each sample, one or more, with their answers; of its first field that has some."""

    questions: tuple[str, ...]
    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The questions; raises ``UnreadableSample`` without any."""
        for field in self.questions:
            found = read_questions(sample, field)
            if found:
                return {"asked": found}
        raise UnreadableSample(f"{sample.key} has no question in {' or '.join(self.questions)}")

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list of lists."""
        return {"asked": [row["asked"] for row in rows]}


class Vqa(Task):
    """The mean accuracy over questions; ``ready`` are the fields of the questions."""

    report = Report(
        "vqa",
        "visual question answering",
        (
            Column("accuracy"),
            Column("constant", "one answer"),
            Column("constant_by_kind", "one of each kind"),
            Column("questions", format=",.0f"),
            SAMPLES,
        ),
    )
    help = "Sets with questions for a model that answers them; see --zero-shot."
    rank = 5
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a model that answers questions."""
        answers = callable(getattr(model, "answer", None)) and getattr(model, "answering", None) is not None
        require(
            answers,
            "checkpoint",
            type(model).__name__,
            "a model that answers questions (jobs/train_clipvil.py, jobs/finetune_glipv2.py)",
        )

    def prepare(self, config: Config, data: Data, name: str) -> tuple[str, ...]:
        """The fields of the questions, one of which a snapshot has to have."""
        wanted = FIELDS if config.questions == AUTO else (config.questions,)
        if not isinstance(data, SnapshotData):
            return wanted
        fields = data.snapshot.fields
        require(not set(wanted).isdisjoint(fields), "vqa_questions", config.questions, "one of " + ", ".join(fields))
        return tuple(field for field in wanted if field in fields)

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """``accuracy``, ``accuracy_<kind>`` of each kind of questions, ``constant``, that of the most frequent answer,
        and ``constant_by_kind``, the mean over questions where each kind has its own most frequent answer."""
        readers = (ImageReader(transform=None), QuestionsReader(questions=one.ready))
        size = min(reading.evaluation_batch, IMAGES_AT_ONCE)
        asked: list[AskedQuestion] = []
        given: list[str] = []
        images = 0
        for batch in evaluation_batches(one.samples(), readers, size, reading.evaluation_threads):
            with inference(model, reading.evaluation_precision):
                answers = model.answer(batch["image"], [[item.question for item in some] for some in batch["asked"]])
            images += len(answers)
            asked += [item for some in batch["asked"] for item in some]
            given += [text for some in answers for text in some]
        return {**question_metrics(asked, given), "questions": float(len(asked)), "samples": float(images)}

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """``answers``: the first eight images that have a question, with the answer and an annotator's answer; of a
        model that reads images as cells also ``attention`` to them."""
        readers = (ImageReader(transform=None), QuestionsReader(questions=one.ready))
        batch = next(evaluation_batches(one.samples(), readers, SHOWN, threads=2))
        first = [some[0] for some in batch["asked"]]
        with inference(model):
            answers = model.answer(batch["image"], [[item.question] for item in first])
        texts = [
            f"{item.question} {answer} ({item.answers[0]})" for item, (answer,) in zip(first, answers, strict=True)
        ]
        named = f"{one.name} {title}".strip()
        found = {"answers": image_grid(batch["image"], texts, columns=4, title=f"{named}: answers (annotated)")}
        if callable(getattr(model, "attention", None)):
            with inference(model):
                seen = model.attention(batch["image"], [item.question for item in first])
            found["attention"] = attention_grid(batch["image"], seen, texts, title=f"{named}: attention to cells")
        return found


def question_metrics(asked: list[AskedQuestion], given: list[str]) -> dict[str, float]:
    """The accuracies of :meth:`Vqa.run`, 0 to 1."""
    right = [answer_accuracy(text, one.answers) for text, one in zip(given, asked, strict=True)]
    by_kind: dict[str, list[AskedQuestion]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    for one, value in zip(asked, right, strict=True):
        by_kind[one.kind].append(one)
        if one.kind:
            kinds[f"accuracy_{one.kind}"].append(value)
    found = {
        "accuracy": _mean(right),
        "constant": _mean(_constant(asked)),
        "constant_by_kind": _mean([value for some in by_kind.values() for value in _constant(some)]),
    }
    return found | {name: _mean(values) for name, values in sorted(kinds.items())}


def _constant(asked: list[AskedQuestion]) -> list[float]:
    """The accuracy of their most frequent answer for each question."""
    (most,) = frequent_answers(asked, 1) or ("",)
    return [answer_accuracy(most, one.answers) for one in asked]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
