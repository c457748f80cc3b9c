"""Nouns, verbs and noun phrases by a spaCy pipeline with a tagger and a parser.

``spacy`` uses ``en_core_web_sm``; ``spacy:NAME`` another installed pipeline, or one in a folder. Other languages work
with their pipelines. spaCy is no dependency of this project.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import SettingError
from pipeline.stages.annotate.extractor import FIELD, PhraseExtractor, PhraseSpan

MODEL = "en_core_web_sm"
_NEEDED = frozenset(("tagger", "parser", "attribute_ruler", "morphologizer", "tok2vec", "transformer"))
_KINDS: dict[str, Any] = {"NOUN": "noun", "PROPN": "noun", "VERB": "verb"}
_LEADING = frozenset(("DET", "PRON", "PUNCT", "SPACE"))


class SpacyExtractor:
    """Reads captions in batches; articles and possessive pronouns at the start of a noun phrase are left out."""

    def __init__(self, pipeline: Any, version: str) -> None:
        self._pipeline = pipeline
        meta = pipeline.meta
        self.version = f"spacy {version}, {meta['lang']}_{meta['name']} {meta['version']}"

    def extract(self, captions: Sequence[str]) -> list[list[PhraseSpan]]:
        """The spans of each caption."""
        return [sorted(set(_spans(document))) for document in self._pipeline.pipe(captions)]


def load(option: str) -> PhraseExtractor:
    """The extractor with the pipeline ``option``.

    Raises:
        SettingError: spaCy or the pipeline is not installed, or the pipeline has no parser.
    """
    name = option or MODEL
    try:
        import spacy
    except ImportError as error:
        raise SettingError(FIELD, "spacy", "pip install spacy, or rules", "spaCy is not installed") from error
    try:
        pipeline = spacy.load(name)
    except (OSError, ValueError) as error:
        allowed = f"python -m spacy download {name}, or the folder of a pipeline"
        raise SettingError(FIELD, f"spacy:{name}", allowed, f"spaCy has no pipeline {name!r}") from error
    if "parser" not in pipeline.pipe_names:
        has = ", ".join(pipeline.pipe_names) or "nothing"
        raise SettingError(FIELD, f"spacy:{name}", "a pipeline with a tagger and a parser", f"{name!r} has {has}")
    pipeline.select_pipes(enable=[part for part in pipeline.pipe_names if part in _NEEDED])
    return SpacyExtractor(pipeline, spacy.__version__)


def _spans(document: Any) -> Iterator[PhraseSpan]:
    for token in document:
        if token.pos_ in _KINDS:
            yield PhraseSpan(token.idx, token.idx + len(token.text), _KINDS[token.pos_])
    for chunk in document.noun_chunks:
        words = list(chunk)
        while words and words[0].pos_ in _LEADING:
            del words[0]
        if words:
            yield PhraseSpan(words[0].idx, words[-1].idx + len(words[-1].text), "phrase")
