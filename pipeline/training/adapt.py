"""Adapt a frozen CLIP from a few labelled images: one runner for all methods of ``pipeline.models.adapters``.

    adapted = adapt("coop", coop.Config(), paper_recipe("coop", 16), clip, classes, templates, train, validation)
    accuracy(adapted.adapter, test)

Validation images choose the epoch, Tip-Adapter's alpha and beta, and the linear probe's C; this module never sees test
images. The order of images, their views and crops are pure functions of (seed, epoch), so two runs with the same
arguments on the same machine, with as many threads, give the same bits.

In a process group all ranks call with the same arguments. The classes of a learned prompt are spread over the ranks:
each rank runs the text tower for its own classes and gathers the features of all. The gradients are those of one
process. Use it for a thousand classes and a large tower; methods without learned prompts do the same work in every
rank.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.images import ImageTransform, crop_bits
from pipeline.loaders.order import RandomStream, permutation, random_bits
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.work_progress import WorkProgress
from pipeline.models.adapters.adapter import Adapter, FrozenClip, Shots, adapter_class
from pipeline.models.adapters.text import Spread, TextTower
from pipeline.models.towers import openclip
from pipeline.training import distributed
from pipeline.training.adapt_recipes import AdaptRecipe, make_optimizer

logger = logging.getLogger(__name__)

FEATURES_AT_ONCE, PIXELS_AT_ONCE, PROMPTS_AT_ONCE = 4096, 64, 2048

Log = Callable[[Mapping[str, float], int], object]
"""Gets the metrics of an epoch and its number, from 1 on: ``Tracker.log`` is one."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images with class numbers, int64 [N]: as raw features, float [N, V, D] of V views, as encoded files, or both.

    Methods that read features need these: they use all views of the shots, and the first view of validation and test
    images. Methods that read views use all of them, always. Methods that read pixels need the files.
    """

    labels: Tensor
    features: Tensor | None = None
    images: Sequence[bytes] | None = None

    def __post_init__(self) -> None:
        require(len(self.labels) > 0, "labels", len(self.labels), "one image or more")
        if self.features is not None:
            Shots(self.features, self.labels)
        if self.images is not None:
            require(len(self.images) == len(self.labels), "images", len(self.images), f"{len(self.labels)}")
        require(self.features is not None or self.images is not None, "data", "empty", "features or images")

    def __len__(self) -> int:
        return len(self.labels)

    def shots(self) -> Shots:
        """The features; raises ``SettingError`` if there are none."""
        if self.features is None:
            raise SettingError("data", "images alone", "features, for a method that reads features")
        return Shots(self.features, self.labels)


@dataclass(frozen=True)
class Accuracy:
    """Counts, int64 [C] each: correctly classified images of a class, and all its images."""

    right: Tensor
    seen: Tensor
    loss: float
    """Mean cross-entropy."""

    @property
    def top1(self) -> float:
        """Accuracy over all images, 0 to 1."""
        return int(self.right.sum()) / int(self.seen.sum())

    @property
    def mean_per_class(self) -> float:
        """The mean of the classes' accuracies, over classes that occur."""
        occurs = self.seen > 0
        return float((self.right[occurs] / self.seen[occurs]).double().mean())


@dataclass(frozen=True)
class Adapted:
    """A trained method, with its config, recipe and history."""

    method: str
    config: Any
    recipe: AdaptRecipe | None
    seed: int
    adapter: Adapter
    chosen: Mapping[str, float]
    """Choices by validation images: ``epoch`` (from 1), ``alpha``, ``beta``, ``C``; empty if the method has none."""
    history: tuple[Mapping[str, float], ...]
    """For each epoch ``epoch``, ``train/loss``, ``train/lr``, ``validation/top1``, ``validation/loss``."""


def adapt(
    method: str,
    config: Any,
    recipe: AdaptRecipe | None,
    clip: FrozenClip,
    classes: Sequence[str],
    templates: Sequence[str],
    train: Labelled,
    validation: Labelled,
    *,
    seed: int = 0,
    log: Log | None = None,
) -> Adapted:
    """Build ``method`` for ``classes``, train it, and select by ``validation``.

    Args:
        method: a module of ``pipeline.models.adapters``.
        config: its ``Config``; a field ``seed`` is set to ``seed``.
        recipe: the training recipe, such as from :func:`paper_recipe`; ``None`` for methods without training.
        clip: the model, on the device that computes.
        classes: the names of the labels 0, 1, ...
        templates: prompts with a ``{}``, for the methods that use them.
        train: the shots.
        validation: images of the same classes that are neither shots nor test images.
        seed: seed of the initial values, the order, views and crops.
        log: gets each epoch's metrics.

    Raises:
        SettingError: an invalid setting of the method, labels outside of the classes, data without the method's
            inputs, or a learning rate with which the loss becomes non-finite.
    """
    kind = adapter_class(method)
    require(0 <= seed < 2**63, "seed", seed, "0 to 2**63 - 1")
    if hasattr(config, "seed"):
        config = replace(config, seed=seed)
    adapter = kind(config, clip, classes, templates)
    for name, data in (("train", train), ("validation", validation)):
        _check(name, data, adapter)
    if adapter.reads != "pixels":
        adapter.prepare(_on(train.shots(), clip.device))
    history: list[Mapping[str, float]] = []
    chosen: dict[str, float] = {}
    if adapter.learns:
        require(recipe is not None, "recipe", None, f"a recipe, for {method} learns by gradients")
        assert recipe is not None
        recipe.check_for(kind)
        with _spread(adapter):
            chosen["epoch"] = _AdapterTraining(adapter, recipe, train, validation, seed, log).run(history)
    if adapter.reads != "pixels":
        adapter.select(_on(train.shots(), clip.device), _on(validation.shots(), clip.device))
    chosen |= adapter.choices()
    return Adapted(method, config, recipe, seed, adapter.eval(), chosen, tuple(history))


def accuracy(adapter: Adapter, data: Labelled) -> Accuracy:
    """Classify ``data`` into the classes of ``adapter``; of equal logits the lower class wins.

    Raises:
        SettingError: labels outside of the classes, or data without the method's inputs.
    """
    return accuracy_of(batch_logits(adapter, data), len(adapter.classes))


def accuracy_of(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Accuracy:
    """The accuracy by logits of ``count`` classes, float [B, C], and labels, int64 [B], of one sample or more."""
    right, seen, loss = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), 0.0
    for logits, labels in batches:
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        hits = logits.argmax(dim=1) == labels
        seen += torch.bincount(labels, minlength=count)
        right += torch.bincount(labels[hits], minlength=count)
    return Accuracy(right, seen, loss / int(seen.sum()))


def batch_logits(adapter: Adapter, data: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of ``data`` in order, float32 [B, C], with their labels, int64 [B], on the CPU; raises as
    :func:`accuracy`."""
    _check("data", data, adapter)
    images = _Images(adapter, data)
    with adapter.still():
        for numbers in np.array_split(np.arange(len(data)), -(-len(data) // _at_once(adapter))):
            labels = data.labels[torch.from_numpy(numbers)].cpu()
            yield adapter.logits(images.plain(numbers)).float().cpu(), labels


class _AdapterTraining:
    """The training epochs of one method."""

    def __init__(
        self, adapter: Adapter, recipe: AdaptRecipe, train: Labelled, validation: Labelled, seed: int, log: Log | None
    ) -> None:
        self.adapter, self.recipe, self.train, self.validation = adapter, recipe, train, validation
        self.seed, self.log = seed, log
        self.images = _Images(adapter, train, recipe, seed)
        self.optimizer = make_optimizer(recipe, adapter.parameters())

    def run(self, history: list[Mapping[str, float]]) -> int:
        """Run all epochs; restores the chosen epoch's weights and returns its number, from 1 on."""
        best: tuple[float, float] | None = None
        chosen, kept = self.recipe.epochs, None
        progress = WorkProgress(logger, type(self.adapter).__name__, "epochs", self.recipe.epochs)
        for epoch in range(self.recipe.epochs):
            numbers = {"epoch": float(epoch + 1), **self._epoch(epoch)}
            if self.recipe.select == "validation":
                found = accuracy(self.adapter, self.validation)
                top1, loss = distributed.from_first((found.top1, found.loss))
                numbers |= {"validation/top1": top1, "validation/loss": loss}
                if best is None or (top1, -loss) > best:
                    best, chosen = (top1, -loss), epoch + 1
                    kept = {name: tensor.clone() for name, tensor in self.adapter.state_dict().items()}
            history.append(numbers)
            if self.log is not None:
                self.log(numbers, epoch + 1)
            if distributed.rank() == 0:
                progress.advance()
        if kept is not None:
            self.adapter.restore(kept)
        return chosen

    def _epoch(self, epoch: int) -> dict[str, float]:
        steps = self.recipe.steps(len(self.train))
        total = torch.zeros((), dtype=torch.float64)
        for step, numbers in enumerate(self._batches(epoch, steps)):
            rate = self.recipe.rate(epoch, step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            total += self._step(numbers, epoch)
        self._require_finite(all(bool(learned.isfinite().all()) for learned in self.adapter.parameters()), epoch)
        return {"train/loss": float(total) / steps, "train/lr": rate}

    def _step(self, numbers: Any, epoch: int) -> float:
        labels = self.train.labels[torch.from_numpy(numbers)].to(self.adapter.clip.device)
        images, low = self.images.view(numbers, epoch), self.recipe.precision == "bf16"
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=low):
            loss = self.adapter.loss(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        value = float(loss.detach())
        self._require_finite(np.isfinite(value), epoch)
        distributed.average_gradients(self.adapter)
        self.optimizer.step()
        return value

    def _require_finite(self, finite: bool, epoch: int) -> None:
        allowed = f"a rate at which all stays finite: in epoch {epoch + 1} it did not"
        require(finite, "learning_rate", self.recipe.learning_rate, allowed)

    def _batches(self, epoch: int, steps: int) -> Iterator[Any]:
        order = permutation(self.seed, RandomStream.FEW_SHOT_ORDER, epoch, 0, len(self.train))
        size = self.recipe.batch_size
        return (order[step * size : (step + 1) * size] for step in range(steps))


class _Images:
    """The inputs of an adapter, by image numbers."""

    def __init__(self, adapter: Adapter, data: Labelled, recipe: AdaptRecipe | None = None, seed: int = 0) -> None:
        self.device, self.seed = adapter.clip.device, seed
        self.features = None if adapter.reads == "pixels" else data.shots().features.to(self.device)
        self.whole = adapter.reads == "views"
        if self.features is None:
            assert data.images is not None
            self.images = data.images
            self.still = openclip.image_transform(adapter.clip.model)
            if recipe is not None:
                self.random = openclip.image_transform(adapter.clip.model, **recipe.crops())

    def plain(self, numbers: Any) -> Tensor:
        """The first view, all views, or the evaluation transform."""
        if self.features is not None:
            few = self.features[torch.from_numpy(numbers).to(self.device)]
            return few if self.whole else few[:, 0]
        return self._read(self.still, numbers, None)

    def view(self, numbers: Any, epoch: int) -> Tensor:
        """One of the views, or a random crop: a pure function of (seed, epoch, number). Or all views."""
        if self.features is None:
            return self._read(self.random, numbers, epoch)
        if self.whole:
            return self.plain(numbers)
        views = random_bits(self.seed, RandomStream.CHOSEN_VIEWS, epoch, 0, len(self.features))
        chosen = (views % np.uint64(self.features.shape[1])).astype(np.int64)[numbers]
        rows = torch.from_numpy(np.stack([numbers, chosen])).to(self.device)
        return self.features[rows[0], rows[1]]

    def _read(self, transform: ImageTransform, numbers: Any, epoch: int | None) -> Tensor:
        bits = [None if epoch is None else crop_bits(self.seed, epoch, int(number)) for number in numbers]
        contents = [self.images[int(number)] for number in numbers]
        try:
            images = [transform.read(content, random) for content, random in zip(contents, bits, strict=True)]
        except UnreadableSample as error:
            raise DataError(f"one of the images {numbers.tolist()} cannot be read: {error}") from error
        return torch.stack(images).to(self.device)


def _check(name: str, data: Labelled, adapter: Adapter) -> None:
    """Raise ``SettingError`` unless ``data`` has the inputs of ``adapter`` and labels of its classes."""
    has = data.images if adapter.reads == "pixels" else data.features
    kind = type(adapter).__name__
    require(has is not None, name, "other data", f"{adapter.reads} of images, which {kind} reads")
    if data.features is not None and adapter.reads != "pixels":
        width = adapter.clip.features
        if data.features.shape[-1] != width:
            raise DataError(f"{name}: features of width {data.features.shape[-1]}, and this CLIP's have {width}")
    low, high, classes = int(data.labels.min()), int(data.labels.max()), len(adapter.classes)
    require(0 <= low and high < classes, name, (low, high), f"labels from 0 to {classes - 1}")


@contextmanager
def _spread(adapter: Adapter) -> Iterator[None]:
    """Share the classes of a learned prompt with the other processes of the group, if there is one."""
    tower = getattr(adapter, "tower", None)
    if not isinstance(tower, TextTower) or distributed.world() == 1:
        yield
        return
    tower.spread = Spread(distributed.rank(), distributed.world(), distributed.gather)
    try:
        yield
    finally:
        tower.spread = None  # a later user may run without a process group


def _at_once(adapter: Adapter) -> int:
    """Number of images per forward pass of ``adapter``, to bound the memory."""
    if adapter.reads == "pixels":
        return PIXELS_AT_ONCE
    return max(1, PROMPTS_AT_ONCE // len(adapter.classes)) if adapter.per_image else FEATURES_AT_ONCE


def _on(shots: Shots, device: torch.device) -> Shots:
    return Shots(shots.features.to(device), shots.labels.to(device))
