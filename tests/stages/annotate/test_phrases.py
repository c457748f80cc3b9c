"""The sidecar of phrases: its rows and statistics, and that it is made once."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.errors import SettingError, SidecarError
from pipeline.loaders.phrases import ReadSampleCaptions
from pipeline.shards.sample import Sample
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate import phrases
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.annotate.extractor import PhraseSpan
from pipeline.stages.annotate.phrases import COLUMN, NAME, LoadPhraseMaker, PhraseStatistics, read_statistics
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
CAPTIONS = {
    0: {"txt": b"a red dog and a RED Dog"},
    1: {"txt": "\ufeffthe caf\u00e9's \U0001f436 big cat".encode()},
    2: {"txt": b"  now, here!  "},
    3: {"txt": b" \t"},
    4: {"jpg": b"no caption"},
    5: {"txt": "a dog".encode("utf-16")},
    6: {"json": json.dumps({"captions": ["a cat", "", 7, "two red\ud83d dogs"]}).encode(), "txt": b"an owl"},
}


def made(snapshot: Snapshot, caption: str = "txt", workers: Workers = HERE, **settings: Any) -> Snapshot:
    load = LoadPhraseMaker(extractor="rules", caption=caption, captions=ReadSampleCaptions(caption=caption))
    return annotate(snapshot, load, Annotation(name=NAME, **settings), workers, use_gpu=False)


def rows(snapshot: Snapshot, shard: int = 0) -> list[list[dict[str, Any]] | None]:
    table = pq.read_table(Path(snapshot.folder) / f"{shard:05d}.{NAME}.parquet")
    return [None if text is None else json.loads(text) for text in table[COLUMN].to_pylist()]


@pytest.fixture
def snapshot(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> Snapshot:
    return make_snapshot((7, 2), folder=tmp_path / "data", spoil=CAPTIONS)


def test_spans_are_offsets_into_the_stored_caption(snapshot: Snapshot) -> None:
    done = made(snapshot)
    assert done.parent == snapshot.id and all(set(shard.sidecars) == {NAME} for shard in done.shards)
    found = rows(done)
    assert found[0] == [
        {"text": "red dog", "start": 2, "end": 9, "caption": 0, "kind": "phrase"},
        {"text": "dog", "start": 6, "end": 9, "caption": 0, "kind": "noun"},
        {"text": "RED Dog", "start": 16, "end": 23, "caption": 0, "kind": "phrase"},
        {"text": "Dog", "start": 20, "end": 23, "caption": 0, "kind": "noun"},
    ]
    assert found[2] == [] and found[3] is None and found[4] is None
    read = ReadSampleCaptions(caption="txt")
    checked = 0
    for shard in range(2):
        samples = list(read_samples(Folder(done.folder), done.shards[shard]))
        for sample, entries in zip(samples, rows(done, shard), strict=True):
            for entry in entries or []:
                assert read(sample)[entry["caption"]][entry["start"] : entry["end"]] == entry["text"] != ""
                checked += 1
    assert checked > 10
    assert [entry["text"] for entry in found[1] or [] if entry["kind"] == "phrase"] == ["caf\u00e9", "big cat"]
    assert [entry["text"] for entry in found[5] or []] == ["dog", "dog"]


def test_several_captions_are_numbered_as_readers_number_them(snapshot: Snapshot) -> None:
    found = rows(made(snapshot, "auto"))[6] or []
    assert [(entry["caption"], entry["text"], entry["kind"]) for entry in found if entry["kind"] == "noun"] == [
        (0, "cat", "noun"),
        (1, "dogs", "noun"),
    ]


def test_statistics_add_up(snapshot: Snapshot) -> None:
    done = made(snapshot)
    found = [read_statistics(Folder(done.folder), shard) for shard in done.shards]
    entries = [row for shard in range(2) for row in rows(done, shard)]
    whole = sum(found, PhraseStatistics())
    assert whole.samples == 9 and whole.captions == sum(row is not None for row in entries) == 7
    assert whole.bare == sum(row == [] for row in entries) == 1
    kinds = [entry["kind"] for row in entries for entry in row or []]
    assert [kinds.count(kind) for kind in ("noun", "verb", "phrase")] == [whole.noun, whole.verb, whole.phrase]
    assert whole.most_common(1) == [("dog", 3)]
    assert whole.metrics()["without"] == 1 / 7 and whole.metrics()["phrases_per_caption"] == whole.phrase / 7
    assert PhraseStatistics().metrics()["without"] == 0


class Counting:
    """An extractor that counts its captions and finds the first letter."""

    def __init__(self, version: str, log: list[int]) -> None:
        self.version, self._log = version, log

    def extract(self, captions: Sequence[str]) -> list[list[PhraseSpan]]:
        self._log.append(len(captions))
        return [[PhraseSpan(0, 1, "phrase")] if caption else [] for caption in captions]


def test_each_shard_is_made_once_and_goes_on_after_a_kill(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []
    monkeypatch.setattr(phrases, "load_extractor", lambda name: Counting("1", log))
    done = made(snapshot)
    assert log == [5, 2] and made(done) == done and log == [5, 2]
    (Path(done.folder) / f"00001.{NAME}.parquet").unlink()
    assert made(done).shards == done.shards and log == [5, 2, 2]
    monkeypatch.setattr(phrases, "load_extractor", lambda name: Counting("2", log))
    with pytest.raises(SidecarError, match="--overwrite replaces it"):
        made(done)
    assert made(done, overwrite=True).shards[0].sidecars != done.shards[0].sidecars


@pytest.mark.slow
def test_ray_makes_the_same_files(snapshot: Snapshot, tmp_path: Path, ray_cluster: Any) -> None:
    shutil.copytree(snapshot.folder, tmp_path / "copy")
    copy = read_snapshot(str(tmp_path / "copy"))
    assert made(copy, workers=Workers(processes_count=2)).shards == made(snapshot).shards


def test_statistics_of_something_else_name_the_job(snapshot: Snapshot) -> None:
    done = made(snapshot)
    with pytest.raises(SidecarError, match="missing; make it with jobs/extract_phrases.py"):
        read_statistics(Folder(done.folder), done.shards[0], "other")
    file = Path(done.folder) / f"00000.{NAME}.parquet"
    table = pq.read_table(file)
    for facts in (b'{"captions": 3}', b'{"common": []}', b"[]", b"{"):
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"clipmill.facts": facts}), file)
        with pytest.raises(SidecarError, match=r"jobs/extract_phrases\.py"):
            read_statistics(Folder(done.folder), done.shards[0])


def test_a_caption_field_is_one_of_its_forms() -> None:
    for caption in ("txt:", "jpg", "json", "json:"):
        with pytest.raises(SettingError, match="caption: got"):
            ReadSampleCaptions(caption=caption)
    assert ReadSampleCaptions(caption="json:title")(Sample("1", {"json": b'{"title": "a dog"}'})) == ["a dog"]
    assert ReadSampleCaptions(caption="json:title")(Sample("1", {"json": b"{"})) == []
