"""The filters of a job: which, in which order, and the options of each.

The filters are the modules of :mod:`pipeline.stages.filters` that define a :class:`Filter`; nothing here knows one of
them. A filter's ``name`` is a word of ``--steps`` and the field of its options.
"""

import inspect
import pkgutil
import textwrap
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import pipeline.stages.filters
from pipeline.config import require
from pipeline.stages.filters.filter import Filter

HELP_WIDTH = 116


@dataclass(frozen=True, kw_only=True)
class FilterSteps:
    """What :class:`Filters` has besides its fields."""

    def chosen(self) -> tuple[Filter, ...]:
        """The filters that run, in order.

        Raises:
            SettingError: a step that does not exist.
        """
        known = [name for name, value in vars(self).items() if isinstance(value, Filter)]
        steps: tuple[str, ...] = vars(self)["steps"]
        for step in steps:
            require(step in known, "steps", step, ", ".join(known))
        return tuple(getattr(self, step) for step in steps)


def filter_classes() -> dict[str, type[Filter]]:
    """The filters that exist by name, in the order of their ranks."""
    found: list[type[Filter]] = []
    for module in pkgutil.iter_modules(pipeline.stages.filters.__path__):
        name = f"{pipeline.stages.filters.__name__}.{module.name}"
        if name != __name__:
            classes = [value for _, value in inspect.getmembers(import_module(name), inspect.isclass)]
            found += [value for value in classes if issubclass(value, Filter) and value.__module__ == name]
    named = [value for value in found if hasattr(value, "name")]  # not what several filters share
    return {value.name: value for value in sorted(named, key=lambda value: (value.rank, value.name))}


def filters_class() -> type[FilterSteps]:
    """:class:`Filters`, made of the filters that exist now: ``steps``, and a field with the options of each."""
    found = filter_classes()
    help = textwrap.fill(f"Of {', '.join(found)}.", HELP_WIDTH)
    fields: list[tuple[str, Any, Any]] = [("steps", Annotated[tuple[str, ...], tyro.conf.arg(help=help)], field())]
    fields += [(name, kind, field(default_factory=kind)) for name, kind in found.items()]
    made = make_dataclass("Filters", fields, bases=(FilterSteps,), frozen=True, kw_only=True)
    made.__module__ = __name__
    made.__doc__ = "All filters with their options; only those in ``steps`` run, in that order."
    return made


if TYPE_CHECKING:

    class Filters(FilterSteps):
        """All filters with their options; only those in ``steps`` run, in that order: :func:`filters_class`."""

        def __init__(self, *, steps: tuple[str, ...], **options: Filter) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    Filters = filters_class()
