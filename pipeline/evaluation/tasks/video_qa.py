"""Questions about videos with several candidate answers, one of which is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.data import Data, evaluation_batches
from pipeline.evaluation.encoder import encode_tokens, inference
from pipeline.evaluation.media import (
    AUTO,
    TEXT,
    check_medium,
    encode_inputs,
    inputs_of,
    medium_of_set,
    medium_reader,
    paired_media,
    require_text,
)
from pipeline.evaluation.task import SAMPLES, Cache, Column, PreparedSet, Reading, Report, Task, option
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.samples import UnreadableSample, json_of_sample
from pipeline.shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a set."""

    choices: str = option("choices", "video_qa_choices", "Key of the samples' json with the candidate texts, a list.")
    answer: str = option(
        "answer", "video_qa_answer", "Key of the samples' json with the number of the right one, from 0."
    )
    medium: str = option(AUTO)
    """Medium that the questions are about: auto (the first that model and data have), or its name."""

    def __post_init__(self) -> None:
        check_medium(self.medium)
        for name in ("choices", "answer"):
            require(bool(getattr(self, name)), f"video_qa_{name}", getattr(self, name), "a key of the samples' json")


@dataclass(frozen=True, kw_only=True)
class ChoicesReader:
    """``choices``: the candidate texts of each sample, a list of lists; ``answer``: int64 [B], the right ones."""

    choices: str = "choices"
    answer: str = "answer"
    fields = ("json",)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The candidates of one sample; raises ``UnreadableSample`` without two texts, or without a right one."""
        record = json_of_sample(sample)
        texts, answer = record.get(self.choices), record.get(self.answer)
        if (
            not isinstance(texts, list)
            or len(texts) < 2
            or not all(isinstance(one, str) and one.strip() for one in texts)
        ):
            raise UnreadableSample(f"{sample.key}.json has no list of two texts or more in {self.choices}")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
            raise UnreadableSample(f"{sample.key}.json has no number of a candidate in {self.answer}")
        return {"choices": texts, "answer": answer}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Both keys."""
        return {"choices": [row["choices"] for row in rows], "answer": torch.tensor([row["answer"] for row in rows])}


class VideoQa(Task):
    """The accuracy of the candidate that is most similar to the video; ``ready`` are the options.

    As VideoCLIP's VideoQA by multiple choice (Xu et al., 2021, arXiv 2109.14084, section 5.2): candidates are answers
    written as statements, so the question itself is not read.
    """

    report = Report("videoqa", "questions with several answers", (Column("accuracy"), Column("chance"), SAMPLES))
    help = "Sets of videos with candidate answers in their json; see --zero-shot."
    rank = 5
    options = Config

    def check(self, model: object, one: PreparedSet) -> None:
        """Require a model that compares texts with a medium of the set."""
        if not paired_media(model):
            require_text(model)
            medium_of_set(model, one, one.ready.medium)

    def prepare(self, config: Config, data: Data, name: str) -> Config:
        """The options."""
        return config

    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """Accuracy, and the expected accuracy of a random choice."""
        paired = paired_media(model)
        medium = paired[0] if paired else medium_of_set(model, one, one.ready.medium)
        questions = ChoicesReader(choices=one.ready.choices, answer=one.ready.answer)
        readers = (medium_reader(model, medium), questions)
        right = samples = chance = 0.0
        samples_of_set = one.samples(readers=readers)
        for batch in evaluation_batches(samples_of_set, readers, reading.evaluation_batch, reading.evaluation_threads):
            with inference(model, reading.evaluation_precision) as device:
                scores = choice_scores(model, medium, batch, batch["choices"], device)
            right += float(answered(scores, batch["choices"], batch["answer"]).sum())
            chance += sum(1 / len(texts) for texts in batch["choices"])
            samples += len(batch["choices"])
        return {"accuracy": right / samples, "chance": chance / samples, "samples": samples}


def answered(scores: Tensor, choices: Sequence[Sequence[str]], answers: Tensor) -> Tensor:
    """Whether the right candidate of each row is more similar than every other text: bool [B].

    ``scores`` are those of :func:`choice_scores`, ``answers`` int64 [B]. An equal score of another text is an error, so
    the place of the right candidate in its list does not matter; a candidate with the same text is right, too.
    """
    found = []
    for row, texts, answer in zip(scores.tolist(), choices, answers.tolist(), strict=True):
        others = [score for score, text in zip(row, texts, strict=False) if text != texts[answer]]
        found.append(all(score < row[answer] for score in others))
    return torch.tensor(found)


def choice_scores(
    model: Any, medium: str, batch: dict[str, Any], choices: Sequence[Sequence[str]], device: torch.device
) -> Tensor:
    """The similarity of each row of a batch and each of its candidates, float32 [B, K] on the CPU.

    K is the largest number of candidates of a row; the rest of a row is minus infinity.
    """
    counts = torch.tensor([len(texts) for texts in choices])
    tokens = model.tokenizer([text for texts in choices for text in texts])
    if paired_media(model):
        features = model.pair_features(medium, *inputs_of(batch, medium, device))
        every = model.pair_scores(features, model.pair_features(TEXT, tokens.to(device)))
    else:
        every = encode_inputs(model, medium, batch, device) @ encode_tokens(model, tokens, device).T
    scores = torch.full((len(choices), int(counts.max())), -torch.inf)
    starts = (counts.cumsum(0) - counts).tolist()
    for row, (start, count) in enumerate(zip(starts, counts.tolist(), strict=True)):
        scores[row, :count] = every[row, start : start + count].float().cpu()
    return scores
