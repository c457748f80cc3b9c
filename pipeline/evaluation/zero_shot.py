"""Zero-shot classification with an ensemble of prompts.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
section 3.1.4: every class name is inserted into every template, the texts' unit features are averaged and normalised,
and an image belongs to the class with the nearest mean. The paper's ViT-B/32 reaches 63.2 % on ImageNet with 80
templates; open_clip measures 63.3 % for the released weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.evaluation.encoder import TEXTS_AT_ONCE, Encoder, encode_tokens, inference
from pipeline.models.towers.prompts import average_prompts, fill_template

TOP = 5
NO_TEMPLATE = ("{}",)


def classifier(
    model: Encoder, classes: Sequence[str], templates: Sequence[str] = NO_TEMPLATE, precision: str = "fp32"
) -> Tensor:
    """The class vectors, float32 ``[C, D]``, unit length, on the model's device.

    ``templates`` have one ``{}`` each for the class name, whose underscores become blanks. Prompts are encoded a few
    hundred at a time, so ImageNet's 80,000 are never in memory together.
    """
    require(len(classes) > 1, "classes", tuple(classes), "two class names or more")
    require(len(templates) > 0, "templates", tuple(templates), "one template or more")
    classes_at_once = max(1, TEXTS_AT_ONCE // len(templates))
    vectors = []
    with inference(model, precision) as device:
        for start in range(0, len(classes), classes_at_once):
            names = classes[start : start + classes_at_once]
            prompts = [fill_template(template, name) for name in names for template in templates]
            features = encode_tokens(model, model.tokenizer(prompts), device)
            vectors.append(average_prompts(features, len(templates)))
    return torch.cat(vectors)


def zero_shot(
    model: Encoder, batches: Iterable[Mapping[str, Tensor]], class_vectors: Tensor, precision: str = "fp32"
) -> dict[str, float]:
    """Classify the images of ``batches`` by their nearest class vector.

    Args:
        model: encodes the images.
        batches: mappings with ``image``, uint8 ``[B, 3, H, W]``, and ``label``, int64 ``[B]`` in ``0 ... C - 1``.
        class_vectors: float ``[C, D]``, from :func:`classifier`.
        precision: "fp32" or "bf16".

    Returns:
        ``top1``, ``top5``, ``mean_per_class`` (top-1, averaged over the classes that occur) and ``chance`` (top-1
        of random guessing), all in 0 ... 1; ``samples``.
    """
    counts = Counts(len(class_vectors))
    with inference(model, precision) as device:
        weights = class_vectors.to(device).float()
        for batch in batches:
            features = functional.normalize(model.encode_image(batch["image"].to(device)).float(), dim=-1)
            with torch.autocast(device.type, enabled=False):
                ranks = label_ranks(features @ weights.T, batch["label"].to(device))
            counts.add(ranks.cpu(), batch["label"].cpu())
    return counts.metrics()


def own_head(
    model: "WithHead", batches: Iterable[Mapping[str, Tensor]], classes: Sequence[str], precision: str = "fp32"
) -> dict[str, float]:
    """Classify by the head of a fine-tuned model; other arguments as in :func:`zero_shot`.

    ``classes`` are the names of the labels, in any order, and may be a subset of the head's classes.

    Raises:
        SettingError: a class that the head does not have.
    """
    known = {name: number for number, name in enumerate(model.classes)}
    unknown = [name for name in classes if name not in known]
    require(not unknown, "classes", unknown[:5], "those of the model's head")
    places = torch.tensor([known[name] for name in classes])
    counts = Counts(len(classes))
    with inference(model, precision) as device:
        for batch in batches:
            logits = model.classify(batch["image"].to(device)).float().cpu()[:, places]
            counts.add(label_ranks(logits, batch["label"].cpu()), batch["label"].cpu())
    return counts.metrics()


class WithHead(Encoder, Protocol):
    """A model with its own classifier."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes."""
        ...

    def classify(self, image: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` -> logits ``[B, C]``."""
        ...


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of classes that rank before the correct one: scores ``[B, C]``, labels int64 ``[B]`` -> int64 ``[B]``.

    At equal scores the lower class number ranks first, as with argmax; so a model that gives every class the same score
    always predicts class 0. NaN never counts as correct.
    """
    right = scores.gather(1, labels[:, None])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    level = scores == right
    ahead = ~(level | (scores < right)) | (level & (numbers < labels[:, None]))
    return ahead.sum(dim=1)


class Counts:
    """Per-class counts, int64 ``[C]``, of all images so far."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.seen, self.first, self.among = torch.zeros(3, classes, dtype=torch.int64).unbind()

    def add(self, ranks: Tensor, labels: Tensor) -> None:
        """Count images by :func:`label_ranks`, int64 ``[B]``, and their labels, int64 ``[B]``."""
        self.seen += torch.bincount(labels, minlength=self.classes)
        self.first += torch.bincount(labels[ranks == 0], minlength=self.classes)
        self.among += torch.bincount(labels[ranks < TOP], minlength=self.classes)

    def metrics(self) -> dict[str, float]:
        """The metrics of :func:`zero_shot`."""
        total = int(self.seen.sum())
        require(total > 0, "batches", total, "one image or more")
        occurring = self.seen > 0
        return {
            "top1": int(self.first.sum()) / total,
            "top5": int(self.among.sum()) / total,
            "mean_per_class": float((self.first[occurring] / self.seen[occurring]).double().mean()),
            "chance": 1 / self.classes,
            "samples": float(total),
        }
