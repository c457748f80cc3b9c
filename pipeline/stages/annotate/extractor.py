"""Interface of phrase extractors, and their lookup by name.

An extractor finds the nouns, verbs and noun phrases of English captions. It is a module of
:mod:`pipeline.stages.annotate.extractors` with a function ``load(option)``; ``--extractor NAME`` or
``--extractor NAME:OPTION`` selects it.
"""

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from typing import Literal, NamedTuple, Protocol

import pipeline.stages.annotate.extractors
from pipeline.config import near
from pipeline.errors import SettingError

FIELD = "extractor"
PhraseKind = Literal["noun", "verb", "phrase"]


class PhraseSpan(NamedTuple):
    """``caption[start:end]``: a noun or a verb (one word each), or a noun phrase without its article."""

    start: int
    end: int
    kind: PhraseKind


class PhraseExtractor(Protocol):
    """Finds the spans of captions; ``version`` changes whenever the spans may change."""

    version: str

    def extract(self, captions: Sequence[str]) -> list[list[PhraseSpan]]:
        """The spans of each caption, sorted, each once; words of other languages than English may give none."""
        ...


def extractor_names() -> list[str]:
    """The extractors that exist, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(pipeline.stages.annotate.extractors.__path__))


def load_extractor(name: str) -> PhraseExtractor:
    """The extractor ``NAME`` or ``NAME:OPTION``.

    Raises:
        SettingError: unknown, not installed, or with an unknown option.
    """
    module, _, option = name.partition(":")
    known = extractor_names()
    if module not in known:
        raise SettingError(FIELD, name, "one of " + ", ".join(known) + near(module, known))
    extractor: PhraseExtractor = import_module(f"{pipeline.stages.annotate.extractors.__name__}.{module}").load(option)
    return extractor
