"""Evaluations by name: the sets, each with its options, and one call that runs them all on a model.

    prepared = Evaluations(zero_shot=("drawn_shapes", "imagenet=s3://bucket/val,templates=imagenet-simple")).prepare()
    evaluate(model, prepared)  ->  {"zeroshot/drawn_shapes/top1": 0.61, ..., "zeroshot/imagenet/chance": 0.001, ...}

Preparing reads cards and manifests, so a wrong name is detected before a model is loaded. The kinds are the modules of
:mod:`pipeline.evaluation.tasks`; this module does not depend on any of them.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pipeline.config import from_plain, require
from pipeline.errors import SettingError
from pipeline.evaluation.data import open_data
from pipeline.evaluation.task import Cache, PreparedSet, Reading, Task, tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One set. ``data`` is a dataset card's name or YAML file, or the folder of a snapshot, ``folder[@id]``; ``own``
    are the options in its argument, ``config`` is all of its options."""

    name: str
    data: str
    kind: str
    samples: int | None = None
    config: Any = None
    own: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        plain = bool(re.fullmatch(r"[\w.\-]+", self.name))
        require(plain, "name", self.name, "letters, digits, '.', '_' and '-' (it is part of the metrics' names)")
        require(self.samples is None or self.samples > 0, "samples", self.samples, "1 or more")

    def prepare(self) -> PreparedSet:
        """Open the data and prepare its task; raises as :meth:`Sets.prepare`."""
        data = open_data(self.data)
        ready = tasks()[self.kind].prepare(self.config, data, self.name)
        return PreparedSet(self.name, self.kind, data, self.samples, ready)


@dataclass(frozen=True, kw_only=True)
class Sets(Reading):
    """The fields of :class:`Evaluations` besides the flags of the kinds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in tasks():
            names = [one.name for one in self.sets() if one.kind == kind]
            require(len(set(names)) == len(names), kind, names, "sets with different names (NAME=DATA names one)")

    def sets(self) -> tuple[EvaluationSet, ...]:
        """The sets, in the order of the kinds."""
        return tuple(self._set(kind, one, text) for kind, one in tasks().items() for text in getattr(self, kind, ()))

    def prepare(self) -> "PreparedSuite":
        """Read cards, manifests, class and template files.

        Raises:
            SettingError: an unknown set, a set without classes, a template without ``{}``, a setting that no set
                uses. DataError: an invalid snapshot.
        """
        sets = self.sets()
        self._check_used(sets)
        return PreparedSuite(self, tuple(one.prepare() for one in sets))

    def _set(self, kind: str, one: Task, text: str) -> EvaluationSet:
        text, own = own_options(text)
        allowed = [option.name for option in fields(one.options)]
        for name, value in own.items():
            require(
                name in (*allowed, "samples"), kind, f"{name}={value}", "one of " + ", ".join((*allowed, "samples"))
            )
        shared = {name: getattr(self, flag) for name, flag in flags_of(one).items()}
        cap = own.pop("samples", None)
        if cap is not None and not cap.isdecimal():
            raise SettingError(f"{kind}: samples", cap, "a number of samples, 1 or more")
        name, data = name_and_data(text)
        return EvaluationSet(
            name=name,
            data=data,
            kind=kind,
            samples=self.evaluation_samples if cap is None else int(cap),
            config=from_plain(one.options, {**shared, **own}, origin=kind),
            own=frozenset(own),
        )

    def _check_used(self, sets: tuple[EvaluationSet, ...]) -> None:
        """Refuse a setting that no set uses; it would be ignored silently."""
        used: set[str] = set()
        takers: dict[str, list[str]] = {}
        for kind, one in tasks().items():
            for name, flag in flags_of(one).items():
                takers.setdefault(flag, []).append("--" + kind.replace("_", "-"))
                used |= {flag for given in sets if given.kind == kind and name not in given.own}
        for setting in fields(self):
            value, flag = getattr(self, setting.name), setting.name
            if flag in takers and flag not in used and value != setting.default:
                raise SettingError(
                    flag, value, f"{setting.default!r}, since no set of {' or '.join(takers[flag])} uses it"
                )


def flags_of(one: Task) -> dict[str, str]:
    """The options of a task's sets that are also flags, by option, with the flags' names."""
    return {option.name: option.metadata["flag"] for option in fields(one.options) if option.metadata.get("flag")}


def evaluations_class() -> type[Sets]:
    """:class:`Evaluations`, made from the existing tasks: a flag for each kind, and those of their options."""
    found = tasks()
    kinds: list[tuple[str, Any, Any]] = [
        (kind, Annotated[tuple[str, ...], tyro.conf.arg(help=one.help)], field(default=()))
        for kind, one in found.items()
    ]
    options: dict[str, tuple[str, Any, Any]] = {}
    for one in found.values():
        for given in fields(one.options):
            flag = given.metadata.get("flag")
            if flag:
                kind: Any = Annotated[given.type, tyro.conf.arg(help=given.metadata["help"])]
                options.setdefault(flag, (flag, kind, field(default=given.default)))
    made = make_dataclass("Evaluations", [*kinds, *options.values()], bases=(Sets,), frozen=True, kw_only=True)
    made.__module__, made.__doc__ = __name__, "Which sets are evaluated, and how."
    return made


if TYPE_CHECKING:

    class Evaluations(Sets):
        """Which sets are evaluated, and how: :func:`evaluations_class`."""

        def __init__(self, **settings: Any) -> None: ...

else:
    Evaluations = evaluations_class()


@dataclass(frozen=True)
class PreparedSuite:
    """Everything that :func:`evaluate` needs besides a model."""

    settings: Reading
    sets: tuple[PreparedSet, ...]


def evaluate(model: object, prepared: PreparedSuite) -> dict[str, float]:
    """Run all sets: ``{"zeroshot/<set>/top1": ..., "retrieval/<set>/i2t_r1": ..., "det/<set>/ap_novel": ...}``.

    Raises:
        SettingError: the model does not support a set's task.
        DataError: no readable sample, a label outside of the classes, a damaged shard.
    """
    cache: Cache = {}
    metrics: dict[str, float] = {}
    kinds: Mapping[str, Task] = tasks()
    for one in prepared.sets:  # check all of them before the first one runs for hours
        kinds[one.kind].check(model, one)
    for one in prepared.sets:
        prefix = kinds[one.kind].report.prefix
        found = kinds[one.kind].run(model, one, prepared.settings, cache)
        logger.info("%s %s: %s", prefix, one.name, ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        metrics |= {f"{prefix}/{one.name}/{name}": value for name, value in found.items()}
    return metrics


def own_options(text: str) -> tuple[str, dict[str, str]]:
    """``("it=folder", {"templates": "none"})`` of ``it=folder,templates=none``."""
    place, *options = re.split(r",(?=[A-Za-z_]\w*=)", text)
    return place, dict(option.split("=", 1) for option in options)


def name_and_data(text: str) -> tuple[str, str]:
    """``("val", "s3://bucket/val@1")`` of ``s3://bucket/val@1``, ``("it", "drawn_shapes")`` of ``it=drawn_shapes``."""
    name, named, data = text.partition("=") if re.match(r"[\w.\-]+=", text) else ("", "", text)
    last = PurePosixPath(data.rstrip("/")).name
    own = re.sub(r"[^\w.\-]", "-", last.removesuffix(".yaml").removesuffix(".yml").partition("@")[0])
    return (name if named else own), data
