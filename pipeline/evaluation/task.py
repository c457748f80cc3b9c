"""The interface of a kind of evaluation: a module of :mod:`pipeline.evaluation.tasks` with one :class:`Task`.

Its flag is the module's name. The fields of its ``Config`` are the options of a set in its argument,
``NAME=DATA,option=value``; those made by :func:`option` with a ``flag`` are also flags for all sets of the kind.
"""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pipeline.evaluation.tasks
from pipeline.config import require
from pipeline.evaluation.data import Data
from pipeline.loaders.batches import sidecars_of
from pipeline.shards.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cache = dict[object, Any]


@dataclass(frozen=True)
class Column:
    """A column of a report: the metric's name, the column's head, and the number format; percent by default.

    A name that ends in ``*`` stands for every metric that begins so.
    """

    name: str
    title: str = ""
    format: str = ""

    def shown(self, value: float | None) -> str:
        """The number as text."""
        if value is None:
            return "-"
        return format(value, self.format) if self.format else f"{100 * value:.2f} %"


@dataclass(frozen=True)
class Report:
    """The table of metrics named ``<prefix>/<set>/<column>``."""

    prefix: str
    title: str
    columns: tuple[Column, ...]


SAMPLES = Column("samples", format=",.0f")
FOLDS = Column("folds", format=".0f")
ACCURACY = (
    *(Column("top1", "top-1"), Column("top5", "top-5"), Column("mean_per_class", "per class")),
    *(Column("chance"), SAMPLES),
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the samples of all sets are read and encoded."""

    evaluation_samples: int | None = None
    """Samples of each set, at equal distances; none for all of them."""
    evaluation_batch: int = 64
    """Samples per batch of the encoder, 1 to 65,536."""
    evaluation_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the towers; similarities are always fp32."""
    evaluation_threads: int = 4
    """Decoding threads, 1 to 256."""

    def __post_init__(self) -> None:
        cap = self.evaluation_samples
        require(cap is None or cap > 0, "evaluation_samples", cap, "1 or more")
        require(1 <= self.evaluation_batch <= 65_536, "evaluation_batch", self.evaluation_batch, "1 to 65,536")
        require(1 <= self.evaluation_threads <= 256, "evaluation_threads", self.evaluation_threads, "1 to 256")


@dataclass(frozen=True)
class PreparedSet:
    """A set with its data opened. ``ready`` is the result of its task's ``prepare``."""

    name: str
    kind: str
    data: Data
    limit: int | None
    ready: Any = None

    def samples(self, most: int | None = None, readers: Iterable[object] = ()) -> Iterator[Sample]:
        """The samples to evaluate on, with the sidecars that ``readers`` read; at most ``most`` of them."""
        limits = [limit for limit in (self.limit, most) if limit is not None]
        return self.data.samples(min(limits, default=None), sidecars_of(readers))


class Task(ABC):
    """A kind of evaluation."""

    report: ClassVar[Report]
    help: ClassVar[str]
    rank: ClassVar[int] = 9  # position of its sets and its table among the kinds
    options: ClassVar[type[Any]]  # the module's Config

    @abstractmethod
    def check(self, model: object, one: PreparedSet) -> None:
        """Raise ``SettingError`` if ``model`` does not support the set."""

    @abstractmethod
    def prepare(self, config: Any, data: Data, name: str) -> Any:
        """The set's requirements besides its data, from its options; becomes :attr:`PreparedSet.ready`.

        Raises:
            SettingError: invalid options or data.
        """

    @abstractmethod
    def run(self, model: Any, one: PreparedSet, reading: Reading, cache: Cache) -> dict[str, float]:
        """The metrics of a set. ``cache`` exists while the model is evaluated, for results that sets share."""

    def figures(self, model: Any, one: PreparedSet, title: str) -> dict[str, "Figure"]:
        """Figures of a few samples; a slash and the set's name are appended to each name."""
        return {}

    def files(self, model: Any, one: PreparedSet) -> dict[str, bytes]:
        """Files of a few samples beside the figures, such as sounds to play, by name with its ending."""
        return {}


def option(default: Any, flag: str = "", help: str = "") -> Any:
    """An option of a set; with ``flag`` also a flag of that name, which sets the default of all sets of the kind."""
    return field(default=default, metadata={"flag": flag, "help": help})


def task_names() -> list[str]:
    """The existing kinds, sorted by their rank."""
    found = [module.name for module in pkgutil.iter_modules(pipeline.evaluation.tasks.__path__)]
    return sorted(found, key=lambda name: (_task(name).rank, name))


def tasks() -> dict[str, Task]:
    """All kinds by name, in the order of :func:`task_names`."""
    return {name: _task(name) for name in task_names()}


def _task(name: str) -> Task:
    module = import_module(f"pipeline.evaluation.tasks.{name}")
    classes: list[type[Any]] = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    found = [value for value in classes if issubclass(value, Task) and value.__module__ == module.__name__]
    assert len(found) == 1, f"{module.__name__} must define exactly one Task, not {found}"
    made: Task = found[0]()
    return made
