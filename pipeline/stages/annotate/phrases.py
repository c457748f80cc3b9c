"""Nouns, verbs and noun phrases of captions, as a sidecar.

``00017.phrases.parquet`` has one row per sample of the tar, also for hidden ones: ``key`` and ``phrases.json``. The
latter is a JSON list of spans, null for a sample without a caption:

    {"text": "red star", "start": 2, "end": 10, "caption": 0, "kind": "phrase"}

``start`` and ``end`` count Unicode code points of the stored caption, end exclusive, so ``caption[start:end] == text``.
``caption`` is the caption's index where a sample has several, else 0. ``kind`` is ``noun`` or ``verb`` (one word each)
or ``phrase`` (a noun phrase without its article). Spans are sorted by caption, start and end.

The metadata has the caption field, the extractor and the statistics of the shard.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.errors import SidecarError
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS, read_sidecar_schema, sidecar_facts, sidecar_file
from pipeline.shards.snapshot import Shard
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotator
from pipeline.stages.annotate.extractor import PhraseExtractor, PhraseSpan, load_extractor

NAME = "phrases"
COLUMN = "phrases.json"
JOB = "jobs/extract_phrases.py"
BATCH = 1024
LISTED_NOUNS = 1000
"""Number of nouns, the most common ones, that a shard's statistics list."""

ReadCaptions = Callable[[Sample], Sequence[str]]
"""Picklable function that returns the captions of a sample, in the order in which readers number them."""


@dataclass(frozen=True, kw_only=True)
class PhraseStatistics:
    """Counts of spans; ``common`` has the most common nouns in lower case with their counts."""

    samples: int = 0
    captions: int = 0
    bare: int = 0
    """Captions without a noun phrase."""
    noun: int = 0
    verb: int = 0
    phrase: int = 0
    common: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "PhraseStatistics") -> "PhraseStatistics":
        counts = {name: value + getattr(other, name) for name, value in asdict(self).items() if name != "common"}
        return PhraseStatistics(**counts, common=dict(Counter(self.common) + Counter(other.common)))

    def __str__(self) -> str:
        without = f"{self.bare} captions without" if self.bare != 1 else "1 caption without"
        return (
            f"{self.phrase} noun phrases, {self.noun} nouns, {self.verb} verbs of {self.captions} captions; {without}"
        )

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged, by name: means per caption, and the fraction of captions without a phrase."""
        captions = max(self.captions, 1)
        means = {f"{kind}s_per_caption": getattr(self, kind) / captions for kind in ("phrase", "noun", "verb")}
        return {**means, "without": self.bare / captions, "captions": self.captions, "samples": self.samples}

    def most_common(self, count: int) -> list[tuple[str, int]]:
        """Nouns and their counts, the most common first; equal counts in alphabetical order."""
        return sorted(self.common.items(), key=lambda item: (-item[1], item[0]))[:count]

    def table(self) -> str:
        """One line per noun: its count and the noun, the most common first."""
        return "".join(f"{count}\t{noun}\n" for noun, count in self.most_common(len(self.common)))


@dataclass(frozen=True, kw_only=True)
class LoadPhraseMaker:
    """Creates a :class:`PhraseMaker`; ``captions`` reads the field called ``caption``."""

    extractor: str
    caption: str
    captions: ReadCaptions

    def __call__(self, threads: int) -> Annotator:
        return PhraseMaker(self.extractor, self.caption, self.captions)


class PhraseMaker:
    """Makes the sidecar of a shard.

    Raises:
        SettingError: an unknown extractor, or one whose library or model is not installed.
    """

    def __init__(self, extractor: str, caption: str, captions: ReadCaptions) -> None:
        self._extractor: PhraseExtractor = load_extractor(extractor)
        self._captions = captions
        self.facts = {"extractor": extractor, "version": self._extractor.version, "caption": caption}
        self.maker = hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """Columns ``key`` and ``phrases.json``."""
        keys: list[str] = []
        rows: list[str | None] = []
        total, nouns = PhraseStatistics(), Counter[str]()
        while batch := list(islice(samples, BATCH)):
            captions = [self._captions(sample) for sample in batch]
            found = self._spans(captions)
            total += _counted(captions, found)
            nouns.update(entry["text"].lower() for row in found for entry in row if entry["kind"] == "noun")
            keys += [sample.key for sample in batch]
            rows += [json.dumps(row) if several else None for several, row in zip(captions, found, strict=True)]
        common = PhraseStatistics(common=dict(nouns)).most_common(LISTED_NOUNS)
        facts = {**self.facts, **asdict(total), "common": dict(common)}
        table = pa.table({"key": pa.array(keys, pa.string()), COLUMN: pa.array(rows, pa.string())})
        return table.replace_schema_metadata({FACTS: json.dumps(facts).encode()})

    def _spans(self, captions: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        # A lone surrogate is one character before and after, so that offsets stay.
        texts = [text.encode("utf-8", "replace").decode() for several in captions for text in several]
        found = iter(self._extractor.extract(texts))
        return [
            [_entry(text, number, span) for number, text in enumerate(several) for span in next(found)]
            for several in captions
        ]


def read_statistics(folder: Folder, shard: Shard, name: str = NAME) -> PhraseStatistics:
    """The statistics of the phrases of ``shard``; reads only the metadata.

    Raises:
        SidecarError: missing, of another tar, or without phrases.
    """
    file = folder.join(sidecar_file(shard, name))
    facts = sidecar_facts(read_sidecar_schema(folder, shard, name, JOB), file, JOB)
    try:
        counts = {kind: int(facts[kind]) for kind in ("samples", "captions", "bare", "noun", "verb", "phrase")}
        return PhraseStatistics(**counts, common={str(noun): int(count) for noun, count in facts["common"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SidecarError(f"{file} lacks the statistics of phrases ({error!r}); make it with {JOB}") from error


def _entry(text: str, number: int, span: PhraseSpan) -> dict[str, Any]:
    start, end, kind = span
    return {"text": text[start:end], "start": start, "end": end, "caption": number, "kind": kind}


def _counted(captions: Sequence[Sequence[str]], found: Sequence[Sequence[dict[str, Any]]]) -> PhraseStatistics:
    kinds = Counter(entry["kind"] for row in found for entry in row)
    named = {(at, entry["caption"]) for at, row in enumerate(found) for entry in row if entry["kind"] == "phrase"}
    count = sum(map(len, captions))
    return PhraseStatistics(
        samples=len(captions),
        captions=count,
        bare=count - len(named),
        noun=kinds["noun"],
        verb=kinds["verb"],
        phrase=kinds["phrase"],
    )
