"""What the training loop, the evaluations and the checkpoints know of a method.

A method is found by the name of its module, ``pipeline.models.<name>``: there is no list to add it to. Its module has
a frozen dataclass ``Config`` with the paper's values, and one subclass of :class:`Method` that is built from it.
"""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

import pipeline.models
from pipeline.errors import SettingError
from pipeline.loaders import tokens
from pipeline.loaders.batches import Reader
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.readers import ImageReader, TextReader
from pipeline.loaders.sample_figures import sample_figure
from pipeline.loaders.text import TextSettings, Tokenizer, caption_field
from pipeline.models.losses import ALONE, Exchange, Gather, alone
from pipeline.models.towers.layers import Layer, blocks
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class BatchPlanner(Protocol):
    """Chooses the samples of all batches of an epoch by what the model makes of each sample at the epoch's start."""

    def check(self, samples: int, batch_size: int) -> None:
        """Raise ``SettingError`` where it cannot plan batches of this size for so many samples."""
        ...

    def features(self, method: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Float32 [B, D] of a batch of the training's readers, by the method in evaluation mode."""
        ...

    def plan(self, features: Tensor, steps: int, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Sample numbers int64 [steps, batch_size]: a pure function of these and of all samples' float32 [N, D]."""
        ...


class Method(nn.Module, ABC):
    """A model with its loss, whatever it reads: images, texts, or neither.

    ``model``, where a method has one, is the part that another library can open: it is what ``model.safetensors`` of a
    checkpoint holds, under that library's names. Whatever a method has besides (a projection head for one of its
    losses) is saved beside it. ``gather`` and ``exchange`` are set by the loop when several processes share a batch.
    ``compiled`` is set where the loop compiles the blocks: losses in tiles are compiled with them.
    """

    batch_keys: ClassVar[tuple[str, ...]]
    """Keys of the batches that :meth:`training_step` reads."""
    registered_as: ClassVar[str]
    """Name of the registered MLflow model: ``clip`` for checkpoints that open_clip reads, else the method's name."""
    parity_tolerance: ClassVar[float] = 1e-6
    """Largest difference between the gradients of two processes and of one, relative to the tensor's largest entry."""
    turns: ClassVar[tuple[str, ...]] = ("",)
    """Names of the updates in a step, in their order: one, or several such as a generator's and a discriminator's. Each
    has a forward and a backward pass with the weights that the one before left, and changes the weights that get a
    gradient in it."""
    former_names: ClassVar[Mapping[str, str]] = {}
    """Names that weights outside of ``model`` have in older checkpoints, and their names today."""

    config: Any
    gather: Gather = staticmethod(alone)
    exchange: Exchange = ALONE
    compiled: bool = False

    def __init__(self, config: Any) -> None:
        """A subclass builds its modules here, with the pretrained weights that ``config`` names."""
        super().__init__()
        self.config = config

    @classmethod
    @abstractmethod
    def smallest(cls) -> Any:
        """The smallest config that still has every part: what the tests and the smoke presets run."""

    @classmethod
    def check(cls, config: Any) -> None:  # noqa: B027  # a config that builds needs no more
        """Raise ``SettingError`` for what is wrong with ``config`` and can be known before anything is built."""

    @classmethod
    def check_workers(cls, config: Any, gpus: bool) -> None:  # noqa: B027  # most train anywhere
        """Raise ``SettingError`` for a ``config`` that workers with a GPU each, or without, cannot train together."""

    @classmethod
    def restored(cls, config: Any, description: Mapping[str, str]) -> Self:
        """The modules without initial weights, which a checkpoint brings; ``description`` are its text files."""
        return cls(config)

    def prepare_training(self) -> None:  # noqa: B027  # most methods need nothing more
        """Called once before the first step of a start, on the CPU: load what training alone needs."""

    @classmethod
    def reader_settings(cls, run: Any) -> Any:
        """What the readers need of the settings of a training run: handed to the methods below as ``settings``."""
        return None

    @classmethod
    def sample_fields(cls, config: Any, settings: Any = None) -> Sequence[str]:
        """The sample fields that training reads, as far as they are known before anything is built."""
        return ()

    @classmethod
    def sidecars(cls, config: Any, settings: Any = None) -> Sequence[Wanted]:
        """The sidecars that training reads, likewise."""
        return ()

    @classmethod
    def batch_planner(cls, config: Any) -> BatchPlanner | None:
        """What plans the batches of each epoch; ``None`` shows every sample once an epoch, shuffled."""
        return None

    @abstractmethod
    def readers(self, train: bool, *, seed: int = 0, settings: Any = None) -> Sequence[Reader]:
        """How samples become batches with the keys in ``batch_keys``; ``train`` adds random augmentation."""

    @abstractmethod
    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named losses, scalars whose sum is minimised.

        Each is the mean over this rank's rows of what those rows add to the loss of the global batch, so that the
        mean over ranks is the loss, and its gradient the gradient, of one process with the whole batch.
        """

    def turn_losses(self, batch: Mapping[str, Tensor], turn: str) -> dict[str, Tensor]:
        """Named losses of one of several :attr:`turns`; none leaves the turn out of this step, in all ranks.

        A method with several gives the losses of all of them in :meth:`training_step`, each with gradients of the
        weights that its turn changes.
        """
        raise AssertionError(f"{type(self).__name__} has no turn {turn!r}")

    def forward(self, batch: Mapping[str, Tensor], turn: str = "") -> dict[str, Tensor]:
        """The losses, of one turn where it is named, under the name that ``DistributedDataParallel`` calls."""
        return self.turn_losses(batch, turn) if turn else self.training_step(batch)

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Lengths of ``batch`` by unit, such as ``{"text tokens": 24}``, on which the work of a step depends.

        The work has to be a polynomial of second degree in them. Without any, all batches are the same work a sample.
        """
        return {}

    @classmethod
    def samples_figure(cls, config: Any, settings: Any, samples: Sequence[Sample], title: str) -> "Figure":
        """A figure of a few samples that training reads, for the run's record.

        Here: images with their captions, or a table of the fields where samples have no image. A method with a medium
        of its own draws it on a :func:`~pipeline.loaders.sample_figures.blank_figure`.
        """
        return sample_figure(samples, title)

    def after_step(self) -> None:  # noqa: B027  # most methods have nothing to do here
        """Called after every step of the optimiser."""

    def measures(self) -> dict[str, float]:
        """Numbers worth logging beside the losses, without the prefix ``train/``."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that decay, then those that do not: gains, biases and scalars (CLIP paper, section 2.5)."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for name, parameter in named if decays(name, parameter)]},
            {"params": [parameter for name, parameter in named if not decays(name, parameter)], "weight_decay": 0.0},
        ]

    def layers(self) -> Mapping[str, Layer]:
        """Which tower a parameter is in, by its name, and how deep; parameters of no tower are left out."""
        return {}

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of the model, which are compiled, computed again or sharded one by one."""
        model = getattr(self, "model", None)
        return [] if model is None else list(blocks(model).values())

    def compiled_blocks(self) -> Sequence[nn.Module]:
        """Those of :meth:`blocks` that can be compiled: all, unless torch's compiler does not end with some."""
        return self.blocks()

    def description(self) -> Mapping[str, str]:
        """Further text files of a checkpoint, by name: what the other library needs beside the weights."""
        return {}

    def transformers_files(self) -> Mapping[str, str] | None:
        """Text files with which transformers opens the weights of ``model`` as they are; ``None`` for other models."""
        return None


class ImageTextMethod(Method):
    """A method that reads images and their captions."""

    model: nn.Module
    tokenizer: Tokenizer
    end_of_text: int | None = None

    @abstractmethod
    def transforms(self, train: bool) -> ImageTransform:
        """How an image becomes this method's input; ``train`` adds random augmentation."""

    @classmethod
    def reader_settings(cls, run: Any) -> TextSettings:
        """Where the captions are: ``run.caption`` and ``run.tokens``."""
        return TextSettings(caption=run.caption, tokens=run.tokens)

    @classmethod
    def sample_fields(cls, config: Any, settings: TextSettings | None = None) -> Sequence[str]:
        """Images, and captions where no sidecar has their tokens."""
        text = settings or TextSettings()
        return ("image", *([caption_field(text.caption)] if cls._reads_text() and not text.tokens else []))

    @classmethod
    def sidecars(cls, config: Any, settings: TextSettings | None = None) -> Sequence[Wanted]:
        """The captions' tokens, where the run names a sidecar."""
        stored = settings.tokens if settings and cls._reads_text() else ""
        return [Wanted(name=stored, job=tokens.JOB)] if stored else []

    def readers(self, train: bool, *, seed: int = 0, settings: TextSettings | None = None) -> Sequence[Reader]:
        """Images and captions, those of the two that are among ``batch_keys``."""
        image = [ImageReader(transform=self.transforms(train), seed=seed)] if "image" in self.batch_keys else []
        return [*image, *self.text_readers(settings, seed)]

    def text_readers(self, settings: TextSettings | None = None, seed: int = 0) -> Sequence[Reader]:
        """The reader of captions, or of their tokens in a sidecar; none where ``batch_keys`` has no text.

        ``seed`` decides which of several captions an epoch reads.
        """
        if not self._reads_text():
            return []
        text = settings or TextSettings()
        reader = TextReader(tokenizer=self.tokenizer, end_of_text=self.end_of_text, caption=text.caption, seed=seed)
        return [tokens.from_sidecar(reader, text.tokens) if text.tokens else reader]

    def lengths(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Texts are cut to their batch's longest."""
        return {"text tokens": batch["text"].shape[1]} if "text" in batch else {}

    @classmethod
    def samples_figure(
        cls, config: Any, settings: TextSettings | None, samples: Sequence[Sample], title: str
    ) -> "Figure":
        """Images with the captions that training reads."""
        return sample_figure(samples, title, caption=(settings or TextSettings()).caption)

    @classmethod
    def _reads_text(cls) -> bool:
        return "text" in cls.batch_keys


class EmbeddingMethod(Method):
    """A method whose losses compare embeddings that each row gives without the others.

    Since the two are apart, a batch too large for memory can go through the towers in parts: see
    ``pipeline.training.gradient_cache``.
    """

    @abstractmethod
    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Float tensors [B, ...]. Row i depends on row i of ``batch`` (and on random numbers) alone."""

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fixed targets of the rows' embeddings, such as a teacher's; float tensors [B, ...]."""
        return {}

    @abstractmethod
    def compare(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of :meth:`training_step`, of all of this rank's rows.

        ``embeddings`` are what :meth:`embed` and :meth:`targets` give; the latter get no gradient.
        """

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed, then compare."""
        return self.compare({**self.embed(batch), **self.targets(batch)})


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: open_clip's rule, which leaves out gains, biases and scalars."""
    return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def method_names() -> list[str]:
    """The methods that exist, sorted: the modules and folders with a ``Config`` and one :class:`Method`."""
    return sorted(name for name in _module_names() if _methods_in(_module(name)))


def method_class(name: str) -> type[Method]:
    """The method of the module ``pipeline.models.<name>``.

    Raises:
        SettingError: there is none; those that exist are listed.
    """
    # Only the module that is asked for is imported: all of them take seconds.
    found = _methods_in(_module(name)) if name in _module_names() else []
    if not found:
        raise SettingError("method", name, "one of " + ", ".join(method_names()))
    return found[0]


def config_class(name: str) -> type[Any]:
    """The config of the method ``name``; raises as :func:`method_class`."""
    method_class(name)
    config: type[Any] = import_module(f"pipeline.models.{name}").Config
    return config


def method_name(config: Any) -> str:
    """The name of the method that ``config`` belongs to."""
    return type(config).__module__.removeprefix("pipeline.models.").partition(".")[0]


def build_method(config: Any) -> Method:
    """The method that ``config`` describes, built (with its pretrained weights, if it names some)."""
    build: Callable[[Any], Method] = method_class(method_name(config))
    return build(config)


def _module_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(pipeline.models.__path__)]


def _module(name: str) -> ModuleType:
    return import_module(f"pipeline.models.{name}")


def _methods_in(module: ModuleType) -> list[type[Method]]:
    """The method of ``module``, if it is one: what it only imports from other modules does not count."""
    own = [value for _, value in inspect.getmembers(module, inspect.isclass) if _is_of(value, module.__name__)]
    found: list[type[Any]] = [value for value in own if issubclass(value, Method) and not inspect.isabstract(value)]
    if not found or not any(value.__name__ == "Config" for value in own):
        return []
    assert len(found) == 1, f"{module.__name__} must define exactly one Method, not {found}"
    return found


def _is_of(value: type, module: str) -> bool:
    return (value.__module__ + ".").startswith(module + ".")
