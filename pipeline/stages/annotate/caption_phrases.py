"""The captions that are grounded, and where their phrases come from: a sidecar, an extractor, or ``boxes.json``."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config import parse_json
from pipeline.errors import DataError, SidecarError
from pipeline.shards.objects import FIELD, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import MAKER, Wanted, read_sidecar, read_sidecar_schema, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate import phrases
from pipeline.stages.annotate.extractor import PhraseExtractor, load_extractor
from pipeline.stages.annotate.phrases import ReadCaptions

Span = tuple[int, int]


@dataclass(frozen=True)
class CaptionPhrases:
    """A caption, and the spans of its phrases in code points, as they were found."""

    caption: str
    spans: Sequence[Span] = ()


PhrasesOf = Callable[[Sample], list[CaptionPhrases]]
"""The captions of a sample with their phrases; none where it has no caption."""


class PhraseSource(Protocol):
    """Picklable; ``maker`` is the digest of what determines the phrases."""

    maker: str

    def of_shard(self, shard: Shard) -> PhrasesOf:
        """The function that gives the captions and phrases of a sample of ``shard``; raises ``SidecarError``."""
        ...


@dataclass(frozen=True)
class AnnotatedPhrases:
    """The captions and their phrases in ``boxes.json``, whose boxes are not used."""

    maker: str = FIELD

    def of_shard(self, shard: Shard) -> PhrasesOf:
        """Reads the samples; a sample without ``boxes.json`` has no caption."""
        return _annotated


class ExtractedPhrases:
    """Noun phrases of all captions, found by an extractor."""

    def __init__(self, extractor: str, captions: ReadCaptions) -> None:
        """``captions`` reads the captions of a sample; raises ``SettingError`` for an unknown extractor."""
        self.extractor, self.captions = extractor, captions
        self.maker = _digest("extractor", extractor, load_extractor(extractor).version, repr(captions))

    def of_shard(self, shard: Shard) -> PhrasesOf:
        """Loads the extractor."""
        extractor = load_extractor(self.extractor)

        def find(sample: Sample) -> list[CaptionPhrases]:
            texts = _encodable(self.captions(sample))
            return [CaptionPhrases(*one) for one in zip(texts, _noun_phrases(texts, extractor), strict=True)]

        return find


def noun_phrases(text: str, extractor: str) -> list[Span]:
    """The spans of the noun phrases of ``text``; raises ``SettingError`` for an unknown extractor."""
    return _noun_phrases([text], load_extractor(extractor))[0]


def _noun_phrases(texts: Sequence[str], extractor: PhraseExtractor) -> list[list[Span]]:
    found = extractor.extract(texts)
    return [[(start, end) for start, end, kind in some if kind == "phrase"] for some in found]


def _encodable(captions: Sequence[str]) -> list[str]:
    """Captions that UTF-8 can hold; a lone surrogate is one character before and after, so offsets stay."""
    return [text.encode("utf-8", "replace").decode() for text in captions]


class StoredPhrases:
    """Noun phrases of all captions in a sidecar of jobs/extract_phrases.py."""

    def __init__(self, snapshot: Snapshot, name: str, caption: str, captions: ReadCaptions) -> None:
        """``captions`` reads the captions of a sample from the field ``caption``.

        Raises:
            SidecarError: a shard has no such sidecar, or shards have phrases of several extractors or other captions.
        """
        self.uri, self.name, self.captions = snapshot.folder, name, captions
        self.wanted = Wanted(name=name, job=phrases.JOB, facts={"caption": caption})
        makers = {self._maker(Folder(snapshot.folder), shard) for shard in snapshot.shards}
        if len(makers) != 1:
            problem = f"{len(makers)} extractors made the {name} of its shards"
            raise SidecarError(f"{snapshot.uri}: {problem}; make them again with {phrases.JOB} --overwrite")
        self.maker = _digest("sidecar", *makers)

    def _maker(self, folder: Folder, shard: Shard) -> str:
        schema = read_sidecar_schema(folder, shard, self.name, phrases.JOB)
        file = folder.join(sidecar_file(shard, self.name))
        found, wanted = sidecar_facts(schema, file, phrases.JOB).get("caption"), self.wanted.facts["caption"]
        if found != wanted:
            raise SidecarError(f"{file} has phrases of {found}, not {wanted}; make it again with {phrases.JOB}")
        return (schema.metadata or {}).get(MAKER, b"").decode(errors="replace")

    def of_shard(self, shard: Shard) -> PhrasesOf:
        """Reads the sidecar of ``shard``."""
        table = read_sidecar(Folder(self.uri), shard, self.name, phrases.JOB)
        if phrases.COLUMN not in table.column_names:
            raise SidecarError(f"{sidecar_file(shard, self.name)} holds no phrases; make it with {phrases.JOB}")
        rows = dict(zip(table["key"].to_pylist(), table[phrases.COLUMN].to_pylist(), strict=True))

        def find(sample: Sample) -> list[CaptionPhrases]:
            texts = _encodable(self.captions(sample))
            try:
                entries: list[Any] = parse_json(rows[sample.key] or "[]") if texts else []
                found = [one for one in entries if one["kind"] == "phrase"]
                spans = [(int(one["caption"]), (int(one["start"]), int(one["end"]))) for one in found]
            except (ValueError, TypeError, KeyError) as error:
                problem = f"{self.name} of sample {sample.key} holds no phrases ({error!r})"
                raise SidecarError(f"{problem}; make it with {phrases.JOB}") from error
            return [
                CaptionPhrases(text, [span for owner, span in spans if owner == number])
                for number, text in enumerate(texts)
            ]

        return find


def _annotated(sample: Sample) -> list[CaptionPhrases]:
    if FIELD not in sample.fields:
        return []
    try:
        objects = read_objects(sample)
    except DataError:
        return []
    return [
        CaptionPhrases(caption.text, [(one.start, one.end) for one in caption.phrases if one.objects])
        for caption in objects.captions
        if caption.text
    ]


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
