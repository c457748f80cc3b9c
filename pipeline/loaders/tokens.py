"""Captions' tokens, computed once and stored in a sidecar.

``00017.tokens.parquet`` has, for every sample that the tar stores (hidden ones too), its ``key`` and ``tokens``: int32
without the padding; null for a sample without a caption. It records a digest of the tokenizer and of the caption field,
so that a run with other settings does not read it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.loaders.batches import Batch, Row, SamplePosition
from pipeline.loaders.readers import TextReader
from pipeline.loaders.samples import UnreadableSample
from pipeline.loaders.text import Tokenizer, cut_text, faster, read_caption
from pipeline.shards.sample import Sample
from pipeline.shards.sidecar import FACTS, Wanted
from pipeline.shards.snapshot import Shard
from pipeline.stages.annotate.annotator import Annotator

NAME = "tokens"
JOB = "jobs/tokenize_dataset.py"
BATCH = 1024
PROBES = ("", "A photo of 12 CATS' tails, isn't it?", "caf\u00e9 &amp; \u6771\u4eac <end_of_text>", "word " * 300)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 hex of a tokenizer: its kind, its vocabulary if available, and its tokens of some texts."""
    known: Any = tokenizer
    inner: Any = getattr(known, "tokenizer", None)
    vocabulary = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(known, "encoder", {})
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    described = json.dumps([kind, sorted(vocabulary.items()), tokenizer(list(PROBES)).tolist()])
    return hashlib.sha256(described.encode()).hexdigest()


def facts(tokenizer: Tokenizer, caption: str) -> dict[str, str]:
    """The metadata of a sidecar of tokens."""
    return {"tokenizer": tokenizer_digest(tokenizer), "caption": caption}


@dataclass(frozen=True, kw_only=True)
class LoadTokenMaker:
    """Creates a :class:`TokenMaker` with the tokenizer that ``make`` returns."""

    make: Callable[[], Tokenizer]
    caption: str

    def __call__(self, threads: int) -> Annotator:
        return TokenMaker(self.make(), self.caption)


class TokenMaker:
    """Makes the sidecar of a shard."""

    def __init__(self, tokenizer: Tokenizer, caption: str) -> None:
        self.caption, self.facts = caption, json.dumps(facts(tokenizer, caption))
        self.maker = hashlib.sha256(self.facts.encode()).hexdigest()
        self._tokenizer, self._pad = faster(tokenizer), _padding(tokenizer)

    def table(self, samples: Iterator[Sample], shard: Shard) -> pa.Table:
        """Columns ``key`` and ``tokens``."""
        keys: list[str] = []
        rows: list[np.ndarray[Any, Any] | None] = []
        while batch := list(islice(samples, BATCH)):
            keys += [sample.key for sample in batch]
            rows += self._rows([self._caption(sample) for sample in batch])
        table = pa.table({"key": keys, "tokens": pa.array(rows, pa.list_(pa.int32()))})
        return table.replace_schema_metadata({FACTS: self.facts.encode()})

    def _rows(self, captions: Sequence[str | None]) -> list[np.ndarray[Any, Any] | None]:
        tokens = iter(self._tokenizer([caption for caption in captions if caption is not None]).int().numpy())
        return [None if caption is None else self._unpadded(next(tokens)) for caption in captions]

    def _unpadded(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        own = np.flatnonzero(row != self._pad)
        return row[: own[-1] + 1] if len(own) else row[:0]

    def _caption(self, sample: Sample) -> str | None:
        try:
            return read_caption(sample, self.caption)
        except UnreadableSample:
            return None


@dataclass(frozen=True, kw_only=True)
class StoredTextReader:
    """Like :class:`TextReader`, from the sidecar ``name``."""

    tokenizer: Tokenizer
    end_of_text: int | None
    caption: str
    name: str
    key: str = "text"
    fields = ()

    @cached_property
    def sidecars(self) -> Sequence[Wanted]:
        """The sidecar for this tokenizer and this caption field."""
        return (Wanted(name=self.name, job=JOB, facts=facts(self.tokenizer, self.caption)),)

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        """The tokens without padding."""
        tokens: list[int] | None = sample.rows[self.name]["tokens"]
        if tokens is None:
            raise UnreadableSample(f"{sample.key} had no caption {self.caption} when its tokens were made")
        return {self.key: tokens}

    def collate(self, rows: list[Row]) -> Batch:
        """int64 [B, L]."""
        width, pad = self._shape
        padded = np.full((len(rows), width), pad, np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row[self.key])] = row[self.key]
        return {self.key: cut_text(torch.from_numpy(padded), self.end_of_text)}

    @cached_property
    def _shape(self) -> tuple[int, int]:
        return self.tokenizer([""]).shape[1], _padding(self.tokenizer)


def from_sidecar(reader: TextReader, name: str) -> StoredTextReader:
    """A reader of the sidecar ``name`` that is equivalent to ``reader``."""
    return StoredTextReader(
        tokenizer=reader.tokenizer,
        end_of_text=reader.end_of_text,
        caption=reader.caption,
        name=name,
        key=reader.key,
    )


def _padding(tokenizer: Tokenizer) -> int:
    """The padding token of a row."""
    return int(tokenizer([""])[0, -1])
