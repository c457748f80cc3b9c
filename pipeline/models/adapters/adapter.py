"""What the six methods and their baselines have in common: a frozen CLIP, class names, and a few learned tensors.

A method is a module of this package with a frozen dataclass ``Config`` and one subclass of :class:`Adapter`. It is
built for some class names, and bound to others where it can be (a learned context is, a cache of labelled images is
not). Its ``state_dict`` holds what it learned and nothing of CLIP.
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
from pipeline.models.towers.weights import weights_digest

SHARED = ("adapter", "prompts", "text", "vision")


class ClassVectorMaker(Protocol):
    """Makes class vectors, float [C, D] of unit length: :func:`pipeline.evaluation.zero_shot.classifier`."""

    def __call__(self, model: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor: ...


class FrozenClip:
    """A CLIP that nothing learns in; it is held outside of modules, so no ``state_dict`` and no optimiser sees it.

    ``classifier`` makes zero-shot class vectors; it belongs to the evaluations, and so is handed in.
    """

    def __init__(self, method: Clip, classifier: ClassVectorMaker) -> None:
        self.method = method.eval().requires_grad_(False)
        self.model: Any = method.model
        self._classifier = classifier

    @property
    def device(self) -> torch.device:
        """Where CLIP is."""
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
        """SHA-256 hex of all its weights: what was learned around one CLIP means nothing to another."""
        return weights_digest(self.model.state_dict())

    def text_tower(self) -> TextTower:
        """The text tower, for learned prompts; raises ``SettingError`` as :class:`TextTower`."""
        return TextTower(self.model, self.method.tokenizer)

    def class_vectors(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The zero-shot classifier: float32 [C, D], unit length.

        Raises:
            SettingError: a name that is too long for the context; it would be cut without a word.
        """
        tokenizer: Any = self.method.tokenizer
        for name in classes:
            most = max(_tokens(tokenizer, template.replace("{}", name)) for template in templates)
            room = int(tokenizer.context_length)
            require(
                most <= room, "classes", name, f"a name that fits {room} tokens with its prompts, which take {most}"
            )
        return self._classifier(self.method, classes, templates).detach()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to what the image tower takes."""
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
    """A method of adaptation, for the class names that it is bound to."""

    reads: ClassVar[Literal["features", "pixels"]] = "features"
    """What :meth:`logits` takes: raw image features, float [B, D], or images, uint8 [B, 3, H, W]."""
    learns: ClassVar[bool] = True
    """Whether there is anything to train by gradients."""
    learns_vectors: ClassVar[bool] = False
    """Whether there are learned class vectors that all images share: :meth:`class_vectors`."""
    per_image: ClassVar[bool] = False
    """Whether every image has class vectors of its own."""
    config: Any
    clip: FrozenClip
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def __init__(self, config: Any, clip: FrozenClip, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Built for ``classes``, whose number and names decide what some methods learn."""
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
        """Whether what was learned serves other class names too."""
        return True

    @abstractmethod
    def build(self) -> None:
        """Make the parameters, for ``learned_classes``."""

    def bind(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Classify into ``classes`` from now on; ``templates`` hold one ``{}`` each, for methods that use them.

        Raises:
            SettingError: class names that are none, doubled or too long, or a method that cannot be bound again.
        """
        check_classes(classes)
        same = tuple(classes) == self.learned_classes
        require(same or self.rebinds, "classes", tuple(classes), "those that it was trained with")
        self.classes, self.templates = tuple(classes), tuple(templates)
        self.rebind()

    @abstractmethod
    def rebind(self) -> None:
        """Make what depends on ``classes`` and ``templates``; nothing of it is learned or saved."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """What ``reads`` says, to float [B, C]."""

    def class_vectors(self) -> Tensor:
        """float [C, D] of unit length, for methods with class vectors that all images share."""
        raise SettingError("method", type(self).__name__, "one whose class vectors are learned and shared by images")

    def vectors_now(self) -> Tensor:
        """:meth:`class_vectors`, made anew unless :meth:`still` keeps them."""
        return self.class_vectors() if self._kept is None else self._kept

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing learns in here, so class vectors are made once: for evaluation, which has many batches."""
        with torch.no_grad():
            self._kept = self.class_vectors() if self.learns_vectors else None
            try:
                yield
            finally:
                self._kept = None

    def prepare(self, shots: Shots) -> None:  # noqa: B027  # most methods learn from batches alone
        """Take in the shots before any training."""

    def select(self, shots: Shots, validation: Shots) -> None:  # noqa: B027  # most have nothing left to choose
        """Choose, after the training, what is chosen by images that are neither shots nor test."""

    def choices(self) -> dict[str, float]:
        """What :meth:`select` chose, by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``state_dict`` gave; raises ``DataError`` where it does not fit."""
        try:
            self.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise DataError(f"these tensors are not of this {type(self).__name__}: {str(error).strip()}") from error

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with labels int64 [B]."""
        return functional.cross_entropy(self.logits(images), labels)

    def head(self) -> Tensor | None:
        """Class vectors, float [C, D] of unit length, that classify as this method does; ``None`` if none can."""
        return None


def _tokens(tokenizer: Any, text: str) -> int:
    """How many tokens ``text`` has if it is not cut, start and end included."""
    encode = getattr(tokenizer, "encode", None)  # open_clip's own; others hold a tokenizer of transformers
    return len(tokenizer.tokenizer(text)["input_ids"]) if encode is None else len(encode(text)) + 2


def unit(features: Tensor) -> Tensor:
    """float [..., D] of length one, in single precision at least."""
    return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def check_classes(classes: Sequence[str]) -> None:
    """Raise ``SettingError`` unless there are two class names or more, none empty and none twice."""
    require(len(classes) >= 2, "classes", tuple(classes), "two class names or more")
    require(all(name.strip() for name in classes), "classes", tuple(classes), "names that are not empty")
    plain = [" ".join(name.replace("_", " ").split()).lower() for name in classes]
    doubled = next((name for name, key in zip(classes, plain, strict=True) if plain.count(key) > 1), None)
    require(
        doubled is None, "classes", doubled, "names that occur once; blanks, underscores and case do not tell apart"
    )


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
