"""Stored tokens against tokens made while loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError, SidecarError
from pipeline.loaders.batches import LoaderConfig, Reader, training_batches
from pipeline.loaders.order import Order
from pipeline.loaders.readers import TextReader
from pipeline.loaders.text import Tokenizer
from pipeline.loaders.tokens import NAME, LoadTokenMaker, from_sidecar, tokenizer_digest
from pipeline.models.clip import Clip
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.annotator import Annotation, annotate
from pipeline.stages.shard_tasks import Workers
from pipeline.training.checkpoint import read_weights
from pipeline.training.launch import launch
from pipeline.training.run import Run, prepare

CAPTIONS = ["", "A  CAT's &amp; a d\u00f6g", "\u6771\u4eac \U0001f408", "x" * 500, "word " * 200, "<end_of_text> a"]
ALONE = LoaderConfig(loader_workers=0)


class Letters:
    """A tokenizer that pads with 1, also occurring in texts, and ends no text."""

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.ones(len(texts), 9, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            letters = torch.tensor([ord(letter) % 5 for letter in text[:9]])
            row[: len(letters)] = letters
        return rows


def clip_tokenizer() -> Tokenizer:
    tokenizer: Tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return tokenizer


def nasty(make_snapshot: Callable[..., Snapshot], folder: Path) -> Snapshot:
    """Twelve samples with such captions, one without."""
    spoil = {number: {"txt": text.encode()} for number, text in enumerate(CAPTIONS)} | {8: {"jpg": b""}}
    return make_snapshot((7, 5), folder=folder, spoil=spoil)


def stored(snapshot: Snapshot, make: Callable[[], Tokenizer], **settings: Any) -> Snapshot:
    load = LoadTokenMaker(make=make, caption="txt")
    return annotate(snapshot, load, Annotation(name=NAME, **settings), Workers(processes_count=0))


def batches(snapshot: Snapshot, reader: Reader) -> list[dict[str, Tensor]]:
    order = Order([shard.samples for shard in snapshot.shards], seed=0, batch_size=3, lanes=1)
    return list(training_batches(snapshot, [reader], order, steps=range(4), config=ALONE))


@pytest.mark.parametrize(("make", "end"), [(clip_tokenizer, 49407), (clip_tokenizer, None), (Letters, None)])
def test_batches_are_the_same(
    make: Callable[[], Tokenizer], end: int | None, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """A missing caption is replaced as without the sidecar."""
    snapshot = stored(nasty(make_snapshot, tmp_path), make)
    reader = TextReader(tokenizer=make(), end_of_text=end)
    expected = batches(snapshot, reader)
    found = batches(snapshot, from_sidecar(reader, NAME))
    assert sum(int(batch["replaced"]) for batch in expected) == 1
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_padding_is_not_stored(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> None:
    stored(nasty(make_snapshot, tmp_path), clip_tokenizer)
    rows = pq.read_table(tmp_path / f"00000.{NAME}.parquet")["tokens"].to_pylist()
    assert rows[0] == [49406, 49407] and len(rows[4]) == 77
    assert pq.read_table(tmp_path / f"00001.{NAME}.parquet")["tokens"].null_count == 1


def test_tokens_of_another_tokenizer_are_refused(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> None:
    snapshot = stored(make_snapshot((7, 5), folder=tmp_path), clip_tokenizer)
    other = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    with pytest.raises(SidecarError, match="tokenizer.*tokenize_dataset"):
        batches(snapshot, from_sidecar(TextReader(tokenizer=other), NAME))
    with pytest.raises(SidecarError, match="the caption txt, not json:label"):
        batches(snapshot, from_sidecar(TextReader(tokenizer=clip_tokenizer(), caption="json:label"), NAME))
    with pytest.raises(SidecarError, match="overwrite"):
        stored(snapshot, Letters)
    assert stored(snapshot, Letters, overwrite=True).shards[0].sidecars != snapshot.shards[0].sidecars


def test_digests_tell_tokenizers_apart() -> None:
    kinds = [
        clip_tokenizer(),
        open_clip.get_tokenizer("ViT-B-32", context_length=32),
        open_clip.tokenizer.SimpleTokenizer(clean="canonicalize"),
        Letters(),
    ]
    assert len({tokenizer_digest(kind) for kind in kinds}) == 4
    assert tokenizer_digest(clip_tokenizer()) == tokenizer_digest(clip_tokenizer())


def test_a_run_with_stored_tokens_is_the_same_run(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> None:
    """The data need no captions of their own then; without the sidecar the job that makes it is named."""
    data = make_snapshot((9, 8), folder=tmp_path / "data")

    def run(name: str, **settings: Any) -> dict[str, Tensor]:
        plan, _ = prepare(Clip.smallest(), Run(
            output_folder=str(tmp_path / name), data=data.folder, batch_size=4, steps=3, warmup_steps=1,
            loader=ALONE, **settings,
        ))  # fmt: skip
        return read_weights(Folder(launch(plan).checkpoint))

    with pytest.raises(SidecarError, match="tokenize_dataset"):
        run("bare", tokens=NAME)
    stored(data, clip_tokenizer)
    first, second = run("without"), run("with", tokens=NAME)
    assert all(torch.equal(second[name], weights) for name, weights in first.items())


def test_a_missing_sidecar_is_named(make_snapshot: Callable[..., Snapshot], tmp_path: Path) -> None:
    snapshot = nasty(make_snapshot, tmp_path)
    with pytest.raises(DataError, match=f"no {NAME} for 2 of its 2 shards"):
        batches(snapshot, from_sidecar(TextReader(tokenizer=clip_tokenizer()), NAME))
