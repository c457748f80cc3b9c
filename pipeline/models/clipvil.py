"""CLIP-ViL: answers about images from the grid of CLIP's image tower.

Shen, Li, Tan, Bansal, Rohrbach, Chang, Yao, Keutzer, 2021, "How Much Can CLIP Benefit Vision-and-Language Tasks?",
arXiv 2107.06383

The idea: the image side of a vision-and-language model is the grid of features of CLIP's image tower, not the boxes of
a detector. A BERT reads the tokens of a text and the cells of the grid as one sequence (``towers/single_stream.py``);
its pooled first token p goes through two layers to a logit for each possible answer, W2 LayerNorm(GELU(W1 p)).

answers    for B questions, A possible answers and the accuracy t_ba of each by VQA's rule (``loaders/questions.py``)
           L = A / (B A) sum_ba BCE(logit_ba, t_ba), the mean times the number of answers. With ``loss`` single, as for
           SNLI-VE's three classes, the softmax cross-entropy of the answer that is right.
pretrain   of a caption or a question, LXMERT's losses (arXiv 1908.07490) without those of objects:
           masked words (15 % of tokens), whether text and image match (half of them do not), and the answers of
           questions, L = L_words + L_match + L_answers.

The tower is frozen (``frozen``; its grids may be stored: ``jobs/embed_dataset.py grid``) or trained with the rest, by
gradient descent where AdamW trains the transformer (``AdamWWithSgd``). In training a step may read a random part of the
cells (``most_cells``), other ones for every sample and epoch.

Differences from the authors' code: an epoch reads each image once with one of its texts, not each text; batch
normalisation of the tower keeps its statistics; images are padded at the right and below, and padding is no cell.
Positions of vision transformers are interpolated with height and width; their class token is not a cell.

Left out: Pythia and MCAN over stored grids (the paper's section 4.1), the navigation tasks, which need a simulator (the
sidecar of grids is what they read), object labels in pre-training, and the conversion of released weights.

To hold a run against (RN50x4): VQA v2 test-dev 76.48, test-std 76.70, about 73.9 on the minival split; SNLI-VE dev
80.61, test 80.20; GQA test-dev 61.42, test-std 62.93.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.cache import FileCache
from pipeline.loaders.grid import CellAttention, GridFeatureReader, GridImageReader, chosen_cells, padded_cells
from pipeline.loaders.grounding import padded_tokens
from pipeline.loaders.grounding_prompts import DRAWN_QUESTIONS, MASK, SpanTokenizer
from pipeline.loaders.question_text import PretrainingTextReader, QuestionReader
from pipeline.loaders.questions import FIELDS, check_answers
from pipeline.loaders.text import caption_field
from pipeline.models import class_vectors
from pipeline.models.method import Method
from pipeline.models.towers import openclip
from pipeline.models.towers.answer_head import answer_head
from pipeline.models.towers.grid import GridTower
from pipeline.models.towers.layers import Layer, block_depths, blocks
from pipeline.models.towers.single_stream import SingleStream, bert_settings
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.models.towers.word_head import LanguageHead, masked_token_loss
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.sidecar import Wanted
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.grid_features import JOB

QUESTIONS_AT_ONCE = 64
TEXT_SETTINGS, FACTS = "bert.json", "grid.json"
"""Files of a checkpoint: the settings of the transformer, and the tower with the digest of its grids."""
FILES = ("model.safetensors", "method.safetensors")
"""Files of a checkpoint with the weights of ``model``, and with those beside it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network and the task, with the paper's values."""

    task: Literal["answers", "pretrain"] = "answers"
    """Task: answers to questions, or pre-training with masked words, image-text matching and answers."""
    loss: Literal["soft", "single"] = "soft"
    """Loss of answers: soft (binary cross-entropy with each answer's accuracy), or single (softmax cross-entropy of the
    right one, for classes such as SNLI-VE's)."""
    tower: str = "RN50-quickgelu:openai"
    """CLIP whose image tower gives the grid: ARCHITECTURE:WEIGHTS, or a checkpoint or run folder of a CLIP or of a
    classifier over one."""
    image_size: tuple[int, int] = (384, 640)
    """Height and width in pixels into which an image is resized and padded."""
    frozen: bool = False
    """Freeze the image tower."""
    grid: str = ""
    """Sidecar with stored grids (jobs/embed_dataset.py grid) for a frozen tower; empty computes them from images."""
    most_cells: int = 0
    """Number of random cells of an image that a training step reads; 0 for all, the paper pre-trains with 100."""
    positions: int = 25
    """Maximum number of rows and of columns of the grid."""
    text: str = "bert-base-uncased"
    """Transformer and tokenizer: a folder or model id of a BERT, or drawn-questions for a new small one that knows the
    words of the embedded world and of its questions."""
    pretrained_text: bool = True
    """Initialise the transformer with the weights of `text`; not used with drawn-questions."""
    small_text: tuple[int, int, int] = (64, 2, 4)
    """Width, number of layers and number of heads of the transformer drawn-questions."""
    text_tokens: int = 20
    """Maximum number of tokens of a text, with start and end, 4 to 512."""
    dropout: float = 0.1
    """Dropout of the transformer, 0 to less than 1."""
    answers: tuple[str, ...] = ()
    """Possible answers, which differ by VQA's rules (two and 2 are equal); the most frequent ones of the data if
    empty."""
    questions: str = QUESTIONS
    """Sample field with the questions: questions.json, boxes.json or json; empty pre-trains on captions alone."""
    masked_tokens: float = 0.15
    """Probability that a token is to be predicted in pre-training, more than 0, up to 1."""
    mismatched: float = 0.5
    """Probability that an image gets another image's text in pre-training, 0 to 1."""
    start_from: str = ""
    """Checkpoint or run folder of a pre-training with the same network; the head of the answers begins anew."""

    def __post_init__(self) -> None:
        asks = bool(self.questions) or self.task == "pretrain"
        known = "one of " + ", ".join(FIELDS)
        require(asks and (not self.questions or self.questions in FIELDS), "questions", self.questions, known)
        require(not self.grid or self.frozen, "grid", self.grid, "empty, since a tower that is trained needs images")
        require(not self.grid or self.grid.isidentifier(), "grid", self.grid, "the name of a sidecar, or empty")
        check_answers(self.answers)
        require(self.most_cells >= 0, "most_cells", self.most_cells, "0 or more")
        require(self.positions >= 1, "positions", self.positions, "1 or more")
        require(min(self.image_size) >= 1, "image_size", self.image_size, "two sides of 1 pixel or more")
        require(4 <= self.text_tokens <= 512, "text_tokens", self.text_tokens, "4 to 512")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 to less than 1")
        require(0 < self.masked_tokens <= 1, "masked_tokens", self.masked_tokens, "more than 0, up to 1")
        require(0 <= self.mismatched <= 1, "mismatched", self.mismatched, "0 to 1")
        width, layers, heads = self.small_text
        small = layers >= 1 and heads >= 1 and width > 0 and width % max(heads, 1) == 0
        require(small, "small_text", self.small_text, "a width that is a multiple of the heads, layers, heads")

    @property
    def asks(self) -> bool:
        """Whether questions are read."""
        return bool(self.questions)


SMALLEST = Config(
    task="pretrain",
    tower="clipmill-tiny:untrained",
    image_size=(64, 64),
    text=DRAWN_QUESTIONS,
    small_text=(32, 2, 2),
    dropout=0.0,
    most_cells=12,
    masked_tokens=0.3,
    questions="boxes.json",
    answers=("red", "green", "blue", "yellow"),
)


class ClipVil(Method):
    """A single stream of text and grid with heads for answers, masked words and matching."""

    batch_keys: ClassVar[tuple[str, ...]] = ("tokens", "token_mask", "cells", "cell_mask")
    registered_as: ClassVar[str] = "clipvil"
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; nothing is loaded then."""
        super().__init__(config)
        self.tokenizer = (
            SpanTokenizer.load(config.text) if description is None else SpanTokenizer(description["tokenizer.json"])
        )
        self.settings = self._settings(description)
        self.tower, self.facts, self._tower_files = self._tower(description)
        self.tower.check_size(config.image_size)
        self.transform = self.tower.transform(config.image_size)
        most = max(side // self.tower.stride for side in config.image_size)
        require(most <= config.positions, "positions", config.positions, f"{most} or more, the grid's longer side")
        self.model = SingleStream(self.settings, self.tower.width, config.positions)
        pretrains = config.task == "pretrain"
        self.words = LanguageHead(self.settings) if pretrains else None
        self.matching = nn.Linear(self.settings.hidden_size, 2) if pretrains else None
        self.answering = answer_head(self.settings.hidden_size, len(config.answers)) if config.asks else None
        self._initialise(description is None)
        if description is None:
            # Of the weights that train: those of start_from replace the tower's own.
            self.facts["teacher"] = self.tower.digest(config.image_size)
        self.tower.requires_grad_(not config.frozen)

    @classmethod
    def smallest(cls) -> Config:
        """Pre-training end to end on images of 64 pixels."""
        return SMALLEST

    @classmethod
    def check(cls, config: Config) -> None:
        """Check tower, tokenizer and answers."""
        class_vectors.check(config.tower, "tower")
        known = not config.asks or len(config.answers) > 1
        require(known, "answers", config.answers, "two answers or more, or data with them")
        tokenizer = SpanTokenizer.load(config.text)
        masks = config.task == "answers" or tokenizer.mask is not None
        require(masks, "text", config.text, f"a tokenizer with {MASK}")

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """The modules without initial weights."""
        return cls(config, description)

    def description(self) -> Mapping[str, str]:
        """The transformer's settings, the tokenizer, and the tower with its architecture."""
        return {
            TEXT_SETTINGS: self.settings.to_json_string(use_diff=False),
            "tokenizer.json": self.tokenizer.description,
            FACTS: json.dumps(self.facts),
            **self._tower_files,
        }

    def _settings(self, description: Mapping[str, str] | None) -> Any:
        config, tokenizer = self.config, self.tokenizer
        if description is not None:
            from transformers import BertConfig

            return BertConfig(**{**json.loads(description[TEXT_SETTINGS]), "attn_implementation": "sdpa"})
        small = config.small_text if config.text == DRAWN_QUESTIONS else (0, 0, 0)
        numbers = (tokenizer.vocab_size, tokenizer.pad, config.text_tokens, config.dropout)
        return bert_settings(config.text, small, *numbers)

    def _tower(self, description: Mapping[str, str] | None) -> tuple[GridTower, dict[str, Any], dict[str, str]]:
        """The tower, its facts (a new one's lack the digest), and the files that describe its architecture."""
        if description is not None:
            facts = json.loads(description[FACTS])
            card = json.loads(description[openclip.MODEL_CARD])
            name = openclip.register(facts["architecture"], description)
            model = openclip.create(name, load=False, preprocess=card["preprocess_cfg"])
            files = {key: text for key, text in description.items() if key in facts["files"]}
            return GridTower(model), facts, files
        clip = class_vectors.open_teacher(self.config.tower, "tower")
        architecture = openclip.plain_name(clip.config.architecture)
        files = dict(clip.description())
        tower = GridTower(clip.model).requires_grad_(True)
        tower.check_size(self.config.image_size)
        return tower, {"architecture": architecture, "files": sorted(files)}, files

    def _initialise(self, new: bool) -> None:
        config = self.config
        if self.matching is not None:
            nn.init.normal_(self.matching.weight, std=self.settings.initializer_range)
            nn.init.zeros_(self.matching.bias)
        if not new:
            return
        if config.start_from:
            load_start(self, config.start_from)
        elif config.pretrained_text and config.text != DRAWN_QUESTIONS:
            from transformers import BertModel

            known: Any = BertModel.from_pretrained(config.text)
            self.model.bert.load_state_dict(known.state_dict())

    def train(self, mode: bool = True) -> Self:
        """torch's; a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.tower.eval()
        return self

    @classmethod
    def reader_settings(cls, run: Any) -> str:
        """The field of the captions."""
        caption: str = run.caption
        return caption

    @classmethod
    def sample_fields(cls, config: Config, settings: str | None = None) -> Sequence[str]:
        """Images without a sidecar, questions, and captions for pre-training."""
        texts = [caption_field(settings or "txt")] if config.task == "pretrain" else []
        return (*([] if config.grid else ["image"]), *texts, *([config.questions] if config.asks else []))

    @classmethod
    def sidecars(cls, config: Config, settings: str | None = None) -> Sequence[Wanted]:
        """The grids, if they are stored; the reader also requires the tower's digest."""
        return [Wanted(name=config.grid, job=JOB)] if config.grid else []

    def readers(self, train: bool, *, seed: int = 0, settings: str | None = None) -> Sequence[Reader]:
        """Images are never mirrored, since texts say left and right."""
        config = self.config
        grid: Reader = GridImageReader(transform=self.transform, most=config.most_cells, seed=seed)
        if config.grid:
            stored = {"teacher": self.facts["teacher"], "width": self.tower.width}
            grid = GridFeatureReader(name=config.grid, most=config.most_cells, seed=seed, **stored)
        if config.task == "pretrain":
            text: Reader = PretrainingTextReader(
                tokenizer=self.tokenizer,
                most=config.text_tokens,
                caption=settings or "txt",
                questions=config.questions,
                answers=config.answers,
                share=config.masked_tokens,
                mismatched=config.mismatched,
                seed=seed,
            )
        else:
            text = QuestionReader(
                tokenizer=self.tokenizer,
                most=config.text_tokens,
                questions=config.questions,
                answers=config.answers,
                known=config.loss == "single",
                seed=seed,
            )
        return [grid, text]

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Texts and grids are padded to their batch's longest."""
        return {"text tokens": batch["tokens"].shape[1], "cells": batch["cells"].shape[1]}

    def layers(self) -> Mapping[str, Layer]:
        """``image``: the tower, if it is trained; ``text``: the transformer and the input of cells."""
        found: dict[str, Layer] = {}
        for tower, prefix in (("image", "tower."), ("text", "model.")):
            names = [name for name, value in self.named_parameters() if name.startswith(prefix) and value.requires_grad]
            depths = block_depths(names, blocks(self))
            deepest = max(depths.values(), default=0)
            found |= {name: Layer(tower, deepest - depth) for name, depth in depths.items()}
        return found

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``answer``; in pre-training ``words``, ``match`` and, with questions, ``answer``."""
        hidden, pooled = self._read(batch)
        if self.config.task == "answers":
            return {"answer": answer_loss(self._answer_logits(pooled), batch["answers"], self.config.loss)}
        assert self.words is not None and self.matching is not None
        positions, originals = batch["masked_at"], batch["masked_tokens"]
        counts = torch.stack([(originals >= 0).sum(), batch["asked"].sum()]).float()
        masked, asked = self.gather(counts[None]).mean(dim=0).clamp(min=1 / len(pooled)).unbind()
        with torch.autocast(pooled.device.type, enabled=False):
            matches = self.matching(pooled.float())
        losses = {
            "words": masked_token_loss(self.words, hidden, self.model.words, positions, originals) / masked,
            "match": functional.cross_entropy(matches, batch["matched"]),
        }
        if self.answering is not None:
            logits, kind = self._answer_logits(pooled), self.config.loss
            rows = answer_loss(logits, batch["answers"], kind, reduction="none")
            losses["answer"] = torch.where(batch["asked"], rows, 0.0).sum() / asked
        return losses

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states of tokens and cells, and the pooled first token; see :class:`SingleStream`."""
        grid = batch["grid"] if "grid" in batch else self._grid(batch["image"], batch["cells"])
        found: tuple[Tensor, Tensor] = self.model(
            batch["tokens"], batch["token_mask"], grid, batch["cells"], batch["cell_mask"]
        )
        return found

    def _grid(self, image: Tensor, cells: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the features of the cells int64 [B, L, 2], float [B, L, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            return features_of(self.tower(image), cells)

    def _answer_logits(self, pooled: Tensor) -> Tensor:
        assert self.answering is not None
        with torch.autocast(pooled.device.type, enabled=False):
            logits: Tensor = self.answering(pooled.float())
            return logits

    @torch.no_grad()
    def answer_probabilities(self, images: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """Float32 [B, A]: the probability of each of ``config.answers`` to a question about each of ``images``.

        Images are uint8 [3, H, W] of any sizes. With the loss ``soft`` each answer has a probability of its own.
        """
        return self._probabilities(images, [[text] for text in questions])

    def _probabilities(self, images: Sequence[Tensor], questions: Sequence[Sequence[str]]) -> Tensor:
        """Float32 [Q, A] of all questions, those about the first image first; the tower reads each image once."""
        require(self.answering is not None, "questions", self.config.questions, "a model that was trained on questions")
        grid, cells, cell_mask = self._seen(images)
        rows = [(image, text) for image, some in enumerate(questions) for text in some]
        parts = []
        for start in range(0, len(rows), QUESTIONS_AT_ONCE):
            some = rows[start : start + QUESTIONS_AT_ONCE]
            about = torch.tensor([image for image, _ in some], device=grid.device)
            asked = self._asked([text for _, text in some])
            parts.append(self._answer_logits(self.model(*asked, grid[about], cells[about], cell_mask[about])[1]))
        logits = torch.cat(parts)
        return logits.sigmoid() if self.config.loss == "soft" else logits.softmax(dim=1)

    @torch.no_grad()
    def answer(self, images: Sequence[Tensor], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """One of ``config.answers`` for each of the ``questions`` about each of ``images``, uint8 [3, H, W]."""
        if not any(questions):
            return [[] for _ in images]
        best = self._probabilities(images, questions).argmax(dim=1)
        texts = iter([self.config.answers[number] for number in best.tolist()])
        return [[next(texts) for _ in some] for some in questions]

    @torch.no_grad()
    def attention(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[CellAttention]:
        """For each image uint8 [3, H, W] and its question, the last layer's attention to each cell."""
        weights = self.model.attention(*self._asked(questions), *self._seen(images)).float().cpu()
        found = []
        for row, image in zip(weights, images, strict=True):
            rows, columns = self.transform.cells(*image.shape[1:])
            cells = row[: rows * columns].reshape(rows, columns)
            found.append(CellAttention(cells, self.transform.cell_size(*image.shape[1:])))
        return found

    def _seen(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The features of the images' cells, float [B, L, D], the cells and their mask, as the readers give them."""
        placed = [self.transform(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        found = padded_cells([chosen_cells(shape, 0, 0, None) for _, shape in placed])
        device = self.tower.mean.device
        cells, mask = found["cells"].to(device), found["cell_mask"].to(device)
        return self._grid(torch.stack([image for image, _ in placed]).to(device), cells), cells, mask

    def _asked(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and their mask, as the readers give them."""
        ids = [one.ids for one in self.tokenizer.batch(questions, self.config.text_tokens)]
        tokens, mask = padded_tokens(ids, self.tokenizer.pad)
        return tokens.to(self.tower.mean.device), mask.to(self.tower.mean.device)


def answer_loss(
    logits: Tensor, targets: Tensor, kind: Literal["soft", "single"], reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """The loss of logits float32 [B, A] and accuracies float32 [B, A], a scalar or float32 [B].

    ``soft``: the mean binary cross-entropy times A. ``single``: the cross-entropy of the answer with the highest
    accuracy.
    """
    if kind == "single":
        return functional.cross_entropy(logits, targets.argmax(dim=1), reduction=reduction)
    rows = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1) * logits.shape[1]
    return rows.mean() if reduction == "mean" else rows


def features_of(grid: Tensor, cells: Tensor) -> Tensor:
    """The features float [B, L, D] of the cells (row, column) int64 [B, L, 2] of a grid float [B, D, H, W]."""
    numbers = cells[..., 0] * grid.shape[3] + cells[..., 1]
    flat = grid.flatten(2).transpose(1, 2)
    return flat.gather(1, numbers[..., None].expand(-1, -1, flat.shape[2]))


def load_start(method: ClipVil, address: str) -> None:
    """Load transformer, tower and the heads of pre-training from the checkpoint folder at ``address``.

    Raises:
        SettingError: no checkpoint of a CLIP-ViL with the same network.
    """
    folder = Folder(address)
    absent = [name for name in FILES if not folder.exists(name)]
    require(not absent, "start_from", address, "a checkpoint of a CLIP-ViL")
    inner, beside = (read_any_weights(FileCache().fetch(folder, name), address) for name in FILES)
    problem = misfit(method.model.state_dict(), inner)
    require(not problem, "start_from", address, f"weights of the same network; this is {problem}")
    method.model.load_state_dict(inner)
    own = {name.removeprefix("tower."): value for name, value in beside.items() if name.startswith("tower.")}
    problem = misfit(method.tower.state_dict(), own)
    require(not problem, "start_from", address, f"weights of the same tower; this is {problem}")
    method.tower.load_state_dict(own)
    for name in ("words", "matching"):
        head = getattr(method, name)
        found = {key.removeprefix(f"{name}."): value for key, value in beside.items() if key.startswith(f"{name}.")}
        if head is not None and found and not misfit(head.state_dict(), found):
            head.load_state_dict(found)
