"""GLIPv2 that writes captions or answers questions: fine-tuning on the weights of a pre-trained GLIPv2.

Zhang, Zhang, Hu, Chen, Li, Dai, Wang, Yuan, Hwang, Gao, 2022, arXiv 2206.05836, its understanding tasks

The idea: the fused text of a detector is a text that has seen the image. The network is GLIPv2's (``glipv2/model.py``).

captions   each token predicts the next one with the head of masked language modelling:
           L = -1/T sum_t log p(w_t | w_1 ... w_(t-1), image). Tokens attend to earlier ones, and to all pixels. Pixels
           do not attend to tokens, because through them a token would see those that follow. Captions are written by a
           beam search; the pixels are encoded once.
answers    the question is fused with the image in both directions. The state of its first token goes through two layers
           to a logit for each of the most frequent answers: L = 1/B sum_ba BCE(logit_ba, accuracy of answer a), with
           VQA's accuracy (arXiv 1505.00468; soft targets: arXiv 1708.02711).

The paper's body was not at hand: both are the usual form of these tasks, and their values are ours. Left out: answers
that are generated word by word, and CIDEr optimisation of captions.

To hold a run against (recalled): VQA test-dev 71.6 / 73.1 / 74.6, COCO captions CIDEr 122 / 128.5 / 131 for T / B / H.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.batches import Batch, Reader, Row, SamplePosition
from pipeline.loaders.detection import RandomResize
from pipeline.loaders.grounding import padded_tokens
from pipeline.loaders.grounding_prompts import MASK, SpanTokenizer
from pipeline.loaders.images import decode, encoded_image
from pipeline.loaders.questions import FIELDS, AnswerList, check_answers, chosen_question, read_questions
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import caption_field, read_caption
from pipeline.models.glip.config import SMALLEST
from pipeline.models.glip.config import Config as GlipConfig
from pipeline.models.glip.fusion import Pixels
from pipeline.models.glip.model import Glip
from pipeline.models.glip.network import EncodedText, flattened, unflattened
from pipeline.models.glipv2.heads import load_heads
from pipeline.models.towers.answer_head import answer_head
from pipeline.models.towers.layers import Layer
from pipeline.models.towers.word_head import LanguageHead
from pipeline.shards.objects import FIELD
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted


@dataclass(frozen=True, kw_only=True)
class Config(GlipConfig):
    """The network, which is that of the run in `start_from`, and the task."""

    task: Literal["captions", "answers"] = "captions"
    """What is trained: writing captions, or answering questions."""
    caption_tokens: int = 40
    """Maximum number of tokens of a caption, with start and end."""
    beams: int = 3
    """Captions that the beam search keeps; 1 takes the most probable token each time."""
    answers: tuple[str, ...] = ()
    """Possible answers; those of the data if empty."""
    questions: str = FIELD
    """Sample field with the questions: boxes.json or json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.fusion, "fusion", self.fusion, "True: without it a text does not see the image")
        most = self.grounding.text_tokens
        require(3 <= self.caption_tokens <= most, "caption_tokens", self.caption_tokens, f"3 to {most}")
        require(1 <= self.beams <= 100, "beams", self.beams, "1 to 100")
        require(self.questions in FIELDS, "questions", self.questions, "one of " + ", ".join(FIELDS))
        check_answers(self.answers)


@dataclass(frozen=True, kw_only=True)
class ImageWithTextReader:
    """An image in a square with its caption, or with one of its questions, a random one in training.

    image       uint8 [B, 3, size, size]
    tokens      int64 [B, M] and token_mask bool [B, M], start and end included, padded to the batch's longest
    answers     float32 [B, A], the accuracy of each possible answer; only for questions
    """

    tokenizer: SpanTokenizer
    resize: RandomResize
    most: int
    caption: str = "txt"
    questions: str = ""
    answers: tuple[str, ...] = ()
    seed: int = 0

    @property
    def fields(self) -> Sequence[str]:
        """The image, and the captions or the questions."""
        return ("image", self.questions or caption_field(self.caption))

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """The values of one sample; raises ``UnreadableSample`` for one without a text."""
        targets: dict[str, Any] = {}
        if self.questions:
            asked = chosen_question(sample, read_questions(sample, self.questions), self.seed, at)
            targets, text = {"answers": self._possible.targets(asked)}, asked.question
        else:
            text = read_caption(sample, self.caption)
            if not text.strip():
                raise UnreadableSample(f"{sample.key} has an empty caption")
        pixels = decode(encoded_image(sample))
        placement = self.resize.place(pixels.shape[0], pixels.shape[1], self.seed, at)
        return {"image": placement.image(pixels), "tokens": self.tokenizer(text, self.most), **targets}

    @cached_property
    def _possible(self) -> AnswerList:
        return AnswerList(self.answers)

    def collate(self, rows: list[Row]) -> Batch:
        """The tensors named above."""
        tokens, mask = padded_tokens([row["tokens"].ids for row in rows], self.tokenizer.pad)
        found = {"image": torch.stack([row["image"] for row in rows]), "tokens": tokens, "token_mask": mask}
        if self.questions:
            found["answers"] = torch.from_numpy(np.stack([row["answers"] for row in rows]))
        return found


class Glipv2Language(Glip):
    """GLIP's network with a head for captions or for answers."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "tokens", "token_mask")
    registered_as: ClassVar[str] = "glipv2_language"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """As for GLIP."""
        super().__init__(config, description)
        writes, width = config.task == "captions", self.settings.hidden_size
        self.language = LanguageHead(self.settings) if writes else None
        self.answering = None if writes else answer_head(width, len(config.answers))
        if description is None and self.language is not None:
            load_heads({"language": self.language}, config.start_from)
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """What no loss depends on: boxes, the last block's pixels, and what pixels read of texts where they do not."""
        tower = self.model.tower
        fusions: Sequence[Any] = list(tower.fusions) if self.language is not None else [tower.fusions[-1]]
        for part in (self.model.head, tower.images[-1], *(one for f in fusions for one in (f.text_value, f.to_image))):
            part.requires_grad_(False)
        for fusion in fusions:
            fusion.image_scale.requires_grad_(False)

    @classmethod
    def smallest(cls) -> Config:
        """Captions of images of 64 pixels."""
        return Config(**SMALLEST)

    @classmethod
    def check(cls, config: GlipConfig) -> None:
        """As GLIP's; questions need answers, captions a tokenizer with a mask token as in the pre-training."""
        super().check(config)
        assert isinstance(config, Config)
        known = config.task == "captions" or len(config.answers) > 1
        require(known, "answers", config.answers, "two answers or more, or data with them")
        mask = SpanTokenizer.load(config.text).mask
        require(mask is not None, "text", config.text, f"a tokenizer with {MASK}")

    @classmethod
    def reader_settings(cls, run: Any) -> str:
        """The field of the captions."""
        caption: str = run.caption
        return caption

    @classmethod
    def sample_fields(cls, config: Any, settings: str | None = None) -> Sequence[str]:
        """Images, and captions or questions."""
        return ("image", config.questions if config.task == "answers" else caption_field(settings or "txt"))

    @classmethod
    def sidecars(cls, config: GlipConfig, settings: str | None = None) -> Sequence[Wanted]:
        """None."""
        return []

    def readers(self, train: bool, *, seed: int = 0, settings: str | None = None) -> Sequence[Reader]:
        """Images that are never mirrored, since texts say left and right."""
        config = self.config
        asks = config.task == "answers"
        return [
            ImageWithTextReader(
                tokenizer=self.tokenizer,
                resize=replace(config.resize(train), flip=0.0),
                most=config.grounding.text_tokens if asks else config.caption_tokens,
                caption=settings or "txt",
                questions=config.questions if asks else "",
                answers=config.answers,
                seed=seed,
            )
        ]

    def layers(self) -> Mapping[str, Layer]:
        """As GLIP's."""
        return {name: layer for name, layer in super().layers().items() if self.get_parameter(name).requires_grad}

    def blocks(self) -> Sequence[nn.Module]:
        """As GLIP's, without the fusions of captions: their parts are called one by one, which a sharded or compiled
        block does not allow."""
        apart = set(self.model.tower.fusions) if self.language is not None else set()
        return [block for block in super().blocks() if block not in apart]

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``caption``: the mean over tokens; or ``answer``: the sum over answers, the mean over questions."""
        levels = self.model.image(self.normalised(batch["image"]))
        tokens, mask = batch["tokens"], batch["token_mask"]
        if self.language is None:
            logits = self._answer_logits(levels, self.model.encode_text(tokens, mask))
            errors = functional.binary_cross_entropy_with_logits(logits, batch["answers"], reduction="sum")
            return {"answer": errors / len(tokens)}
        logits = self._next_tokens(self._views(levels), tokens[:, None, :-1])[:, 0]
        following = torch.where(mask[:, 1:], tokens[:, 1:], -100)
        errors = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")
        (count,) = self._average(mask[:, 1:].sum().float()[None])
        return {"caption": cast(Tensor, errors / count)}

    def _answer_logits(self, levels: Sequence[Tensor], text: EncodedText) -> Tensor:
        """Float32 [B, A] for the pyramids of B images and a question for each."""
        assert self.answering is not None
        ((_, hidden),) = self.model.fuse(levels, [text])
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.answering(hidden[:, 0].float())
            return logits

    def _views(self, levels: Sequence[Tensor]) -> list[Pixels]:
        """The pixels of each block as tokens read them; they depend on no text."""
        found, views = list(levels), []
        for number, (fusion, block) in enumerate(zip(self.model.tower.fusions, self.model.tower.images, strict=True)):
            view = cast(Any, fusion).view(flattened(found))
            views.append(view)
            if number + 1 < len(self.model.tower.images):
                found = block(unflattened(view.features, found))
        return views

    def _next_tokens(self, views: Sequence[Pixels], tokens: Tensor) -> Tensor:
        """Logits float32 [B, K, M, V] of the token after each of ``tokens`` [B, K, M], K texts of each image."""
        assert self.language is not None
        images, texts, length = tokens.shape
        words, tower = self.model.text, self.model.tower
        earlier = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        causal = earlier.expand(images * texts, 1, -1, -1)
        hidden = words.encode(words.embeddings(tokens.flatten(0, 1)), causal)
        for fusion, layer, view in zip(tower.fusions, tower.texts, views, strict=True):
            rows = hidden.unflatten(0, (images, texts)).flatten(1, 2)
            hidden = cast(Any, fusion).read(view, rows).unflatten(1, (texts, length)).flatten(0, 1)
            hidden = layer(hidden, attention_mask=causal)
        logits: Tensor = self.language(hidden.unflatten(0, (images, texts)), words.words)
        return logits

    @torch.no_grad()
    def describe(self, images: Sequence[Tensor]) -> list[str]:
        """A caption of each of ``images``, uint8 [3, H, W] of any sizes."""
        require(self.language is not None, "task", self.config.task, "captions, to write them")
        found: dict[int, str] = {}
        for group in self._groups(images):
            written = self._write(self._views(self.model.image(self.normalised(group.pixels))), len(group.numbers))
            found |= zip(group.numbers, map(self.tokenizer.decode, written.tolist()), strict=True)
        return [found[number] for number in range(len(images))]

    def _write(self, views: Sequence[Pixels], count: int) -> Tensor:
        """Beam search: tokens int64 [B, M] of the best text of each image, padded after its end.

        Texts are compared by the mean log-probability of their tokens.
        """
        beams, tokenizer, device = self.config.beams, self.tokenizer, self.mean.device
        # CLIP's padding is its end.
        unwritten = [token for token in (tokenizer.start, tokenizer.mask, tokenizer.pad) if token != tokenizer.end]
        tokens = torch.full((count, beams, 1), tokenizer.start, device=device)
        scores = torch.full((count, beams), -torch.inf, device=device)
        scores[:, 0] = 0.0  # the beams begin as one
        ended = torch.zeros(count, beams, dtype=torch.bool, device=device)
        lengths = torch.zeros(count, beams, device=device)
        while tokens.shape[2] < self.config.caption_tokens and not bool(ended.all()):
            following = self._next_tokens(views, tokens)[:, :, -1].log_softmax(dim=-1)
            following[..., unwritten] = -torch.inf
            following[ended] = -torch.inf
            following[..., tokenizer.pad] = torch.where(ended, 0.0, following[..., tokenizer.pad])
            size = following.shape[-1]
            scores, best = (scores[..., None] + following).flatten(1).topk(beams, dim=1)
            beam, token = best // size, best % size
            tokens = tokens.gather(1, beam[..., None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens, token[..., None]], dim=2)
            ended, lengths = ended.gather(1, beam), lengths.gather(1, beam) + ~ended.gather(1, beam)
            ended = ended | (token == tokenizer.end)
        best = (scores / lengths.clamp(min=1)).argmax(dim=1)
        return tokens[torch.arange(count, device=device), best]

    @torch.no_grad()
    def answer(self, images: Sequence[Tensor], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """One of ``config.answers`` for each of the ``questions`` about each of ``images``, uint8 [3, H, W]."""
        require(self.answering is not None, "task", self.config.task, "answers, to answer questions")
        found: list[list[str]] = [[] for _ in images]
        for group in self._groups(images):
            levels = self.model.image(self.normalised(group.pixels))
            asked = [(row, text) for row, number in enumerate(group.numbers) for text in questions[number]]
            if not asked:
                continue
            most = self.config.grounding.text_tokens
            tokens, mask = self._padded(self.tokenizer.batch([text for _, text in asked], most))
            rows = [row for row, _ in asked]
            logits = self._answer_logits([level[rows] for level in levels], self.model.encode_text(tokens, mask))
            for row, best in zip(rows, logits.argmax(dim=1).tolist(), strict=True):
                found[group.numbers[row]].append(self.config.answers[best])
        return found
