"""One set of readers: training and evaluation read the same values of a sample."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluation.data import SnapshotData, evaluation_batches
from pipeline.loaders.batches import LoaderConfig, Reader, SamplePosition, snapshot_batches
from pipeline.loaders.images import ImageTransform, as_stored, decode
from pipeline.loaders.readers import (
    CaptionsReader,
    FirstCaptionReader,
    ImageReader,
    LabelReader,
    TextReader,
    read_label,
)
from pipeline.loaders.samples import UnreadableSample
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot

CLASSES = ("red", "green", "blue", "red")
AT = SamplePosition(3, 14)


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[*text.encode()[:12]] + [0] * (12 - len(text.encode()[:12])) for text in texts])


def labelled(value: object, key: str = "label", **fields: bytes) -> Sample:
    return Sample("0007", {"json": json.dumps({key: value}).encode(), **fields})


def test_evaluation_reads_what_the_training_loader_reads(make_snapshot: Callable[..., Snapshot]) -> None:
    snapshot = make_snapshot((5, 4))
    readers: list[Reader] = [
        ImageReader(transform=ImageTransform(size=(24, 24))),
        TextReader(tokenizer=letters),
        LabelReader(classes=("red", "green", "blue", "yellow")),
    ]
    loaded = list(snapshot_batches(snapshot, readers, batch_size=4, config=LoaderConfig(loader_workers=0)))
    read = list(evaluation_batches(SnapshotData(snapshot, None).samples(None), readers, batch=4, threads=2))
    assert len(loaded) == len(read) == 3
    for one, other in zip(loaded, read, strict=True):
        assert one.pop("replaced") == 0
        assert one.keys() == other.keys() == {"image", "text", "label"}
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_an_image_without_a_transform_is_as_it_is_stored(make_snapshot: Callable[..., Snapshot]) -> None:
    sample = next(SnapshotData(make_snapshot((2,)), None).samples(1))
    reader = ImageReader(transform=None)
    row = reader.read(sample)
    content = sample.image()
    assert content is not None and torch.equal(row["image"], as_stored(decode(content)))
    assert reader.collate([row, row])["image"] == [row["image"], row["image"]]
    with pytest.raises(UnreadableSample, match="0001 has no image"):
        reader.read(Sample("0001", {"txt": b"a"}))


@pytest.mark.parametrize(("label", "number"), [("red", 0), ("blue", 2), (1, 1), ("2", None), (4, None), (-1, None)])
def test_training_and_evaluation_number_labels_alike(label: object, number: int | None) -> None:
    sample = labelled(label)
    training, evaluation = LabelReader(classes=CLASSES), LabelReader(classes=CLASSES, evaluated="colours")
    if number is not None:
        assert training.read(sample, AT) == evaluation.read(sample) == {"label": number}
        return
    with pytest.raises(UnreadableSample, match=r"0007's 'label' is none of the 4 classes \('red', "):
        training.read(sample, AT)
    with pytest.raises(DataError, match="colours: .* in the samples' 'label' is none of the 4 classes.*--label"):
        evaluation.read(sample)


@pytest.mark.parametrize(
    ("label", "number"),
    [("apple_pie", 0), ("Apple pie", 0), ("apple pie.", 0), ("Crane", 1), ("crane", 2), ("CRANE", None), ("pie", None)],
)
def test_labels_are_compared_as_class_names_where_one_class_fits(label: str, number: int | None) -> None:
    reader = LabelReader(classes=("apple pie", "Crane", "crane"))
    if number is None:
        with pytest.raises(UnreadableSample, match="none of the 3 classes"):
            reader.read(labelled(label), AT)
    else:
        assert reader.read(labelled(label), AT) == {"label": number}


@pytest.mark.parametrize("content", [b'{"label": null}', b'{"label": 1.0}', b"{}", b"[]"])
def test_a_missing_label_is_unreadable_in_training_and_an_error_in_evaluation(content: bytes) -> None:
    sample = Sample("0007", {"json": content})
    with pytest.raises(UnreadableSample, match="0007 has no class under 'label'"):
        LabelReader(classes=CLASSES).read(sample, AT)
    with pytest.raises(DataError, match="0007 has no class under 'label' in its json; its keys: "):
        LabelReader(classes=CLASSES, evaluated="colours").read(sample)


def test_labels_have_several_forms() -> None:
    assert read_label(labelled("cat"), "label") == "cat"
    assert read_label(labelled(True), "label") == "True"
    assert read_label(labelled("cat", cls=b"12\n"), "cls") == 12
    assert read_label(labelled("cat", key="cls"), "cls") == "cat"
    with pytest.raises(UnreadableSample, match="is no JSON"):
        read_label(Sample("0", {"json": b"{"}), "label")


def test_several_captions_know_their_sample() -> None:
    reader: Any = CaptionsReader(tokenizer=letters)
    rows = [
        reader.read(Sample("0", {"txt": b"first", "json": b'{"captions": ["a", " ", "b"]}'})),
        reader.read(Sample("1", {"txt": b"c"})),
    ]
    batch = reader.collate(rows)
    assert batch["text_rows"].tolist() == [0, 0, 1]
    assert torch.equal(batch["text"], letters(["a", "b", "c"]))
    with pytest.raises(UnreadableSample, match="2 has no caption"):
        reader.read(Sample("2", {"txt": b" \n"}))


def test_a_caption_to_be_shown_may_be_missing() -> None:
    reader = FirstCaptionReader()
    assert reader.read(Sample("0", {"json": b'{"captions": ["a", "b"]}'})) == {"caption": "a"}
    assert reader.read(Sample("0", {"json": b"{}"})) == {"caption": ""}
    assert FirstCaptionReader(caption="json:title").read(Sample("0", {"json": b'{"title": "t"}'})) == {"caption": "t"}


def test_training_reads_one_caption_of_a_list_in_each_epoch() -> None:
    """All of them over epochs, the same one for the same position; evaluation reads the first."""
    texts = ["one", "two", "three"]
    sample = labelled([*texts, "", 5], "captions", txt=b"the txt")
    reader = TextReader(tokenizer=letters, caption="json:captions", seed=2)
    found = [reader.read(sample, SamplePosition(epoch, 14))["text"] for epoch in range(60)]
    assert set(found) == set(texts)
    assert found == [reader.read(sample, SamplePosition(epoch, 14))["text"] for epoch in range(60)]
    other = TextReader(tokenizer=letters, caption="json:captions", seed=3)
    assert found != [other.read(sample, SamplePosition(epoch, 14))["text"] for epoch in range(60)]
    assert reader.read(sample)["text"] == "one"
    assert TextReader(tokenizer=letters).read(sample, AT)["text"] == "the txt"
    assert reader.read(labelled("a text", "captions"), AT)["text"] == "a text"
    for empty in ([], ["", 7], 7):
        with pytest.raises(UnreadableSample):
            reader.read(labelled(empty, "captions"), AT)
