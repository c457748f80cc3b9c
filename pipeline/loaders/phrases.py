"""Readers of the sidecar with the nouns, verbs and noun phrases of captions.

A method reads spans with :class:`PhraseReader`, or with :func:`stored_phrases` in a reader of its own that has
:func:`wanted_phrases` among its ``sidecars``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from pipeline.config import parse_json, require
from pipeline.errors import SidecarError
from pipeline.loaders.batches import Row, SamplePosition
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import read_captions
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import Wanted
from pipeline.stages.annotate.extractor import PhraseKind
from pipeline.stages.annotate.phrases import COLUMN, JOB, NAME

KINDS: tuple[PhraseKind, ...] = get_args(PhraseKind)


@dataclass(frozen=True, slots=True)
class StoredPhrase:
    """``caption[start:end] == text`` in code points, for the caption with index ``caption`` of its sample."""

    text: str
    start: int
    end: int
    caption: int
    kind: PhraseKind


@dataclass(frozen=True, kw_only=True)
class ReadSampleCaptions:
    """The captions of a sample as :func:`~pipeline.loaders.text.read_captions` numbers them; empty without any.

    Raises:
        SettingError: ``caption`` is not one of the forms of that function.
    """

    caption: str

    def __post_init__(self) -> None:
        known = self.caption in ("txt", "auto") or re.fullmatch("json:.+", self.caption, re.DOTALL) is not None
        require(known, "caption", self.caption, "txt, json:KEY for a key of the sample's json, or auto")

    def __call__(self, sample: Sample) -> list[str]:
        try:
            return read_captions(sample, self.caption)
        except UnreadableSample:
            return []


def wanted_phrases(caption: str = "txt", name: str = NAME) -> Wanted:
    """The sidecar ``name``, made from the captions in the field ``caption``."""
    return Wanted(name=name, job=JOB, facts={"caption": caption})


def stored_phrases(sample: Sample, kinds: Sequence[PhraseKind] = KINDS, name: str = NAME) -> list[StoredPhrase]:
    """The spans of ``sample`` of these ``kinds``, in order; empty where its captions have none.

    Raises:
        SidecarError: the sidecar holds no phrases.
    """
    text = sample.rows[name].get(COLUMN, "")
    try:
        entries = [] if text is None else parse_json(text)
        return [StoredPhrase(**entry) for entry in entries if entry["kind"] in kinds]
    except (ValueError, TypeError, KeyError) as error:
        raise SidecarError(f"{name} of sample {sample.key} holds no phrases ({error}); make it with {JOB}") from error


@dataclass(frozen=True, kw_only=True)
class PhraseReader:
    """``phrases``: the spans of each sample as a list of :class:`StoredPhrase`.

    GroupViT's prompts use ``("noun", "verb")``, grounding uses ``("phrase",)``. A caption without them gives an empty
    list. ``caption`` is the field that the method reads its captions from, else the sidecar is refused.
    """

    kinds: tuple[PhraseKind, ...] = ("phrase",)
    caption: str = "txt"
    name: str = NAME
    key: str = "phrases"
    fields = ()

    def __post_init__(self) -> None:
        require(bool(self.kinds) and set(self.kinds) <= set(KINDS), "kinds", self.kinds, "some of " + ", ".join(KINDS))

    @cached_property
    def sidecars(self) -> Sequence[Wanted]:
        """The sidecar with the phrases of this caption field."""
        return (wanted_phrases(self.caption, self.name),)

    def read(self, sample: Sample, at: SamplePosition | None = None) -> Row:
        """The spans of one sample; raises ``SidecarError``."""
        return {self.key: stored_phrases(sample, self.kinds, self.name)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A list of lists, since captions have any number of phrases."""
        return {self.key: [row[self.key] for row in rows]}
