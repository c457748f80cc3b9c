"""Dataset cards: what a data set is, where it comes from and how it is evaluated.

A card is one YAML file in the top-level folder ``datasets/``, named like the data set in papers. It holds no code;
``source.kind`` names the source that reads the data, which is in ``pipeline/sources/``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import from_yaml, near, require, shipped_folder
from pipeline.errors import SettingError, missing

CARDS = shipped_folder("datasets")
PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """How papers on few-shot learning use a data set.

    ``parts`` gives, for ``train``, ``val`` and ``test``, the source options that differ from the card's. Without
    ``val``, validation images are sampled from ``train``; without ``train`` the set is for testing only. ``templates``
    are the prompts, if they differ from the card's own. ``names`` documents how the class names were made.
    """

    parts: Mapping[str, Mapping[str, Any]]
    templates: tuple[str, ...] = ()
    names: str = ""

    def __post_init__(self) -> None:
        require(set(self.parts) <= set(PARTS), "parts", list(self.parts), "some of " + ", ".join(PARTS))
        require("test" in self.parts, "parts", list(self.parts), "test among them")
        check_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One data set.

    ``source`` is the kind and the options of the source that reads it. ``classes`` and ``templates`` are for zero-shot
    classification: ``label`` is the key of the class name in the sample's json, each template has one ``{}`` for it.
    ``novel`` are the classes without boxes in the training of an open-vocabulary detector. ``samples`` is the expected
    number of samples of a complete copy. ``few_shot`` is set for data sets of few-shot papers.
    """

    name: str
    title: str
    home: str = ""
    licence: str = ""
    description: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    label: str = "label"
    samples: int | None = None
    few_shot: FewShot | None = None
    novel: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            "kind" in self.source or not self.source,
            "source",
            dict(self.source),
            "a mapping with the key `kind`",
        )
        check_templates(self.templates)
        require(
            len(set(self.classes)) == len(self.classes),
            "classes",
            self.classes,
            "distinct class names",
        )
        require(set(self.novel) <= set(self.classes), "novel", self.novel, "some of the card's classes")


def check_templates(templates: Iterable[str]) -> None:
    """Raise ``SettingError`` unless each has one ``{}``."""
    for template in templates:
        require(template.count("{}") == 1, "templates", template, "exactly one {} for the class name")


def card_names() -> list[str]:
    """The names of all cards that come with the project, sorted."""
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def load_card(name: str) -> Card:
    """The card named ``name``, or in the YAML file at the path ``name``.

    Raises:
        SettingError: no such card (similar names are listed), or an unknown key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CARDS / f"{name}.yaml"
    if not path.is_file():
        if name != path.stem:
            raise missing("card", name)
        raise SettingError("card", name, "a YAML file or one of " + ", ".join(card_names()) + near(name, card_names()))
    card = from_yaml(Card, path)
    require(
        card.name == path.stem,
        f"{path.name}: name",
        card.name,
        f"the file's own name, {path.stem}",
    )
    return card
