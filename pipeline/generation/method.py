"""The methods that optimise images: one file each in ``pipeline/generation/methods``, found by its name.

A method's module has one :class:`GenerationMethod`, and a frozen dataclass ``Config`` with the paper's values and a
``loop``. The method makes the first images and says what makes them better; :mod:`pipeline.generation.loop` does the
rest.
"""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

import pipeline.generation.methods as package
from pipeline.config import near
from pipeline.errors import SettingError
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopConfig, Objective, Picture
from pipeline.generation.prompts import WeightedPrompt
from pipeline.models.towers.image_codes import ImageCodes

NO_CODES: Mapping[str, ImageCodes] = MappingProxyType({})


@dataclass(frozen=True)
class Subject:
    """What an image shows: prompts, or another image float [3, H, W] from 0 to 1 over white."""

    prompts: tuple[WeightedPrompt, ...] = ()
    image: Tensor | None = None


class GenerationMethod(ABC):
    """One way to optimise images."""

    reads: ClassVar[Literal["text", "image"]] = "text"
    """What a subject must have."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def loop(self) -> LoopConfig:
        """Length of the optimisation: ``loop`` of the config."""
        loop: LoopConfig = self.config.loop
        return loop

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """Addresses of all CLIPs that it needs."""

    @property
    def codes(self) -> tuple[str, ...]:
        """Addresses of the image codes that it needs."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """Paths or URIs of other files that its images depend on."""
        return ()

    def check(self, subject: Subject) -> None:  # noqa: B027  # most subjects fit if they can be read
        """Check what can be told of one subject without a model, before anything is drawn; nothing by default.

        Raises:
            SettingError: a subject that does not fit the method.
        """

    @abstractmethod
    def start(
        self,
        subjects: Sequence[Subject],
        seeds: Sequence[int],
        guides: Mapping[str, Guide],
        codes: Mapping[str, ImageCodes] = NO_CODES,
    ) -> tuple[Picture, Objective]:
        """The first images, one for each subject and seed, and what makes them better.

        ``guides`` and ``codes`` hold each of ``models`` and of :attr:`codes` by its address.

        Raises:
            SettingError: a subject or a CLIP that does not fit the method.
        """


def generation_names() -> list[str]:
    """The methods that exist, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def generation_class(name: str) -> type[GenerationMethod]:
    """The method of the module ``pipeline.generation.methods.<name>``.

    Raises:
        SettingError: there is none; those that exist are listed.
    """
    names = generation_names()
    if name not in names:
        raise SettingError("method", name, f"one of {', '.join(names)}{near(name, names)}")
    module = import_module(f"{package.__name__}.{name}")
    own = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    found = [value for value in own if issubclass(value, GenerationMethod)]
    assert len(found) == 1, f"{module.__name__} must define exactly one GenerationMethod, not {found}"
    return found[0]


def generation_config(name: str) -> type[Any]:
    """The ``Config`` of the method ``name``; raises as :func:`generation_class`."""
    config: type[Any] = import_module(generation_class(name).__module__).Config
    return config
