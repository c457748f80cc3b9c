"""End-to-end fine-tuning of an image tower with a linear head.

Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo-Lopes, Hajishirzi, Farhadi, Namkoong, Schmidt, 2021, "Robust
fine-tuning of zero-shot models", arXiv 2109.01903 (WiSE-FT), section 3, and the protocol by which SLIP is fine-tuned
(Mu et al. 2021, arXiv 2112.12750, section 4.2, which is that of BEiT).

The idea: put a linear layer behind the image tower and train both on labelled images. With unit features x of an
image, class vectors w_c and biases b_c the loss is the cross-entropy of the logits w_c.x + b_c. The head is initialised
with the zero-shot classifier, w_c = t y_c, with the scale t and the mean y_c of a class's prompts. So training starts
from the zero-shot model, and the mean of both models' weights is also a model (jobs/average_checkpoints.py). A zero or
random initialisation needs no text; the features may then be those before the tower's projection.

The text tower and the scale are frozen, so the model can still compare images with texts.

Left out: stochastic depth and random erasing of BEiT's recipe, which open_clip's towers and torchvision's batched
transforms do not support; its RandAugment.

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
from pipeline.models.towers.prompts import average_prompts, fill_template
from pipeline.models.towers.unprojected import projection, unprojected, unprojected_width


@dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """CLIP's settings (those of the loss and the texts have no effect) and the head."""

    crop: Literal["square", "resized"] = "resized"
    """Training crop: CLIP's random square, or a box of random area and aspect ratio."""
    class_names: tuple[str, ...] = ()
    """Class names, in the order of the head's rows."""
    label_key: str = "label"
    """Key of the class in the samples' json; its value is a name or a number."""
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts for the zero-shot head, with {} for a name."""
    head: Literal["zero_shot", "zero", "random"] = "zero_shot"
    """Initialisation of the head: the zero-shot classifier, zeros or random numbers."""
    features: Literal["joint", "tower"] = "joint"
    """Input of the head: the unit features that are compared with texts, or the features before the projection."""
    label_smoothing: float = 0.0
    """Label smoothing: part of the target that is spread over all classes, 0 to less than 1."""
    mixup: float = 0.0
    """Mixup (arXiv 1710.09412): alpha of the Beta distribution of the mixing weight; 0 disables it."""
    cutmix: float = 0.0
    """CutMix (arXiv 1905.04899): alpha of the Beta distribution, 0 disables; with mixup, each batch uses one."""

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
    """A CLIP whose image tower has a linear head; both are trained."""

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
        elif config.head == "zero" or description is not None:  # a checkpoint holds the head's weights
            nn.init.zeros_(self.head.weight)
        else:
            with torch.no_grad():
                vectors = class_vectors(self, config.class_names, config.prompts)
                self.head.weight.copy_(self.logit_scale.exp() * vectors)
        self._mix = _mixing(config)

    @classmethod
    def smallest(cls) -> Config:
        """The smallest CLIP, and colours as classes."""
        return Config(architecture="clipmill-tiny", class_names=("red", "green", "blue", "yellow"))

    @classmethod
    def check(cls, config: clip.Config) -> None:
        """Like CLIP's check; also requires classes."""
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
        """The scale is frozen."""

    def measures(self) -> dict[str, float]:
        """No metrics besides the loss."""
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

    Equals ``pipeline.evaluation.zero_shot.classifier``, which methods must not import; runs on a GPU if there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home, was_training = method.mean.device, method.training
    method.to(device).eval()
    vectors = []
    for name in classes:
        tokens = method.tokenizer([fill_template(template, name) for template in templates])
        prompts = method.encode_text(cut_text(tokens, method.end_of_text).to(device))
        vectors.append(average_prompts(prompts, len(templates)))
    method.to(home).train(was_training)
    return torch.cat(vectors).to(home)


def _mixing(config: Config) -> v2.Transform | None:
    """The transform that mixes the images of a batch; it uses torch's generator, which the loop seeds in every step."""
    classes = len(config.class_names)
    mixers: list[v2.Transform] = []
    if config.mixup:
        mixers.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    return v2.RandomChoice(mixers) if mixers else None
