"""Prompts with the nouns and verbs of captions, and the seeds of each image's noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import open_clip
import torch

from pipeline.config import require
from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.phrases import stored_phrases, wanted_phrases
from pipeline.loaders.text import TextSettings, Tokenizer, caption_field, cut_text, faster, read_caption
from pipeline.models.towers.prompts import fill_template
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted

TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""The 80 prompts of CLIP's ImageNet evaluation."""


def phrases_of(settings: TextSettings) -> Wanted:
    """The sidecar with the phrases of the captions.

    Raises:
        SettingError: the run reads stored tokens, which cannot become prompts.
    """
    require(not settings.tokens, "tokens", settings.tokens, "empty with prompts, which are made of the caption's words")
    return wanted_phrases(settings.caption)


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """``text``: the captions' tokens, int64 [B, L]; ``prompts``: those of their prompts, int64 [B, K, L].

    A prompt is a template with a word of the caption. Words are chosen without replacement, templates independently,
    both as a function of seed, epoch and sample; in evaluation they are the first ones. The caption takes the place of
    prompts that its words do not suffice for.
    """

    tokenizer: Tokenizer
    end_of_text: int | None
    settings: TextSettings
    prompts: int
    verbs: bool
    seed: int

    @property
    def fields(self) -> Sequence[str]:
        """The field that holds captions."""
        return (caption_field(self.settings.caption),)

    @cached_property
    def sidecars(self) -> Sequence[Wanted]:
        """The phrases of the captions."""
        return (phrases_of(self.settings),)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The caption and its prompts, 1 + K texts; raises :class:`UnreadableSample`."""
        caption = read_caption(sample, self.settings.caption)
        found = stored_phrases(sample, ("noun", "verb") if self.verbs else ("noun",))
        words = list(dict.fromkeys(phrase.text for phrase in found if phrase.caption == 0))
        return {"texts": [caption, *self._prompts(words, at), *[caption] * self.prompts][: 1 + self.prompts]}

    def _prompts(self, words: Sequence[str], at: SamplePosition | None) -> list[str]:
        """At most K prompts of ``words``."""
        if at is None:
            return [fill_template(TEMPLATES[0], word) for word in words[: self.prompts]]
        bits = random_bits(self.seed, RandomStream.PROMPT_WORDS, *at, self.prompts + len(words))
        chosen = np.argsort(bits[self.prompts :], kind="stable")[: self.prompts].tolist()
        templates = (bits % np.uint64(len(TEMPLATES))).tolist()
        return [fill_template(TEMPLATES[templates[place]], words[number]) for place, number in enumerate(chosen)]

    def collate(self, rows: list[Row]) -> Batch:
        """Both keys, cut at the longest text of all."""
        tokens = cut_text(self._faster([text for row in rows for text in row["texts"]]), self.end_of_text)
        together = tokens.unflatten(0, (len(rows), -1))
        return {"text": together[:, 0].contiguous(), "prompts": together[:, 1:].contiguous()}

    @cached_property
    def _faster(self) -> Tokenizer:
        return faster(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class SeedReader:
    """``seeds``: a random number for each image, int64 [B], a function of seed, epoch and sample."""

    seed: int
    fields: Sequence[str] = ()

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The number; independent of the sample's content."""
        assert at is not None, "seeds are for training"
        return {"seeds": int(random_bits(self.seed, RandomStream.GROUPS, *at, 1)[0] >> np.uint64(1))}

    def collate(self, rows: list[Row]) -> Batch:
        """int64 [B]."""
        return {"seeds": torch.tensor([row["seeds"] for row in rows], dtype=torch.int64)}
