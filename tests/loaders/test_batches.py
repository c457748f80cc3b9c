"""Batches: contents, determinism, resume, unreadable samples."""

import logging
import os
from pathlib import Path

import open_clip
import pytest
import torch

from pipeline.errors import DataError, SettingError
from pipeline.loaders.batches import (
    Batch,
    LoaderConfig,
    Reader,
    Row,
    SamplePosition,
    snapshot_batches,
    training_batches,
)
from pipeline.loaders.images import ImageTransform
from pipeline.loaders.order import Order
from pipeline.loaders.readers import ImageReader, LabelReader, TextReader
from pipeline.loaders.samples import Samples
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot

IN_PROCESS = LoaderConfig(loader_workers=0)
CLASSES = ("red", "green", "blue", "yellow")


def readers() -> list[Reader]:
    transform = ImageTransform(size=(32, 32), crop="resized", scale=(0.3, 1.0), flip=0.5)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return [ImageReader(transform=transform), TextReader(tokenizer=tokenizer, end_of_text=49407)]


def batches(snapshot: Snapshot, steps: range, config: LoaderConfig = IN_PROCESS, **place: int) -> list[Batch]:
    order = Order([shard.samples for shard in snapshot.shards], seed=1, batch_size=4, lanes=2, shuffle_block=6)
    return list(training_batches(snapshot, readers(), order, steps=steps, config=config, **place))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        for one, two in zip(first, second, strict=True)
    )


def test_batches_hold_what_the_order_says(make_snapshot) -> None:
    snapshot = make_snapshot()
    samples, tokenizer = Samples(snapshot), open_clip.get_tokenizer("ViT-B-32")
    order = Order([7, 5, 8], seed=1, batch_size=4, lanes=2, shuffle_block=6)
    for step, batch in enumerate(batches(snapshot, range(6))):
        captions = [samples[number].fields["txt"].decode() for _, number in order.batch(step).tolist()]
        width = batch["text"].shape[1]
        assert width < 20
        assert torch.equal(batch["text"], tokenizer(captions)[:, :width])
        assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8
        assert batch["replaced"] == 0


def test_processes_and_resume_change_nothing(make_snapshot) -> None:
    snapshot = make_snapshot()
    whole = batches(snapshot, range(12))
    assert equal(whole, batches(snapshot, range(12), LoaderConfig(loader_workers=2, prefetch=2)))
    assert equal(whole[7:], batches(snapshot, range(7, 12)))


def test_ranks_hold_pieces_of_the_whole(make_snapshot) -> None:
    snapshot = make_snapshot()
    pieces = [batches(snapshot, range(4), rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(batches(snapshot, range(4)), *pieces, strict=True):
        assert torch.equal(whole["image"], torch.cat([part["image"] for part in parts]))


def test_unreadable_samples_are_replaced_and_counted(make_snapshot, caplog: pytest.LogCaptureFixture) -> None:
    html = {"jpg": b"<html></html>", "txt": b"a page"}
    spoilt = make_snapshot(spoil={2: html, 3: {"txt": b"no image"}, 19: html, 8: {"jpg": b""}})
    with caplog.at_level(logging.WARNING):
        made = batches(spoilt, range(5))
    assert sum(int(batch["replaced"]) for batch in made) == 4 + 1  # sample 2 meets sample 3 on its way
    assert "0000002 is unreadable and is replaced" in caplog.text
    order = Order([7, 5, 8], seed=1, batch_size=4, lanes=2, shuffle_block=6)
    tokenizer, samples = open_clip.get_tokenizer("ViT-B-32"), Samples(spoilt)
    instead = {2: 4, 3: 4, 19: 12, 8: 9}
    for step, batch in enumerate(made):
        numbers = [instead.get(number, number) for _, number in order.batch(step)[:, :].tolist()]
        expected = tokenizer([samples[number].fields["txt"].decode() for number in numbers])
        assert torch.equal(batch["text"], expected[:, : batch["text"].shape[1]])
    assert equal(made, batches(spoilt, range(5), LoaderConfig(loader_workers=2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_a_readable_sample_is_an_error(make_snapshot, workers: int) -> None:
    spoilt = make_snapshot((3, 2), spoil={number: {"txt": b"", "jpg": b""} for number in range(3)})
    with pytest.raises(
        DataError, match=r"00000\.tar: no sample is readable; the last one: Image decoding error: empty body$"
    ):
        batches(spoilt, range(5), LoaderConfig(loader_workers=workers))


def test_missing_fields_stop_before_the_first_batch(make_snapshot) -> None:
    wrong = TextReader(tokenizer=open_clip.get_tokenizer("ViT-B-32"), caption="json:title")
    order = Order([20], seed=0, batch_size=4)
    snapshot = make_snapshot()
    training_batches(snapshot, [wrong], order, steps=range(1), config=IN_PROCESS)
    with pytest.raises(SettingError, match="caption"):
        TextReader(tokenizer=wrong.tokenizer, caption="title").fields  # noqa: B018
    bare = Snapshot(**{**vars(snapshot), "fields": ("jpg",)})
    with pytest.raises(DataError, match="no field json"):
        training_batches(bare, [wrong], order, steps=range(1), config=IN_PROCESS)


def test_evaluation_reads_every_sample_once_in_order(make_snapshot) -> None:
    spoilt = make_snapshot(spoil={5: {"jpg": b"", "json": b'{"label": "red"}'}, 6: {"jpg": b"", "json": b"{}"}})
    labelled = [ImageReader(transform=ImageTransform(size=(16, 16))), LabelReader(classes=CLASSES)]
    made = list(snapshot_batches(spoilt, labelled, batch_size=6, config=IN_PROCESS))
    assert [len(batch["label"]) for batch in made] == [5, 5, 6, 2]
    labels = torch.cat([batch["label"] for batch in made]).tolist()
    assert labels == [number % 4 for number in range(20) if number not in (5, 6)]
    limited = list(snapshot_batches(spoilt, labelled, batch_size=3, limit=4, config=IN_PROCESS))
    assert [len(batch["label"]) for batch in limited] == [3, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_two_readers_of_one_key_are_refused(make_snapshot, workers: int) -> None:
    twice, order = (
        [*readers(), TextReader(tokenizer=open_clip.get_tokenizer("ViT-B-32"))],
        Order([20], seed=0, batch_size=4),
    )
    with pytest.raises(ValueError, match="two that give text"):
        next(
            training_batches(make_snapshot(), twice, order, steps=range(1), config=LoaderConfig(loader_workers=workers))
        )


class PositionReader:
    """Where samples are, under two keys; -1 in evaluation."""

    fields = ()

    def read(self, sample: Sample, at: SamplePosition | None) -> Row:
        return {"epoch": at.epoch, "number": at.number} if at else {"epoch": -1, "number": -1}

    def collate(self, rows: list[Row]) -> Batch:
        return {key: torch.tensor([row[key] for row in rows]) for key in ("epoch", "number")}


def test_a_reader_may_give_several_keys_and_knows_the_position_in_training_alone(make_snapshot) -> None:
    snapshot, order = make_snapshot(), Order([7, 5, 8], seed=1, batch_size=4)
    for step, batch in enumerate(
        training_batches(snapshot, [PositionReader()], order, steps=range(7), config=IN_PROCESS)
    ):
        assert torch.stack([batch["epoch"], batch["number"]], dim=1).tolist() == order.batch(step).tolist()
    found = next(snapshot_batches(snapshot, [PositionReader()], batch_size=3, config=IN_PROCESS))
    assert found["epoch"].tolist() == found["number"].tolist() == [-1, -1, -1]


def test_the_models_randomness_is_not_touched(make_snapshot, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(make_snapshot(), range(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("allowed", "processes"), [({0}, 1), ({1, 5}, 2), (set(range(64)), 4)])
def test_the_default_number_of_processes_fits_the_cores(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], processes: int
) -> None:
    """What taskset or a container's cpuset allows; a number that somebody asks for is left as it is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr("pipeline.stages.cores._shares", lambda *_: [])
    assert LoaderConfig().processes() == processes
    assert LoaderConfig(loader_workers=7).processes() == 7
    assert LoaderConfig(loader_workers=0).processes() == 0


@pytest.mark.parametrize("bad", [{"loader_workers": -1}, {"prefetch": 0}, {"open_shards": 0}, {"cache_gigabytes": 0}])
def test_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(SettingError):
        LoaderConfig(**bad)  # type: ignore[arg-type]
