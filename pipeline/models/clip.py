"""Learning Transferable Visual Models From Natural Language Supervision.

Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever, 2021, arXiv 2103.00020

The idea: in a batch of images and captions, find the matching pairs. An image tower and a text tower map both into one
space; every caption is a class for every image, and the reverse. The trained model classifies new classes from their
description. With L2-normalised features x_i of images and y_j of captions, B pairs and a learned scale t = exp(s), the
loss is (section 2.3, figure 3)

    L = -1/2B sum_i [ log softmax_j(t x_i.y_j) at j = i  +  log softmax_j(t y_i.x_j) at j = i ]

s starts at ln(1 / 0.07) and is clamped to ln 100 (section 2.5). With W processes, each computes its B/W rows against
all B columns, gathered with their gradients.

``loss="sigmoid"`` is SigLIP (Zhai, Mustafa, Kolesnikov, Beyer, 2023, arXiv 2303.15343): every pair is a binary
classification, with a learned bias; t starts at 10 and the bias at -10. See ``pipeline.models.losses`` for both.

With a ``teacher``, a frozen CLIP, the loss is (1 - d) L + d D. D is the mean divergence of the student's softmaxes over
both directions from the teacher's, each at its own scale, over the batch of all processes: L_Total of MobileCLIP (Vasu,
Pouransari, Faghri, Vemulapalli, Tuzel, 2024, arXiv 2311.17049, section 3.2) with one teacher. open_clip's
``--distill-model`` and CLIP-KD (Yang et al., 2024, arXiv 2307.12732) add the same two terms.

Left out: the half precision of the paper's own code (bfloat16 instead), and its gradient checkpointing. Batch
normalisation in the ResNets uses each process's own rows, so those depend on the number of workers; transformers do
not.

To hold a run against: zero-shot top-1 on ImageNet, as measured again with open_clip on the released weights, RN50 59.8,
RN101 62.3, ViT-B/32 63.3, ViT-B/16 68.3, ViT-L/14 75.5, ViT-L/14 at 336 px 76.6 (the paper's 76.2 is the last one).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.loaders.images import ImageTransform
from pipeline.models.losses import (
    TILE,
    contrastive_loss,
    tiled_contrastive_loss,
    tiled_distillation_loss,
    tiled_sigmoid_loss,
)
from pipeline.models.method import EmbeddingMethod, ImageTextMethod
from pipeline.models.towers import openclip, teacher
from pipeline.models.towers.layers import Layer, layers
from pipeline.models.towers.locked import lock
from pipeline.models.towers.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture and augmentation, with the paper's values."""

    architecture: str = "ViT-B-32"
    """open_clip architecture, clipmill-tiny, clipmill-small, local-dir:FOLDER or hf-hub:REPO."""
    pretrained: str | None = None
    """Initial weights: a tag of the architecture, a file, or a checkpoint folder (path or URI)."""
    pretrained_towers: bool = False
    """Initialise towers of timm and Hugging Face with their own pretrained weights."""
    image_size: int | None = None
    """Side of the input images in pixels; none for the architecture's."""
    crop: Literal["square", "resized"] = "square"
    """Training crop: the paper's random square, or a box of random area and aspect ratio (open_clip's)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of a resized crop's area, as a part of the image, 0 to 1."""
    flip: float = 0.0
    """Probability of mirroring a training image."""
    text_start: Literal["paper", "bag_of_words"] = "paper"
    """Initial text transformer: paper (random), or bag_of_words (every layer averages words) for short runs."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Contrastive loss: softmax (the paper's) or sigmoid (SigLIP's)."""
    loss_tile: int = TILE
    """Side of the tiles in which the logits of a larger batch are computed; bounds the loss's memory."""
    temperature: float = 0.07
    """Initial softmax temperature; ignored if the pretrained weights have one."""
    sigmoid_scale: float = 10.0
    """Initial scale of the sigmoid loss, SigLIP's by default; ignored if the pretrained weights have one."""
    sigmoid_bias: float = -10.0
    """Initial bias of the sigmoid loss; ignored if the pretrained weights have one."""
    max_logit_scale: float = 100.0
    """Upper limit of the learned scale 1 / temperature."""
    context_length: int | None = None
    """Tokens per text; none for the architecture's. Position embeddings of pretrained weights are interpolated."""
    patch_dropout: float = 0.0
    """Part of a training image's patches that the vision transformer drops, 0 to less than 1 (FLIP: 0.5 and 0.75)."""
    lock_image: bool = False
    """Freeze the image tower and train the text tower alone (LiT)."""
    lock_image_unlocked: int = 0
    """Last layers of a locked image tower that are trained: 1 is the part after the blocks, 2 adds the last block."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked: int = 0
    """Last layers of a locked text tower that are trained; see --lock-image-unlocked."""
    teacher: str = ""
    """CLIP to distil from: ARCHITECTURE:WEIGHTS with a tag, a file or a checkpoint folder, or local-dir:FOLDER. It gets
    the student's images and needs the student's tokenizer."""
    distillation: float = 0.5
    """Weight of the distillation loss, up to 1 (MobileCLIP); the contrastive loss gets 1 - this. open_clip uses 0.5."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        require(self.sigmoid_scale > 0, "sigmoid_scale", self.sigmoid_scale, "more than 0")
        require(self.loss_tile >= 1, "loss_tile", self.loss_tile, "1 or more")
        require(self.max_logit_scale >= 1, "max_logit_scale", self.max_logit_scale, "1 or more")
        require(
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1"
        )
        require(0 <= self.flip <= 1, "flip", self.flip, "0 to 1")
        require(0 <= self.patch_dropout < 1, "patch_dropout", self.patch_dropout, "0 to less than 1")
        for name in ("image_size", "context_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more, or none")
        for name in ("lock_image", "lock_text"):
            unlocked, locked = getattr(self, f"{name}_unlocked"), getattr(self, name)
            require(unlocked >= 0, f"{name}_unlocked", unlocked, "0 or more")
            require(locked or not unlocked, f"{name}_unlocked", unlocked, f"0 without {name}")
            brings = bool(self.pretrained or self.pretrained_towers or ":" in self.architecture)
            require(
                brings or not locked, name, locked, "False, since random weights must be trained: give --pretrained"
            )
        require(0 < self.distillation <= 1, "distillation", self.distillation, "more than 0, up to 1")


class Clip(ImageTextMethod, EmbeddingMethod):
    """Two towers of open_clip and the contrastive loss between them."""

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "text")
    registered_as: ClassVar[str] = "clip"
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        """``description`` is given if weights are restored afterwards; no weights are downloaded then."""
        super().__init__(config)
        card = json.loads(description[openclip.MODEL_CARD]) if description else {}
        model_config = card.get("model_cfg", {})
        self.model: Any = openclip.create(
            config.architecture,
            config.pretrained,
            image_size=config.image_size,
            pretrained_towers=config.pretrained_towers,
            load=description is None,
            preprocess=card.get("preprocess_cfg"),
            logit_bias=config.sigmoid_bias if config.loss == "sigmoid" else model_config.get("init_logit_bias"),
            context_length=config.context_length,
            patch_dropout=config.patch_dropout,
        )
        self.tokenizer = openclip.tokenizer(config.architecture, config.context_length)
        self.end_of_text = openclip.end_of_text(self.model, self.tokenizer)
        if config.pretrained is None and not openclip.brings_weights(config.architecture):
            scale = config.sigmoid_scale if config.loss == "sigmoid" else 1 / config.temperature
            torch.nn.init.constant_(self.logit_scale, math.log(scale))
            if config.text_start == "bag_of_words":
                openclip.start_as_bag_of_words(self.model)
        if (bias := self._logit_bias()) is not None:
            bias.requires_grad_(config.loss == "sigmoid")  # the softmax loss does not use it
            if config.loss == "sigmoid" and not bias.any():  # open_clip's default 0, for weights without a bias
                torch.nn.init.constant_(bias, config.sigmoid_bias)
        self._still = self._locked()
        self.teacher: Teacher | None = None
        images = openclip.preprocessing(self.model)
        self.register_buffer("mean", torch.tensor(images["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(images["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    @classmethod
    def smallest(cls) -> Config:
        """Under two million parameters, nearly all of them in the token table."""
        return Config(architecture="clipmill-tiny")

    @classmethod
    def check(cls, config: Config) -> None:
        """Check that the architecture and the weights exist and fit each other."""
        openclip.check(
            config.architecture,
            config.pretrained,
            patch_dropout=config.patch_dropout,
            image_size=config.image_size,
            context_length=config.context_length,
        )
        if config.teacher:
            teacher.check(config.teacher, openclip.check_architecture(config.architecture), config.context_length)

    @classmethod
    def restored(cls, config: Config, description: Mapping[str, str]) -> Self:
        """The modules without initial weights, for a checkpoint with these text files."""
        return cls(replace(config, architecture=openclip.register(config.architecture, description)), description)

    def description(self) -> Mapping[str, str]:
        """What open_clip needs beside ``model.safetensors``."""
        config = self.config
        return openclip.describe(self.model, config.architecture, config.image_size, config.context_length)

    def _locked(self) -> tuple[nn.Module, ...]:
        """Freeze the towers that the config locks; returns the modules that must stay in evaluation mode."""
        config = self.config
        still: list[nn.Module] = []
        if config.lock_image:
            still += lock(self.model, "image", config.lock_image_unlocked)
        if config.lock_text:
            still += lock(self.model, "text", config.lock_text_unlocked)
        return tuple(still)

    def prepare_training(self) -> None:
        """Load the teacher, which only training needs."""
        if self.config.teacher:
            self.teacher = Teacher(self.config.teacher)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def transforms(self, train: bool) -> ImageTransform:
        """The model's own evaluation transform, or the config's random crops."""
        if not train:
            return openclip.image_transform(self.model)
        config = self.config
        return openclip.image_transform(self.model, crop=config.crop, scale=config.crop_scale, flip=config.flip)

    @property
    def logit_scale(self) -> Tensor:
        """The learned s; exp(s) multiplies the cosines."""
        scale: Tensor = self.model.logit_scale
        return scale

    def encode_image(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to L2-normalised float32 [B, D]."""
        features: Tensor = self.model.encode_image((image.float() - self.mean) / self.std)
        return functional.normalize(features.float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to L2-normalised float32 [B, D]."""
        return functional.normalize(openclip.encode_text(self.model, text).float(), dim=-1)

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of images and captions."""
        return {"image": self.encode_image(batch["image"]), "text": self.encode_text(batch["text"])}

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's features, if there is one."""
        if self.teacher is None:
            return {}
        image, text = self.teacher(batch["image"], batch["text"])
        return {"teacher_image": image, "teacher_text": text}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The contrastive loss of this rank's rows and, with a teacher, the distillation loss, both weighted."""
        image, text, scale = embeddings["image"], embeddings["text"], self.logit_scale.exp()
        contrastive = self._contrastive(image, text, scale)
        if self.teacher is None:
            return {"contrastive": contrastive}
        theirs, share = (embeddings["teacher_image"], embeddings["teacher_text"]), self.config.distillation
        divergence = tiled_distillation_loss(image, text, scale, *theirs, self.exchange, self.config.loss_tile)
        return {"contrastive": (1 - share) * contrastive, "distillation": share * divergence}

    def _contrastive(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        tile = self.config.loss_tile
        if self.config.loss == "sigmoid":
            bias = self._logit_bias()
            assert bias is not None
            return tiled_sigmoid_loss(image, text, scale, bias, self.exchange, tile, self.compiled)
        if len(image) * self.exchange.world > tile:
            return tiled_contrastive_loss(image, text, scale, self.exchange, tile, self.compiled)
        return contrastive_loss(image, text, scale, self.gather)

    def _logit_bias(self) -> Tensor | None:
        bias: Tensor | None = self.model.logit_bias
        return bias

    def layers(self) -> Mapping[str, Layer]:
        """The layers of both towers' weights; the scale, the bias and other methods' modules have none."""
        return {f"model.{name}": layer for name, layer in layers(self.model).items()}

    def after_step(self) -> None:
        """Clamp the scale between 1 and its limit."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(self.config.max_logit_scale))

    def measures(self) -> dict[str, float]:
        """The scale that multiplies the cosines, and the bias of the sigmoid loss."""
        bias = self._logit_bias() if self.config.loss == "sigmoid" else None
        return {"logit_scale": self.logit_scale.exp().item(), **({} if bias is None else {"logit_bias": bias.item()})}
