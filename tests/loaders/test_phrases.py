"""Stored phrases as batches have them."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SettingError, SidecarError
from pipeline.loaders.batches import LoaderConfig, training_batches
from pipeline.loaders.order import Order
from pipeline.loaders.phrases import PhraseReader, ReadSampleCaptions, StoredPhrase, stored_phrases
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.phrases import COLUMN, NAME, LoadPhraseMaker
from pipeline.stages.shard_tasks import Workers

CAPTIONS = {number: {"txt": f"a man riding {number} old bikes".encode()} for number in range(6)} | {6: {"txt": b"oh!"}}


def annotated(snapshot: Snapshot, caption: str = "txt") -> Snapshot:
    load = LoadPhraseMaker(extractor="rules", caption=caption, captions=ReadSampleCaptions(caption=caption))
    return annotate(snapshot, load, Annotation(name=NAME), Workers(processes_count=0), use_gpu=False)


@pytest.fixture
def snapshot(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> Snapshot:
    return make_snapshot((4, 4), folder=tmp_path / "data", spoil=CAPTIONS)


def read(snapshot: Snapshot, reader: PhraseReader, workers: int = 0) -> list[list[StoredPhrase]]:
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=4, lanes=1)
    config = LoaderConfig(loader_workers=workers)
    batches: list[Any] = list(training_batches(snapshot, [reader], order, steps=range(2), config=config))
    return [row for batch in batches for row in batch[reader.key]]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_kinds_that_are_asked_for(workers: int, snapshot: Snapshot) -> None:
    data = annotated(snapshot)
    nouns = read(data, PhraseReader(kinds=("noun", "verb"), key="nouns"), workers)
    assert sorted(len(row) for row in nouns)[:1] == [0] and len(nouns) == 8
    full = next(row for row in nouns if row and row[1].text == "riding")
    assert [(phrase.text, phrase.kind) for phrase in full] == [("man", "noun"), ("riding", "verb"), ("bikes", "noun")]
    (phrase, other) = next(row for row in read(data, PhraseReader()) if row and row[0].text == "man")
    assert astuple(phrase) == ("man", 2, 5, 0, "phrase")
    assert other.text.endswith(" old bikes") and other.end - other.start == len(other.text)


def test_a_missing_sidecar_and_one_of_other_captions_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(SidecarError, match=r"no phrases for 2 of its 2 shards.*jobs/extract_phrases\.py"):
        read(snapshot, PhraseReader())
    data = annotated(snapshot)
    with pytest.raises(SidecarError, match=r"the caption txt, not json:title; make it again with jobs/extract_phrases"):
        read(data, PhraseReader(caption="json:title"))


@pytest.mark.parametrize(
    "stored", ["{", "[1]", '[{"kind": "noun"}]', '{"kind": 1}', json.dumps([{"kind": "noun", "x": 1}]), "[" * 5000]
)
def test_strange_rows_name_the_sample(stored: str) -> None:
    sample = Sample("000", {}, {NAME: {COLUMN: stored}})
    with pytest.raises(SidecarError, match=r"sample 000 holds no phrases .*jobs/extract_phrases\.py"):
        stored_phrases(sample)


def test_a_sidecar_without_the_column_is_refused() -> None:
    with pytest.raises(SidecarError, match="holds no phrases"):
        stored_phrases(Sample("000", {}, {NAME: {"boxes": []}}))
    assert stored_phrases(Sample("000", {}, {NAME: {COLUMN: None}})) == []


def test_kinds_are_checked() -> None:
    for kinds in ((), ("nouns",)):
        with pytest.raises(SettingError, match="kinds: .* expected some of noun, verb, phrase"):
            PhraseReader(kinds=kinds)
