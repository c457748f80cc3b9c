"""End-to-end fine-tuning of an image tower with a linear head.

Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo-Lopes, Hajishirzi, Farhadi, Namkoong, Schmidt, 2021, "Robust
fine-tuning of zero-shot models", arXiv 2109.01903 (WiSE-FT), section 3, and the protocol by which SLIP is fine-tuned
(Mu et al. 2021, arXiv 2112.12750, section 4.2, which is that of BEiT).

The idea: put a linear layer behind the image tower and train both on labelled images. With unit features x of an
image, class vectors w_c and biases b_c the loss is the cross-entropy of the logits w_c.x + b_c. The head begins as
the zero-shot classifier, w_c = t y_c with the scale t and the mean y_c of a class's prompts, so that the first step
starts from the zero-shot model and the mean of both models' weights is a model too (jobs/average_checkpoints.py). Or it
begins at zero or at random, which needs no text; the features may then be those before the tower's projection.

The text tower stays as it is, and so does the scale: what was a CLIP still compares images with texts.

Left out: stochastic depth and random erasing of BEiT's recipe, which open_clip's towers and torchvision's batched
transforms have no door for; its RandAugment.

To hold a run against: ImageNet, SLIP's ViT-S/B/L after 25 epochs of YFCC15M 80.3 / 82.6 / 84.2, CLIP's 78.2 / 80.5 /
81.0. WiSE-FT, CLIP's ViT-B/16: zero-shot 68.3, fine-tuned 81.3, half of each 81.7, and on five shifted sets 58.4, 53.8
and 61.6 on average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from pipeline.config import require
from pipeline.loaders.batches import Reader
from pipeline.loaders.readers import LabelReader
from pipeline.loaders.text import TextSettings, cut_text
from pipeline.models import clip
from pipeline.models.towers import openclip
from pipeline.models.towers.locked import lock
from pipeline.models.towers.prompts import average_prompts
from pipeline.models.towers.unprojected import projection, unprojected, unprojected_width


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings, of which those of the loss and of the texts matter no more, and the head."""

    crop: Literal["square", "resized"] = "resized"
    class_names: tuple[str, ...] = ()
    """Class names, in the order of the head's rows."""
    label_key: str = "label"
    """Key of the samples' json that holds the class: its name, or its number."""
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts of a head that begins as the zero-shot classifier."""
    head: Literal["zero_shot", "zero", "random"] = "zero_shot"
    """How the head begins."""
    features: Literal["joint", "tower"] = "joint"
    """What it reads: the unit features that are compared with texts, or those before the projection."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes alike."""
    mixup: float = 0.0
    """Mix images and labels (arXiv 1710.09412), by a share drawn from Beta(this, this); 0 for never."""
    cutmix: float = 0.0
    """Paste a box of another image (arXiv 1905.04899), likewise. With both, each batch has one of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(set(self.class_names)) == len(self.class_names), "class_names", self.class_names, "distinct names")
        require(bool(self.prompts), "prompts", self.prompts, "one or more")
        fits = self.head != "zero_shot" or self.features == "joint"
        require(fits, "features", self.features, "joint, for a head that begins as the zero-shot classifier")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "0 to less than 1")
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


class Classifier(clip.Clip):
    """A CLIP whose image tower has a linear head and learns with it."""

    batch_keys = ("image", "label")
    config: Config

    def __init__(self, config: Config, description: Mapping[str, str] | None = None) -> None:
        require(len(config.class_names) >= 2, "class_names", config.class_names, "two class names or more")
        super().__init__(config, description)
        self.logit_scale.requires_grad_(False)
        if (bias := self._logit_bias()) is not None:
            bias.requires_grad_(False)
        if config.features == "tower":
            for parameter in projection(self.model.visual):
                parameter.requires_grad_(False)
        self.head = nn.Linear(self._width(), len(config.class_names))
        nn.init.zeros_(self.head.bias)
        if config.head == "random":
            nn.init.normal_(self.head.weight, std=0.01)
        elif config.head == "zero" or description is not None:  # a checkpoint brings the head
            nn.init.zeros_(self.head.weight)
        else:
            with torch.no_grad():
                vectors = class_vectors(self, config.class_names, config.prompts)
                self.head.weight.copy_(self.logit_scale.exp() * vectors)
        self._mix = _mixing(config)

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP, and colours to tell apart."""
        return Config(architecture="clipmill-tiny", class_names=("red", "green", "blue", "yellow"))

    @classmethod
    def check(cls, config: clip.Config) -> None:
        """As for CLIP, and whether there are classes."""
        super().check(config)
        assert isinstance(config, Config)
        require(len(config.class_names) >= 2, "class_names", config.class_names, "two class names or more")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the head's rows."""
        return self.config.class_names

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Images, and the numbers of their classes."""
        label = LabelReader(classes=self.config.class_names, json_key=self.config.label_key)
        return [*super().readers(train, seed=seed, settings=settings), label]

    @classmethod
    def sample_fields(cls, config: clip.Config, settings: TextSettings | None = None) -> Sequence[str]:
        """Images, and the json that has the label."""
        return (*super().sample_fields(config, settings), "json")

    def classify(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to logits, float32 [B, C]."""
        return self._logits((image.float() - self.mean) / self.std)

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cross-entropy of each row."""
        images, targets = (batch["image"].float() - self.mean) / self.std, batch["label"]
        if self._mix is not None and self.training:
            images, targets = self._mix(images, targets)
        smoothing = self.config.label_smoothing
        losses = functional.cross_entropy(self._logits(images), targets, label_smoothing=smoothing, reduction="none")
        return {"losses": losses}

    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their mean."""
        return {"classification": embeddings["losses"].mean()}

    def after_step(self) -> None:
        """The scale is not learnt here."""

    def measures(self) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}

    def _logits(self, images: Tensor) -> Tensor:
        if self.config.features == "tower":
            features = unprojected(self.model.visual, images)
        else:
            features = functional.normalize(self.model.encode_image(images).float(), dim=-1)
        logits: Tensor = self.head(features)
        return logits.float()

    def _width(self) -> int:
        if self.config.features == "tower":
            return unprojected_width(self.model.visual)
        return int(openclip.check_architecture(self.config.architecture)["embed_dim"])

    def _locked(self) -> tuple[nn.Module, ...]:
        """The text tower as well."""
        return (*super()._locked(), *lock(self.model, "text"))


@torch.no_grad()
def class_vectors(method: clip.Clip, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot classifier, float32 [C, D] of unit length on the CPU: a class is the mean of its prompts.

    As ``pipeline.evaluation.zero_shot.classifier``, which no method may know; on a GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home, was_training = method.mean.device, method.training
    method.to(device).eval()
    vectors = []
    for name in classes:
        tokens = method.tokenizer([template.replace("{}", name) for template in templates])
        prompts = method.encode_text(cut_text(tokens, method.end_of_text).to(device))
        vectors.append(average_prompts(prompts, len(templates)))
    method.to(home).train(was_training)
    return torch.cat(vectors).to(home)


def _mixing(config: Config) -> v2.Transform | None:
    """What mixes the images of a batch: uses torch's generator, which the loop seeds in every step."""
    classes = len(config.class_names)
    mixers: list[v2.Transform] = []
    if config.mixup:
        mixers.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(mixers) if mixers else None
