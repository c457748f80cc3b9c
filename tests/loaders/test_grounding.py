"""Prompts, boxes and their tokens of a batch: each box's tokens spell the name of what it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DataError, SettingError, SidecarError
from pipeline.loaders.batches import LoaderConfig, SamplePosition, snapshot_batches, training_batches
from pipeline.loaders.detection import DetectionReader, RandomResize, StoredBoxes
from pipeline.loaders.grounding import GroundingData, GroundingOptions, GroundingReader, grounding_data
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.loaders.mixture import make_order, read_data
from pipeline.loaders.samples import UnreadableSample, check_sidecars
from pipeline.shards.sample import Sample
from tests.grounded import SIDE, grounded, jpeg, obj, publish, row

CLASSES = ("dog", "cat", "bus", "mat", "star")


@pytest.fixture(scope="module")
def tokenizer() -> SpanTokenizer:
    return SpanTokenizer.load("drawn")


def reader(tokenizer: SpanTokenizer, classes: tuple[str, ...] = CLASSES, **options: Any) -> GroundingReader:
    resize = RandomResize(size=SIDE, scale=(1.0, 1.0), flip=0.5)
    data = GroundingData(classes=(classes,), samples=(1000,), captions=options.pop("captions", ()))
    return GroundingReader(tokenizer=tokenizer, resize=resize, options=GroundingOptions(**options), data=data)


def spelt(batch: dict[str, torch.Tensor], row: int, tokenizer: SpanTokenizer) -> list[str]:
    """The text of each box's tokens."""
    count = int(batch["counts"][row])
    known: Any = tokenizer._tokenizer
    return [known.decode(batch["tokens"][row][one].tolist()) for one in batch["positive_map"][row, :count]]


def test_boxes_of_classes_have_the_tokens_of_their_names(tokenizer: SpanTokenizer) -> None:
    made = reader(tokenizer)
    objects = [obj("Dog"), obj("star", (30, 30, 20, 20)), obj("zebra"), obj("dog", iscrowd=1), obj("cat", (0, 0, 0, 3))]
    texts = set()
    for number in range(20):
        row = made.read(grounded(objects), SamplePosition(0, number))
        batch = made.collate([row, made.read(grounded([]), SamplePosition(0, number))])
        assert spelt(batch, 0, tokenizer) == ["dog", "star"]
        assert batch["counts"].tolist() == [2, 0] and batch["left_out"].tolist() == [0, 0]
        assert not batch["positive_map"][1].any() and not batch["boxes"][1].any()
        assert batch["tokens"].shape[1] % 8 == 0 and batch["tokens"].dtype == torch.int64
        assert batch["token_mask"].sum(dim=1).tolist() == (batch["tokens"] != tokenizer.pad).sum(dim=1).tolist()
        assert not (batch["positive_map"] & ~batch["token_mask"][:, None]).any()
        mirrored = batch["boxes"][0, 0].tolist() == [40, 8, 56, 24]
        assert mirrored or batch["boxes"][0, 0].tolist() == [8, 8, 24, 24]
        texts.add((tuple(batch["tokens"][0].tolist()), mirrored))
        again = made.collate([made.read(grounded(objects), SamplePosition(0, number))])
        assert torch.equal(again["tokens"][0], batch["tokens"][0, : again["tokens"].shape[1]])
    assert len(texts) > 10


def test_phrases_of_captions(tokenizer: SpanTokenizer) -> None:
    """Spans in the caption, repeated words, objects of several phrases and of none, an unusable phrase."""
    caption = "a red dog and a red dog near the \u00e9toile"
    phrases = [
        {"start": 2, "end": 9, "objects": [7]},
        {"start": 16, "end": 23, "objects": [8, 7]},
        {"start": 33, "end": 39, "objects": [9, 99]},
        {"start": 30, "end": 90, "objects": [9]},
        {"start": 0, "end": 0, "objects": [9]},
    ]
    objects = [obj("a", id=7), obj("b", id=8), obj("c", id=9), obj("d", id=10)]
    made = reader(tokenizer, captions=("a cat", "the bus"))
    for number in range(20):
        batch = made.collate(
            [made.read(grounded(objects, caption=caption, phrases=phrases, open=True), SamplePosition(1, number))]
        )
        assert spelt(batch, 0, tokenizer) == ["red dog red dog", "red dog", "etoile"]
        assert caption.replace("\u00e9", "e") in tokenizer._tokenizer.decode(batch["tokens"][0].tolist())


def test_phrases_behind_the_limit_are_counted(tokenizer: SpanTokenizer) -> None:
    phrases = [{"start": 0, "end": 3, "objects": [0]}, {"start": 4, "end": 7, "objects": [1]}]
    made = reader(tokenizer, text_tokens=8)
    long = grounded([obj("x"), obj("y")], caption="dog cat " + "star " * 30, phrases=phrases, open=True)
    batch = made.collate([made.read(long, None)])
    assert batch["tokens"].shape == (1, 8) and batch["left_out"].tolist() == [0]
    cut = grounded(
        [obj("x"), obj("y")],
        caption="dog " + "cat" * 30,
        phrases=[phrases[0], {"start": 4, "end": 94, "objects": [1]}],
        open=True,
    )
    batch = made.collate([made.read(cut, None)])
    assert spelt(batch, 0, tokenizer) == ["dog"] and batch["left_out"].tolist() == [1]
    blank = grounded(
        [obj("x")], caption="\u200b\u200b dog", phrases=[{"start": 0, "end": 2, "objects": [0]}], open=True
    )
    batch = made.collate([made.read(blank, None)])
    assert batch["counts"].tolist() == [0] and batch["left_out"].tolist() == [1]


def test_captions_without_annotated_objects(tokenizer: SpanTokenizer) -> None:
    """Whether their words are in the image is not known; of a prompt of classes it is, without objects too."""
    made = reader(tokenizer)
    caption, phrases = "a dog", [{"start": 2, "end": 5, "objects": [0]}]
    rows = [
        grounded([obj("x")], caption=caption, phrases=phrases, open=True),
        grounded([obj("x")], caption=caption, phrases=[{"start": 2, "end": 5, "objects": []}], open=True),
        grounded([obj("x", iscrowd=1)], caption=caption, phrases=phrases, open=True),
        grounded([], caption=caption, open=True),
        grounded([]),
    ]
    batch = made.collate([made.read(one, SamplePosition(0, 0)) for one in rows])
    assert batch["annotated"].tolist() == [True, False, False, False, True]
    small = RandomResize(size=SIDE, scale=(8.0, 8.0), flip=0.0)
    away = replace(made, resize=small).read(rows[0], SamplePosition(0, 1))
    assert away["annotated"] and len(away["boxes"]) == 0, "cut off by the augmentation: its words are not in the image"


def test_images_are_not_mirrored_against_their_caption(tokenizer: SpanTokenizer) -> None:
    made = reader(tokenizer)
    phrases = [{"start": 0, "end": 3, "objects": [0]}]
    for caption, expected in (("dog to the left of a cat", {8.0}), ("dog and leftovers", {8.0, 40.0})):
        one = grounded([obj("dog")], caption=caption, phrases=phrases, open=True)
        rows = [made.read(one, SamplePosition(0, number)) for number in range(20)]
        assert {float(row["boxes"][0, 0]) for row in rows} == expected


def test_samples_with_both_are_read_in_both_ways(tokenizer: SpanTokenizer) -> None:
    one = grounded([obj("dog")], caption="my pet", phrases=[{"start": 3, "end": 6, "objects": [0]}])
    for share, expected in ((0.0, {"dog"}), (1.0, {"pet"}), (0.5, {"dog", "pet"})):
        made = reader(tokenizer, caption_share=share)
        rows = [made.collate([made.read(one, SamplePosition(0, number))]) for number in range(40)]
        assert {spelt(row, 0, tokenizer)[0] for row in rows} == expected
    assert spelt(made.collate([made.read(one, None)]), 0, tokenizer) == ["dog"]


def test_federated_data_have_verified_negatives_only(tokenizer: SpanTokenizer) -> None:
    made = reader(tokenizer, full_prompts=1.0)
    one = grounded([obj("dog")], negative=["bus"])
    for number in range(10):
        batch = made.collate([made.read(one, SamplePosition(0, number))])
        text = tokenizer._tokenizer.decode(batch["tokens"][0].tolist())
        assert "dog" in text and "bus" in text and not any(name in text for name in ("cat", "mat", "star"))


def test_unusable_samples(tokenizer: SpanTokenizer) -> None:
    made = reader(tokenizer, ())
    with pytest.raises(DataError, match="names no classes"):
        made.read(grounded([obj("dog")]), None)
    for named in (made, reader(tokenizer)):  # one caption that is missing is no reason to stop
        with pytest.raises(UnreadableSample, match="0 has no caption"):
            named.read(grounded([], caption="", open=True), SamplePosition(0, 0))
    with pytest.raises(UnreadableSample):
        made.read(Sample("0", {"jpg": jpeg(8, 8), "boxes.json": b"{}"}), None)
    with pytest.raises(DataError, match="measured in"):
        made.read(grounded([], caption="x", open=True, width=63), None)
    for wrong in ({"start": "a", "end": 2}, {"start": 0}, 3):
        with pytest.raises(UnreadableSample):
            made.read(grounded([], caption="abc", phrases=[wrong], open=True), None)
    with pytest.raises(UnreadableSample, match="score"):
        made.read(grounded([obj("dog", score=float("nan"))], caption="x", open=True), None)


def test_a_mixture_keeps_the_classes_of_its_parts_apart(tmp_path: Path, tokenizer: SpanTokenizer) -> None:
    """Boxes with classes, captions with phrases, and captions with pseudo boxes, in one run."""
    publish(tmp_path / "a", [grounded([obj("dog")], f"a{n}") for n in range(6)], classes={"dog": "", "cat": ""})
    publish(tmp_path / "b", [grounded([obj("bus")], f"b{n}") for n in range(6)], classes={"bus": "", "mat": ""})
    captions = [Sample(f"c{n}", {"jpg": jpeg(), "txt": b"a red star"}) for n in range(6)]
    rows = [row(one.key, "a red star", [(2, 10)], [(8, 8, 24, 24)]) for one in captions]
    rows[0]["scores"] = [0.4]
    publish(tmp_path / "c", captions, rows=rows)
    data = ",".join(f"{tmp_path / name}=1" for name in "abc")
    options = GroundingOptions(pseudo_boxes="boxes", full_prompts=1.0)
    found = grounding_data(data, options)
    assert found.classes == (("dog", "cat"), ("bus", "mat"), ()) and found.samples == (6, 6, 6)
    assert set(found.captions) == {"a red star"}
    made = GroundingReader(tokenizer=tokenizer, resize=RandomResize(size=64), options=options, data=found)
    mixture = read_data(data)
    order = make_order(mixture, seed=0, batch_size=9, lanes=1, shuffle_block=4)
    config, seen = LoaderConfig(loader_workers=0), set()
    for batch in training_batches(mixture, [made], order, steps=range(4), config=config):
        assert batch["image"].shape == (9, 3, 64, 64) and batch["replaced"] == 0
        for number, tokens in enumerate(batch["tokens"].tolist()):
            text = tokenizer._tokenizer.decode(tokens)
            words = frozenset(text.replace(".", " ").split())
            assert words in ({"dog", "cat"}, {"bus", "mat"}, {"a", "red", "star"}), text
            seen.add((words, int(batch["counts"][number])))
    assert (frozenset({"a", "red", "star"}), 0) in seen and (frozenset({"a", "red", "star"}), 1) in seen
    assert len(seen) >= 4
    with pytest.raises(DataError, match="names no classes|neither"):
        list(
            training_batches(
                read_data(str(tmp_path / "c")),
                [
                    GroundingReader(
                        tokenizer=tokenizer, resize=made.resize, options=GroundingOptions(pseudo_boxes="others")
                    )
                ],
                make_order(read_data(str(tmp_path / "c")), seed=0, batch_size=2, lanes=1, shuffle_block=4),
                steps=range(1),
                config=config,
            )
        )


def test_malformed_rows_of_pseudo_boxes(tmp_path: Path, tokenizer: SpanTokenizer) -> None:
    captions = [Sample(f"c{n}", {"jpg": jpeg(), "txt": b"a star"}) for n in range(2)]
    made = reader(tokenizer, (), pseudo_boxes="boxes")
    for wrong in (
        {"scores": []},
        {"phrase": [3]},
        {"boxes": [1.0] * 3},
        {"boxes": [float("nan")] * 4},
        {"captions": ["a"]},
        {"captions": []},
        {"phrases": [{"caption": 1, "start": 2, "end": 6, "cut": False}]},
    ):
        rows = [row(one.key, "a star", [(2, 6)], [(8, 8, 24, 24)]) | wrong for one in captions]
        data = publish(tmp_path / str(len(list(tmp_path.iterdir()))), captions, rows=rows)
        with pytest.raises(SidecarError, match="not as described"):
            list(snapshot_batches(data, [made], batch_size=2, config=LoaderConfig(loader_workers=0)))
    rows = [row(captions[0].key, "a star", [], height=0, width=0), row(captions[1].key, "a star", [(2, 6)])]
    data = publish(tmp_path / "unreadable", captions, rows=rows)
    (batch,) = snapshot_batches(data, [made], batch_size=2, config=LoaderConfig(loader_workers=0))
    assert batch["replaced"] == 1 and batch["counts"].tolist() == [0]


def test_detectors_read_pseudo_boxes_of_their_classes(tmp_path: Path) -> None:
    """Phrases that are names of classes, with a sufficient score; a data set without the sidecar keeps its boxes."""
    captions = [Sample(f"c{n}", {"jpg": jpeg(), "txt": b"Dog, red dog"}) for n in range(2)]
    boxes = [(8, 8, 24, 24), (0, 0, 9, 9)]
    rows = [row(one.key, "Dog, red dog", [(0, 3), (5, 12)], boxes) for one in captions]
    rows[1]["scores"] = [0.3, 0.9]
    pseudo = publish(tmp_path / "pseudo", captions, rows=rows)
    gold = publish(tmp_path / "gold", [grounded([obj("dog")], "g0")])
    stored = StoredBoxes.named("boxes", 0.5)
    made = DetectionReader(
        keys=("image", "boxes", "labels"), resize=RandomResize(size=64), classes=("cat", "dog"), pseudo=stored
    )
    config = LoaderConfig(loader_workers=0)
    (batch,) = snapshot_batches(pseudo, [made], batch_size=4, config=config)
    assert batch["labels"].tolist() == [[1], [-1]] and batch["boxes"][0].tolist() == [[8, 8, 24, 24]]
    (batch,) = snapshot_batches(gold, [made], batch_size=4, config=config)
    assert batch["labels"].tolist() == [[1]]
    anything = DetectionReader(keys=("labels",), resize=RandomResize(size=64), pseudo=stored)
    (batch,) = snapshot_batches(pseudo, [anything], batch_size=4, config=config)
    assert batch["labels"].tolist() == [[0, 0], [0, -1]]
    with pytest.raises(SettingError, match="least_box_score"):
        StoredBoxes.named("boxes", 2.0)


def test_captions_with_boxes_are_drawn_by_epoch(tmp_path: Path, tokenizer: SpanTokenizer) -> None:
    """Of four captions the two that have a sufficient box; in evaluation the first of these; the others nowhere."""
    captions = ["no box", "a red star", "a disc below", "a faint cat"]
    phrases = [(1, 2, 10), (2, 2, 6), (3, 8, 11)]
    stored = row("c0", "", [(0, 1)] * 3, [(8, 8, 24, 24), (0, 0, 9, 9), (1, 1, 20, 20)], captions=captions)
    stored["phrases"] = [{"caption": of, "start": start, "end": end, "cut": False} for of, start, end in phrases]
    stored["scores"] = [0.9, 0.5, 0.4]
    sample = Sample("c0", {"jpg": jpeg()}, {"boxes": stored})
    made = reader(tokenizer, (), pseudo_boxes="boxes", mixed_captions=0)
    seen = []
    for epoch in range(40):
        at = SamplePosition(epoch, 7)
        batch = made.collate([made.read(sample, at)])
        seen.append((spelt(batch, 0, tokenizer)[0], float(batch["boxes"][0, 0, 3])))
        assert torch.equal(batch["tokens"], made.collate([made.read(sample, at)])["tokens"])
    assert set(seen) == {("red star", 24.0), ("disc", 9.0)} and 8 < seen.count(("disc", 9.0)) < 32
    assert spelt(made.collate([made.read(sample, None)]), 0, tokenizer) == ["red star"]
    strict = reader(tokenizer, (), pseudo_boxes="boxes", least_box_score=0.95)
    none = strict.read(sample, SamplePosition(0, 7))
    assert len(none["boxes"]) == 0 and not none["annotated"]
    detector = DetectionReader(
        keys=("labels",), resize=made.resize, classes=("red star", "disc"), pseudo=StoredBoxes.named("boxes", 0.5)
    )
    assert detector.read(sample, SamplePosition(0, 7))["labels"].tolist() == [0, 1], "a detector needs no caption"


def test_captions_of_annotated_data_are_drawn_by_epoch(tokenizer: SpanTokenizer) -> None:
    """As drawn data have them: further captions, with phrases of the same objects; classes are read all the same."""
    more = [
        {"caption": "cat below", "phrases": [{"start": 0, "end": 3, "objects": [1]}]},
        {"caption": "nothing of both", "phrases": []},
    ]
    one = grounded(
        [obj("dog", id=0), obj("cat", (30, 30, 20, 20), id=1)],
        caption="my pet",
        phrases=[{"start": 3, "end": 6, "objects": [0]}],
        more_captions=more,
    )
    for share, expected in ((1.0, {"pet", "cat"}), (0.0, {"dog cat"})):
        made = reader(tokenizer, caption_share=share)
        found = [made.collate([made.read(one, SamplePosition(epoch, 3))]) for epoch in range(30)]
        assert {" ".join(spelt(batch, 0, tokenizer)) for batch in found} == expected
    for wrong in ({"caption": 1, "phrases": 3}, 3, {"caption": "x", "phrases": [{"start": "a", "end": 1}]}):
        with pytest.raises(UnreadableSample, match="not as described"):
            made.read(grounded([obj("dog")], caption="my pet", more_captions=[wrong]), None)


def test_some_shards_without_the_sidecar_are_an_error(tmp_path: Path) -> None:
    rows = [row(f"c{n}", "a star", [(2, 6)]) for n in range(8)]
    samples = [Sample(f"c{n}", {"jpg": jpeg(), "txt": b"a star"}) for n in range(8)]
    data = publish(tmp_path, samples, rows=rows)
    bare = replace(data, shards=(data.shards[0], replace(data.shards[1], sidecars={})))
    stored = StoredBoxes.named("boxes", 0.5)
    assert stored is not None
    with pytest.raises(SidecarError, match="no boxes for 1 of its 2 shards"):
        check_sidecars(bare, [stored.wanted])
