"""Zero-shot classification with an ensemble of prompts.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
section 3.1.4: every class name is inserted into every template, the texts' unit features are averaged and normalised,
and an image belongs to the class with the nearest mean. The paper's ViT-B/32 reaches 63.2 % on ImageNet with 80
templates; open_clip measures 63.3 % for the released weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.evaluation.accuracy import Counts, FoldCounts, label_ranks
from pipeline.evaluation.encoder import TEXTS_AT_ONCE, Encoder, encode_tokens, inference
from pipeline.evaluation.media import encode_inputs, inputs_of
from pipeline.models.towers.prompts import average_prompts, fill_template

NO_TEMPLATE = ("{}",)
PROMPT_SCALE = 100.0  # factor of the cosines in the softmax of each prompt


def classifier(
    model: Encoder, classes: Sequence[str], templates: Sequence[str] = NO_TEMPLATE, precision: str = "fp32"
) -> Tensor:
    """The class vectors, float32 ``[C, D]``, unit length, on the model's device.

    ``templates`` have one ``{}`` each for the class name, whose underscores become blanks. Prompts are encoded a few
    hundred at a time, so ImageNet's 80,000 are never in memory together.
    """
    return torch.cat([average_prompts(part, len(templates)) for part in _encoded(model, classes, templates, precision)])


def prompt_vectors(
    model: Encoder, classes: Sequence[str], templates: Sequence[str] = NO_TEMPLATE, precision: str = "fp32"
) -> Tensor:
    """The vectors of all prompts, float32 ``[P, C, D]`` for P templates; other arguments as for :func:`classifier`.

    Classified by the mean over templates of the softmax over classes: the protocol of ActionCLIP (arXiv 2109.08472),
    whose code multiplies cosines by 100.
    """
    parts = [part.unflatten(0, (-1, len(templates))) for part in _encoded(model, classes, templates, precision)]
    return torch.cat(parts).transpose(0, 1)


def _encoded(model: Encoder, classes: Sequence[str], templates: Sequence[str], precision: str) -> Iterator[Tensor]:
    """Unit features of the prompts of some classes at a time, class after class."""
    require(len(classes) > 1, "classes", tuple(classes), "two class names or more")
    require(len(templates) > 0, "templates", tuple(templates), "one template or more")
    classes_at_once = max(1, TEXTS_AT_ONCE // len(templates))
    for start in range(0, len(classes), classes_at_once):
        names = classes[start : start + classes_at_once]
        prompts = [fill_template(template, name) for name in names for template in templates]
        with inference(model, precision) as device:
            features = encode_tokens(model, model.tokenizer(prompts), device)
        yield features


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
        class_vectors: float ``[C, D]``, from :func:`classifier`, or ``[P, C, D]``, from :func:`prompt_vectors`.
        precision: "fp32" or "bf16".
        medium: key of the inputs.

    Returns:
        ``top1``, ``top5``, ``mean_per_class`` (top-1, averaged over the classes that occur) and ``chance`` (top-1
        of random guessing), all in 0 ... 1; ``samples``. With folds, the means over folds, see :class:`FoldCounts`.
    """
    counts = FoldCounts(class_vectors.shape[-2])
    with inference(model, precision) as device:
        weights = class_vectors.to(device).float()
        for batch in batches:
            features = encode_inputs(model, medium, batch, device)
            with torch.autocast(device.type, enabled=False):
                ranks = label_ranks(class_scores(features, weights), batch["label"].to(device))
            counts.add(ranks.cpu(), batch["label"].cpu(), batch.get("fold"))
    return counts.metrics()


def class_scores(features: Tensor, vectors: Tensor) -> Tensor:
    """Scores ``[B, C]`` of unit features ``[B, D]`` by class vectors ``[C, D]``, or by prompts ``[P, C, D]``."""
    if vectors.ndim == 2:
        return features @ vectors.T
    logits = PROMPT_SCALE * torch.einsum("bd,pcd->bpc", features, vectors)
    return logits.softmax(dim=-1).mean(dim=1)


def own_head(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    classes: Sequence[str],
    precision: str = "fp32",
    medium: str = "image",
) -> dict[str, float]:
    """Classify by the head of a fine-tuned model; other arguments as in :func:`zero_shot`.

    ``model`` has the names of its head's classes in ``classes``, and for images ``classify``, for another medium M
    ``classify_M``, from a batch's inputs to logits ``[B, C]``.

    ``classes`` are the names of the labels, in any order, and may be a subset of the head's classes.

    Raises:
        SettingError: a class that the head does not have.
    """
    known = {name: number for number, name in enumerate(model.classes)}
    unknown = [name for name in classes if name not in known]
    require(not unknown, "classes", unknown[:5], "those of the model's head")
    places = torch.tensor([known[name] for name in classes])
    counts, classify = Counts(len(classes)), head_of(model, medium)
    assert classify is not None, "a model with a head"
    with inference(model, precision) as device:
        for batch in batches:
            logits = classify(*inputs_of(batch, medium, device)).float().cpu()[:, places]
            counts.add(label_ranks(logits, batch["label"].cpu()), batch["label"].cpu())
    return counts.metrics()


def head_of(model: object, medium: str) -> Callable[..., Tensor] | None:
    """The classifying method of a model with a head for this medium; ``None`` without one."""
    found = getattr(model, "classify" if medium == "image" else f"classify_{medium}", None)
    return found if callable(found) and bool(getattr(model, "classes", None)) else None
