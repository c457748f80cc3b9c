"""Zero-shot classification with an ensemble of prompts.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
section 3.1.4: every class name is inserted into every template, the texts' unit features are averaged and normalised,
and an image belongs to the class with the nearest mean. The paper's ViT-B/32 reaches 63.2 % on ImageNet with 80
templates; open_clip measures 63.3 % for the released weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.accuracy import Counts, FoldCounts, label_ranks
from pipeline.evaluation.encoder import TEXTS_AT_ONCE, Encoder, encode_tokens, inference
from pipeline.evaluation.media import encode_inputs
from pipeline.models.towers.prompts import average_prompts, fill_template

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
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    class_vectors: Tensor,
    precision: str = "fp32",
    medium: str = "image",
) -> dict[str, float]:
    """Classify the images, or the inputs of another medium, of ``batches`` by their nearest class vector.

    Args:
        model: encodes the medium, see :mod:`pipeline.evaluation.media`.
        batches: mappings with the medium's inputs, such as ``image``, uint8 ``[B, 3, H, W]``, and ``label``, int64
            ``[B]`` in ``0 ... C - 1``. ``fold``, a list of ``B`` texts, may be there.
        class_vectors: float ``[C, D]``, from :func:`classifier`.
        precision: "fp32" or "bf16".
        medium: key of the inputs.

    Returns:
        ``top1``, ``top5``, ``mean_per_class`` (top-1, averaged over the classes that occur) and ``chance`` (top-1
        of random guessing), all in 0 ... 1; ``samples``. With folds, the means over folds, see :class:`FoldCounts`.
    """
    counts = FoldCounts(len(class_vectors))
    with inference(model, precision) as device:
        weights = class_vectors.to(device).float()
        for batch in batches:
            features = encode_inputs(model, medium, batch, device)
            with torch.autocast(device.type, enabled=False):
                ranks = label_ranks(features @ weights.T, batch["label"].to(device))
            counts.add(ranks.cpu(), batch["label"].cpu(), batch.get("fold"))
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
