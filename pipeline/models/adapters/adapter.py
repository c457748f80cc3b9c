"""The common part of the six methods and their baselines: a frozen CLIP, class names, and a few trained tensors.

A method is a module of this package with a frozen dataclass ``Config`` and one subclass of :class:`Adapter`. It is
built for some class names and, if its tensors allow it, bound to others later: a learned context allows it, a cache of
labelled images does not. Its ``state_dict`` holds its trained tensors and nothing of CLIP.
"""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import pipeline.models.adapters as package
from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.models.adapters.text import TextTower
from pipeline.models.clip import Clip
from pipeline.models.towers.prompts import count_tokens, fill_template, readable_name
from pipeline.models.towers.weights import weights_digest

SHARED = ("adapter", "prompts", "text", "vision")


class ClassVectorMaker(Protocol):
    """Makes class vectors, float [C, D] of unit length: :func:`pipeline.evaluation.zero_shot.classifier`."""

    def __call__(self, model: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor: ...


class FrozenClip:
    """A frozen CLIP; it is not a submodule, so that no ``state_dict`` and no optimiser contains it.

    ``classifier`` makes zero-shot class vectors; it belongs to the evaluations, so it is passed in.
    """

    def __init__(self, method: Clip, classifier: ClassVectorMaker) -> None:
        self.method = method.eval().requires_grad_(False)
        self.model: Any = method.model
        self._classifier = classifier

    @property
    def device(self) -> torch.device:
        """The device of CLIP."""
        return self.method.mean.device

    @property
    def scale(self) -> float:
        """The factor of the cosines, exp(logit_scale): 100 in OpenAI's weights."""
        return float(self.method.logit_scale.exp())

    @cached_property
    def features(self) -> int:
        """The width D of the joint space."""
        return int(self.class_vectors(("a", "b"), ("{}",)).shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex of all its weights: tensors trained with one CLIP do not work with another."""
        return weights_digest(self.model.state_dict())

    def text_tower(self) -> TextTower:
        """The text tower, for learned prompts; raises ``SettingError`` as :class:`TextTower`."""
        return TextTower(self.model, self.method.tokenizer)

    def class_vectors(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The zero-shot classifier: float32 [C, D], unit length.

        Raises:
            SettingError: a name that does not fit the context, and would be truncated silently.
        """
        tokenizer: Any = self.method.tokenizer
        for name in classes:
            most = max(count_tokens(tokenizer, fill_template(template, name)) for template in templates)
            room = int(tokenizer.context_length)
            require(
                most <= room, "classes", name, f"a name that fits {room} tokens with its prompts, which take {most}"
            )
        return self._classifier(self.method, classes, templates).detach()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the image tower's input."""
        return (images.float() - self.method.mean) / self.method.std

    @torch.no_grad()
    def raw_features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, D], not normalised: some methods average or blend before they normalise."""
        features: Tensor = self.model.encode_image(self.normalised(images.to(self.device)))
        return features.float()


@dataclass(frozen=True)
class Shots:
    """A few labelled images: raw features of several views of each, float [N, V, D], and labels, int64 [N]."""

    features: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        fits = self.features.ndim == 3 and len(self.features) == len(self.labels) > 0
        require(fits, "shots", tuple(self.features.shape), "features [N, V, D] with as many labels, one or more")
        if not bool(self.features.isfinite().all()):
            raise DataError("the features of the shots hold numbers that are not finite: embed the images again")

    def first_view(self) -> Tensor:
        """Raw features of each image's first view, float [N, D]: of validation images, the only one."""
        return self.features[:, 0]


class Adapter(nn.Module, ABC):
    """An adaptation method, bound to class names."""

    reads: ClassVar[Literal["features", "pixels", "views"]] = "features"
    """Input of :meth:`logits`: raw image features, float [B, D]; images, uint8 [B, 3, H, W]; or raw features of all
    views of a point cloud, float [B, V, D]."""
    random_views: ClassVar[bool] = True
    """Whether it reads features of random crops of the shots, where there are some; else of the evaluation view."""
    learns: ClassVar[bool] = True
    """Whether it is trained by gradients."""
    learns_vectors: ClassVar[bool] = False
    """Whether it has learned class vectors shared by all images: :meth:`class_vectors`."""
    per_image: ClassVar[bool] = False
    """Whether every image has its own class vectors."""
    config: Any
    clip: FrozenClip
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def __init__(self, config: Any, clip: FrozenClip, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Build for ``classes``; some methods have parameters that depend on their number and names."""
        super().__init__()
        check_classes(classes)
        self.config, self.clip = config, clip
        self._kept: Tensor | None = None
        self.learned_classes = tuple(classes)
        self.build()
        self.to(clip.device)
        self.bind(classes, templates)

    @property
    def rebinds(self) -> bool:
        """Whether the trained tensors also work for other class names."""
        return True

    @abstractmethod
    def build(self) -> None:
        """Create the parameters, for ``learned_classes``."""

    def bind(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Classify into ``classes`` from now on; ``templates`` have one ``{}`` each, for methods that use them.

        Raises:
            SettingError: missing, duplicate or too long class names, or a method that cannot be bound again.
        """
        check_classes(classes)
        same = tuple(classes) == self.learned_classes
        require(same or self.rebinds, "classes", tuple(classes), "those that it was trained with")
        self.classes, self.templates = tuple(classes), tuple(templates)
        self.rebind()

    @abstractmethod
    def rebind(self) -> None:
        """Compute what depends on ``classes`` and ``templates``; it is neither trained nor saved."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Input of the kind ``reads`` to float [B, C]."""

    def class_vectors(self) -> Tensor:
        """float [C, D] of unit length, for methods with class vectors shared by all images."""
        raise SettingError("method", type(self).__name__, "one whose class vectors are learned and shared by images")

    def vectors_now(self) -> Tensor:
        """:meth:`class_vectors`, recomputed unless :meth:`still` caches them."""
        return self.class_vectors() if self._kept is None else self._kept

    @contextmanager
    def still(self) -> Iterator[None]:
        """Evaluation mode with cached class vectors, over many batches; nothing may be trained in this context."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            self._kept = self.class_vectors() if self.learns_vectors else None
            try:
                yield
            finally:
                self._kept = None
                self.train(was_training)

    def prepare(self, shots: Shots) -> None:  # noqa: B027  # most methods learn from batches alone
        """Receive the shots before the training."""

    def select(self, shots: Shots, validation: Shots) -> None:  # noqa: B027  # most methods select nothing
        """Choose hyperparameters after the training, by images that are neither shots nor test images."""

    def choices(self) -> dict[str, float]:
        """The choices of :meth:`select`, by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a ``state_dict``; raises ``DataError`` if it does not fit."""
        try:
            self.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise DataError(f"these tensors do not fit this {type(self).__name__}: {str(error).strip()}") from error

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with labels int64 [B]."""
        return functional.cross_entropy(self.logits(images), labels)

    def head(self) -> Tensor | None:
        """Class vectors, float [C, D] of unit length, that classify like this method; ``None`` if there are none."""
        return None


def unit(features: Tensor) -> Tensor:
    """float [..., D] of length one, at least in single precision."""
    return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_classes(classes: Sequence[str]) -> None:
    """Raise ``SettingError`` unless there are two class names or more, none empty and none duplicate."""
    require(len(classes) >= 2, "classes", tuple(classes), "two class names or more")
    require(all(name.strip() for name in classes), "classes", tuple(classes), "names that are not empty")
    plain = [readable_name(name).lower() for name in classes]
    doubled = next((name for name, key in zip(classes, plain, strict=True) if plain.count(key) > 1), None)
    require(doubled is None, "classes", doubled, "distinct names, compared without blanks, underscores and case")


def adapter_names() -> list[str]:
    """The methods that exist, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in SHARED)


def adapter_class(name: str) -> type[Adapter]:
    """The method of the module ``pipeline.models.adapters.<name>``.

    Raises:
        SettingError: there is none; those that exist are listed.
    """
    if name not in adapter_names():
        raise SettingError("method", name, "one of " + ", ".join(adapter_names()))
    module = import_module(f"{package.__name__}.{name}")
    found = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    adapters: list[type[Adapter]] = [value for value in found if issubclass(value, Adapter)]
    assert len(adapters) == 1, f"{module.__name__} must define exactly one Adapter, not {adapters}"
    return adapters[0]
