"""The text side of answering questions: a question with its soft targets, or a text that a model is pre-trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.detection import padded
from pipeline.loaders.grounding import padded_tokens
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.loaders.masking import mask_tokens
from pipeline.loaders.order import RandomStream, random_bits, uniform
from pipeline.loaders.questions import AnswerList, AskedQuestion, chosen_question, read_questions
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import caption_field, read_texts
from pipeline.shards.sample import Sample
from pipeline.shards.text import storable


@dataclass(frozen=True, kw_only=True)
class QuestionReader:
    """One of the questions of each sample, a random one in training.

    tokens      int64 [B, M] and token_mask bool [B, M], start and end included, padded
    answers     float32 [B, A], the accuracy of each possible answer

    With ``known`` only questions with one of the possible ``answers`` are read; without it the targets of others are
    zeros. A sample without such a question is unreadable.
    """

    tokenizer: SpanTokenizer
    most: int
    questions: str
    answers: tuple[str, ...]
    known: bool = False
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The field with the questions."""
        return (self.questions,)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Raises :class:`UnreadableSample`."""
        asked = read_questions(sample, self.questions)
        if self.known:
            asked = [one for one in asked if self._possible.targets(one).any()]
        question = chosen_question(sample, asked, self.seed, at)
        tokens = self.tokenizer(question.question, self.most).ids
        return {"tokens": tokens, "answers": self._possible.targets(question)}

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        tokens, mask = padded_tokens([row["tokens"] for row in rows], self.tokenizer.pad)
        answers = torch.from_numpy(np.stack([row["answers"] for row in rows]))
        return {"tokens": tokens, "token_mask": mask, "answers": answers}

    @cached_property
    def _possible(self) -> AnswerList:
        return AnswerList(self.answers)


@dataclass(frozen=True, kw_only=True)
class PretrainingTextReader:
    """A caption or a question of each sample, all with equal probability, for LXMERT's pre-training (arXiv 1908.07490).

    tokens, token_mask   as above; a part of the tokens is masked
    masked_at            int64 [B, K], the tokens to be predicted, padded with 0
    masked_tokens        int64 [B, K], what they were, padded with -100
    matched              int64 [B], 0 where the text is that of another image
    answers              float32 [B, A], the accuracy of each possible answer
    asked                bool [B]: the text is a question about its own image, and has a possible answer

    With the probability ``mismatched`` a row gets the text of its neighbour in the batch, rows 2i and 2i + 1 being
    neighbours; where both have the same text, the row keeps its own.
    """

    tokenizer: SpanTokenizer
    most: int
    caption: str
    questions: str = ""
    answers: tuple[str, ...] = ()
    share: float = 0.15
    mismatched: float = 0.5
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The fields with captions and questions."""
        return tuple(dict.fromkeys([caption_field(self.caption), *([self.questions] if self.questions else [])]))

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """Raises :class:`UnreadableSample` for a sample without a text."""
        chosen = chosen_question(sample, self._texts(sample), self.seed, at)
        whole = self.tokenizer(chosen.question, self.most).ids
        ids, positions, swaps = whole, np.zeros(0, np.int64), False
        if at is not None:
            bits = random_bits(self.seed, RandomStream.MASKED_TOKENS, *at, 3 * len(whole)).reshape(3, -1)
            allowed = (whole != self.tokenizer.start) & (whole != self.tokenizer.end)
            assert self.tokenizer.mask is not None
            vocabulary = self.tokenizer.vocab_size
            ids, positions = mask_tokens(whole, allowed, bits, self.share, self.tokenizer.mask, vocabulary)
            drawn = random_bits(self.seed, RandomStream.MATCHED_TEXTS, *at, 1)
            swaps = bool(uniform(drawn)[0] < self.mismatched)
        return {
            "text": chosen.question,
            "tokens": ids,
            "masked_at": torch.from_numpy(positions),
            "masked_tokens": torch.from_numpy(whole[positions]),
            "answers": self._possible.targets(chosen) if chosen.answers else np.zeros(len(self.answers), np.float32),
            "swaps": swaps,
        }

    def _texts(self, sample: Sample) -> list[AskedQuestion]:
        """Captions, without answers, and questions; a sample may lack one of the two."""
        asked = read_questions(sample, self.questions) if self.questions else []
        try:
            captions = [storable(text) for text in read_texts(sample, self.caption) if text.strip()]
        except UnreadableSample:
            if not asked:
                raise
            captions = []
        return [*(AskedQuestion(text, ()) for text in captions), *asked]

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        neighbours = [rows[partner(number, len(rows))] for number in range(len(rows))]
        # An equal text stays the own one, since its answers are those of the own image.
        matched = np.array(
            [not row["swaps"] or row["text"] == other["text"] for row, other in zip(rows, neighbours, strict=True)]
        )
        texts = [row if own else other for row, other, own in zip(rows, neighbours, matched, strict=True)]
        tokens, mask = padded_tokens([one["tokens"] for one in texts], self.tokenizer.pad)
        answers = np.stack([one["answers"] for one in texts])
        return {
            "tokens": tokens,
            "token_mask": mask,
            "masked_at": padded([one["masked_at"] for one in texts], 0),
            "masked_tokens": padded([one["masked_tokens"] for one in texts], -100),
            "matched": torch.from_numpy(matched.astype(np.int64)),
            "answers": torch.from_numpy(answers),
            "asked": torch.from_numpy(matched & answers.any(axis=1)),
        }

    @cached_property
    def _possible(self) -> AnswerList:
        return AnswerList(self.answers)


def partner(row: int, rows: int) -> int:
    """The neighbour of a row of a batch; the last row of an odd batch is its own."""
    other = row ^ 1
    return other if other < rows else row
