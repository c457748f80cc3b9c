"""The reader of clip pairs: several pairs of a text and a clip of each video, from stored features of its frames.

Texts with their times are the sample's ``timed_captions``. A sample without them has one text for the whole video: a
caption of its list ``captions``, or its ``txt``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.frames import FrameFeatureReader, padded_clips
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.loaders.order import RandomStream, random_bits, uniform
from pipeline.loaders.text import read_captions
from pipeline.loaders.timed_captions import read_timed_captions
from pipeline.models.videoclip.alignment import Overlap, pick
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.stages.annotate.frame_features import StoredFrames

FIRST = SamplePosition(0, 0)
"""The position from which evaluation draws its pairs."""

Positives = Literal["overlapped", "whole"]


@dataclass(frozen=True, kw_only=True)
class ClipPairReader:
    """``video`` float32 [B, P, T, D] and ``video_mask`` bool [B, P, T]: clips; ``text`` int64 [B, P, L]: their texts.

    P pairs of each video: overlapped positives, or the whole video with a random caption. Texts are padded to the
    longest of the batch. The pairs are a pure function of (seed, epoch, sample); in evaluation those of epoch 0.
    """

    features: FrameFeatureReader
    tokenizer: SpanTokenizer
    pairs: int = 16
    positives: Positives = "overlapped"
    overlap: Overlap = field(default_factory=Overlap)
    text_tokens: int = 61
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The json with the texts, and the features' field."""
        return ("json", *self.features.fields)

    @property
    def sidecars(self) -> Sequence[Wanted]:
        """Those of the features."""
        return self.features.sidecars

    @property
    def frames(self) -> int:
        """T, the most frames of a clip."""
        return self.features.sampling.frames

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``clips``: P times float32 [t, D], t from 1 to T; ``tokens``: P lists; raises ``UnreadableSample``."""
        stored, position = self.features.stored(sample), at or FIRST
        timed = read_timed_captions(sample) if self.positives == "overlapped" else None
        if timed is None:
            return self._whole(sample, stored, position)
        tokens = self._tokens([caption.text for caption in timed])
        spans = np.array([(caption.start, caption.end) for caption in timed])
        sizes = [max(1, len(some)) for some in tokens]
        found = self.overlap.pairs(self.pairs, self.seed, *position, spans, sizes, stored.times)
        texts = [[token for number in pair.captions for token in tokens[number]] for pair in found]
        return {
            "clips": [self._clip(stored, list(pair.frames)) for pair in found],
            "tokens": [*map(self._marked, texts)],
        }

    def _whole(self, sample: Sample, stored: StoredFrames, at: SamplePosition) -> Row:
        """The whole video, with a random caption in each pair."""
        captions = self._tokens(read_captions(sample))
        draws = uniform(random_bits(self.seed, RandomStream.CLIP_PAIRS, *at, self.pairs)).tolist()
        texts = [captions[pick(0, len(captions) - 1, draw)] for draw in draws]
        clip = self._clip(stored, range(len(stored.times)))
        return {"clips": [clip] * self.pairs, "tokens": [*map(self._marked, texts)]}

    def _clip(self, stored: StoredFrames, numbers: Sequence[int]) -> Tensor:
        """float32 [t, D]: these frames, or T of them at equal distances."""
        if len(numbers) > self.frames:
            numbers = [numbers[place] for place in np.linspace(0, len(numbers) - 1, self.frames).astype(int)]
        return torch.from_numpy(stored.features[list(numbers)].astype(np.float32))

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text without start and end; those beyond the longest text are cut off."""
        return [found.ids[1:-1].tolist() for found in self.tokenizer.batch(texts, self.text_tokens + 2)]

    def _marked(self, tokens: Sequence[int]) -> list[int]:
        return [self.tokenizer.start, *tokens[: self.text_tokens], self.tokenizer.end]

    def collate(self, rows: list[Row]) -> Batch:
        """All keys."""
        clips = padded_clips([clip for row in rows for clip in row["clips"]], self.frames)
        texts = padded_texts([tokens for row in rows for tokens in row["tokens"]], self.tokenizer.pad)
        return {key: value.unflatten(0, (len(rows), self.pairs)) for key, value in {**clips, "text": texts}.items()}


@dataclass(frozen=True, kw_only=True)
class EveryFrameReader:
    """``frames`` float32 [B, T, D]: all stored features of each video, with zeros at the end; ``frames_mask`` bool
    [B, T]; ``frames_times`` float32 [B, T], seconds."""

    features: FrameFeatureReader

    @property
    def fields(self) -> Sequence[str]:
        """Those of the features."""
        return self.features.fields

    @property
    def sidecars(self) -> Sequence[Wanted]:
        """Those of the features."""
        return self.features.sidecars

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """``frames`` and ``times`` of one video; raises ``UnreadableSample``."""
        stored = self.features.stored(sample)
        return {"frames": torch.from_numpy(stored.features.astype(np.float32)), "times": torch.from_numpy(stored.times)}

    def collate(self, rows: list[Row]) -> Batch:
        """All keys."""
        longest = max(len(row["times"]) for row in rows)
        frames = padded_clips([row["frames"] for row in rows], longest, "frames")
        return {**frames, "frames_times": padded_clips([row["times"] for row in rows], longest, "times")["times"]}


def padded_texts(texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """int64 [B, L] with the length of the longest text."""
    padded = torch.full((len(texts), max(map(len, texts))), pad)
    for row, tokens in zip(padded, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded


class CaptionTokenizer:
    """Texts to int64 [B, L], with [CLS] and [SEP], padded to a fixed length; longer texts are cut before their end."""

    def __init__(self, tokenizer: SpanTokenizer, length: int) -> None:
        """``length`` L counts [CLS] and [SEP]."""
        self.tokenizer, self.context_length = tokenizer, length

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [B, L]."""
        found = self.tokenizer.batch([texts] if isinstance(texts, str) else list(texts), self.context_length)
        rows = torch.full((len(found), self.context_length), self.tokenizer.pad)
        for row, text in zip(rows, found, strict=True):
            row[: len(text)] = torch.from_numpy(text.ids)
        return rows
