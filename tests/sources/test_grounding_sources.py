"""ODVG, MDETR's annotations and GLIP's tables, valid and broken, as shards with boxes, phrases and captions."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError
from pipeline.loaders.samples import Samples
from pipeline.shards.objects import Objects, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.sources.glip_tsv import GlipTsv, record_of_label
from pipeline.sources.grounding_records import GroundedRegion, caption_record
from pipeline.sources.mdetr import Mdetr
from pipeline.sources.odvg import Odvg
from pipeline.sources.source import Source
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers
from tests.grounded import jpeg

CAPTION = "a \u00e9tude cat on a cat mat"
OPTIONS = ShardOptions(
    media=MediaOptions(image=ImageOptions(resize_mode="no", keep_bytes=True)), number_sample_per_shard=3
)


def made(source: Source, folder: Path, **renewal: Any) -> Snapshot:
    return refresh(source, Folder(str(folder)), OPTIONS, Workers(processes_count=0), renewal=Renewal(**renewal))


def samples(snapshot: Snapshot) -> list[Sample]:
    found = Samples(snapshot)
    return [found[number] for number in range(len(found))]


def named(objects: Objects) -> dict[str, list[list[float]]]:
    """The boxes of each phrase by its text."""
    text = objects.caption
    return {text[one.start : one.end]: objects.boxes[list(one.objects)].tolist() for one in objects.phrases}


def images(folder: Path, *names: str) -> str:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(40, 60, seed))
    return str(folder)


def test_odvg_captions_and_bad_lines(tmp_path: Path) -> None:
    sized = {"height": 40, "width": 60}
    regions = [
        {"bbox": [1, 2, 11, 12], "phrase": "cat", "tokens_positive": [[8, 11]], "score": 0.5},
        {
            "bbox": [[0, 0, 9, 9], [20, 20, 80, 90]],
            "phrase": ["cat mat", "mat"],
            "tokens_positive": [[17, 24], [21, 24]],
        },
        {"bbox": [30, 30, 10, 40], "phrase": "mat", "tokens_positive": [[21, 24]]},
        {"bbox": [1, 2, 3, 4], "phrase": "x", "tokens_positive": [[90, 95]]},
        {"bbox": [1, 2, float("nan"), 4], "phrase": "x", "tokens_positive": [[0, 1]]},
    ]
    by_words = [{"bbox": [5, 5, 9, 9], "phrase": "cat mat"}, {"bbox": [5, 5, 9, 9], "phrase": "tude"}]
    lines = [
        {"filename": "sub/a.jpg", **sized, "grounding": {"caption": CAPTION, "regions": regions}},
        {"filename": "b.jpg", **sized, "grounding": {"caption": CAPTION, "regions": by_words}},
        {"filename": "b.jpg", **sized, "grounding": {"caption": "nothing here", "regions": []}},
        {"filename": "c.jpg", **sized, "grounding": {"regions": []}},
        {"filename": "gone.jpg", **sized, "grounding": {"caption": "cat", "regions": []}},
    ]
    text = "\n".join([*(json.dumps(line) for line in lines), "", '{"filename":', "[]"])
    (tmp_path / "a.jsonl").write_text(text)
    folder = images(tmp_path / "images", "sub/a.jpg", "deep/b.jpg", "c.jpg")
    snapshot = made(Odvg(annotations=str(tmp_path / "a.jsonl"), images=folder), tmp_path / "out")
    first, second, third = map(read_objects, samples(snapshot))
    assert named(first) == {
        "cat": [[1, 2, 11, 12]],
        "cat mat": [[0, 0, 9, 9], [20, 20, 60, 40]],
        "mat": [[0, 0, 9, 9], [20, 20, 60, 40]],
    }
    assert first.scores.tolist() == [0.5, 1, 1] and first.open_labels and first.labels == ("cat", "cat mat", "cat mat")
    assert named(second) == {"cat mat": [[5, 5, 9, 9]]} and named(third) == {}
    assert [one.fields["txt"].decode() for one in samples(snapshot)] == [CAPTION, CAPTION, "nothing here"]
    assert snapshot.rows == 7 and snapshot.dropped == {"bad_annotation": 3, "unreadable": 1}
    left_out = [json.loads(one.fields["json"])["left_out"] for one in samples(snapshot)]
    assert left_out == [3, 1, 0]


def test_odvg_boxes_and_label_map(tmp_path: Path) -> None:
    instances = [
        {"bbox": [1, 2, 11, 12], "label": 1, "category": "cat"},
        {"bbox": [0, 0, 0, 5], "label": 0, "category": "dog"},
    ]
    lines = [{"filename": "a.jpg", "height": 40, "width": 60, "detection": {"instances": instances}}]
    lines.append({"filename": "b.jpg", "height": 40, "width": 60, "detection": {"instances": []}})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = images(tmp_path / "images", "a.jpg", "b.jpg")
    plain = Odvg(annotations=str(tmp_path / "a.jsonl"), images=folder)
    assert dict(plain.classes) == {"cat": "", "dog": ""}
    snapshot = made(plain, tmp_path / "out")
    first, second = map(read_objects, samples(snapshot))
    assert first.labels == ("cat",) and first.left_out == 0 and not first.open_labels and len(second) == 0
    assert snapshot.options["classes"] == {"cat": "", "dog": ""}
    (tmp_path / "map.json").write_text('{"0": "hound", "1": "kitten", "2": "bird"}')
    mapped = replace(plain, label_map=str(tmp_path / "map.json"))
    assert list(mapped.classes) == ["hound", "kitten", "bird"]
    assert read_objects(samples(made(mapped, tmp_path / "other"))[0]).labels == ("kitten",)
    (tmp_path / "map.json").write_text("[1]")
    with pytest.raises(SettingError, match="label_map"):
        made(replace(mapped), tmp_path / "third")


def mdetr() -> dict[str, Any]:
    image = {"height": 40, "width": 60, "file_name": "a.jpg", "dataset_name": "flickr"}
    return {
        "info": [],
        "images": [
            {**image, "id": 1, "caption": CAPTION},
            {**image, "id": 2, "caption": "the mat"},
            {**image, "id": 3},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "bbox": [1, 2, 10, 10],
                "tokens_positive": [[8, 11], [17, 20]],
                "iscrowd": 0,
                "area": 100,
            },
            {"id": 2, "image_id": 2, "bbox": [0, 0, 30, 30], "tokens_positive": [[4, 7]], "iscrowd": 1, "area": 1},
            {"id": 3, "image_id": 2, "bbox": ["x", 0, 30, 30], "tokens_positive": [[4, 7]]},
            {"id": 4, "image_id": 2, "bbox": [0, 0, 30, 30], "tokens_positive": []},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }


def test_mdetr_captions_of_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(mdetr()))
    folder = images(tmp_path / "images", "a.jpg")
    source = Mdetr(annotations=str(tmp_path / "a.json"), images=folder)
    snapshot = made(source, tmp_path / "out")
    first, second = map(read_objects, samples(snapshot))
    assert named(first) == {"cat": [[1, 2, 11, 12]]} or first.phrases[0].objects == first.phrases[1].objects == (0,)
    assert [(one.start, one.end) for one in first.phrases] == [(8, 11), (17, 20)]
    assert named(second) == {"mat": [[0, 0, 30, 30]]} and second.crowd == (True,)
    assert snapshot.dropped == {"bad_annotation": 1}
    assert [json.loads(one.fields["json"])["left_out"] for one in samples(snapshot)] == [0, 2]
    # Nothing has changed: the same snapshot. A changed phrase: another one.
    assert made(source, tmp_path / "out", parent="latest").digest == snapshot.digest
    changed = mdetr()
    changed["annotations"][1]["bbox"] = [0, 0, 20, 20]
    (tmp_path / "a.json").write_text(json.dumps(changed))
    again = made(replace(source), tmp_path / "out", parent="latest")
    assert sorted(named(read_objects(one)).get("mat", []) for one in samples(again)) == [[], [[0, 0, 20, 20]]]


def tables(folder: Path, lines: Mapping[str, tuple[bytes, Any]], index: bool = True) -> GlipTsv:
    folder.mkdir(exist_ok=True)
    content, starts = b"", []
    for key, (image, _) in lines.items():
        starts.append(len(content))
        content += key.encode() + b"\t" + image + b"\n"
    (folder / "img.tsv").write_bytes(content)
    if index:
        (folder / "img.lineidx").write_text("\n".join(map(str, starts)) + "\n")
    labels = [f"{key}\t{label if isinstance(label, str) else json.dumps(label)}" for key, (_, label) in lines.items()]
    (folder / "label.tsv").write_text("\n".join(labels) + "\n", encoding="utf-8")
    return GlipTsv(images=str(folder / "img.tsv"), labels=str(folder / "label.tsv"))


@pytest.mark.parametrize("index", [True, False])
def test_tables_of_glip(tmp_path: Path, index: bool) -> None:
    image = base64.b64encode(jpeg(40, 60))
    flat = {
        "img_h": 40,
        "img_w": 60,
        "caption": CAPTION,
        "tokens_positive": [[8, 11]],
        "bboxes": [[1, 2, 11, 12]],
        "scores": [0.7],
    }
    nested = {
        "caption": CAPTION,
        "tokens_positive": [[[8, 11]], [[21, 24]]],
        "bboxes": [[[1, 2, 11, 12], [0, 0, 5, 5]], []],
        "scores": [[0.7, 0.4], []],
    }
    boxes = [{"class": "person", "rect": [0, 0, 30, 30]}, {"class": "dog", "rect": [9, 9, 5, 5]}]
    lines = {
        "a": (image, flat),
        "b": (image, nested),
        "c": (image, boxes),
        "d": (image, {"objects": boxes[:1]}),
        "e": (b"%%%", boxes),
        "f": (image, "{broken"),
        "g": (image, {**flat, "bboxes": []}),
        "h": (base64.b64encode(b"no image"), boxes),
    }
    source = tables(tmp_path / "tables", lines, index)
    assert dict(source.classes) == {"dog": "", "person": ""}
    snapshot = made(source, tmp_path / "out")
    first, second, third, fourth = map(read_objects, samples(snapshot))
    assert named(first) == {"cat": [[1, 2, 11, 12]]} and first.scores.tolist() == [0.7]
    assert named(second) == {"cat": [[1, 2, 11, 12], [0, 0, 5, 5]]} and second.scores.tolist() == [0.7, 0.4]
    assert third.labels == fourth.labels == ("person",) and not third.open_labels
    assert snapshot.dropped == {"no_base64": 1, "bad_annotation": 2, "not_an_image": 1}


def test_tables_that_do_not_belong_together(tmp_path: Path) -> None:
    image = base64.b64encode(jpeg(40, 60))
    source = tables(tmp_path / "tables", {"a": (image, []), "b": (image, [])})
    (tmp_path / "tables" / "label.tsv").write_text("a\t[]\n")
    with pytest.raises(SettingError, match="labels"):
        made(source, tmp_path / "out")
    (tmp_path / "tables" / "label.tsv").write_text("a\t[]\nc\t[]\n")
    snapshot = made(replace(source), tmp_path / "other")
    assert snapshot.samples == 1 and snapshot.dropped == {"other_key": 1}


def test_hostile_records() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        caption_record(5, 0, "x", [])
    with pytest.raises(ValueError, match="more than 10000"):
        caption_record(9, 9, "cat", [GroundedRegion([[0, 0, 5, 5]] * 10_001, [(0, 3)])])
    found = caption_record(
        9, 9, "c\ud800t", [GroundedRegion([[0, 0, 5, 5], "abcd", None], [(0, 3), ("a", 2), None, (1,)])]
    )
    assert found.content["phrases"] == [{"start": 0, "end": 3, "objects": [0]}] and found.left_out == 2
    assert found.caption == "c?t"
    for text in ("1", "null", '{"caption": "x", "bboxes": 5}', '[{"class": "x"}]', "[" * 200):
        with pytest.raises((ValueError, TypeError, KeyError)):
            record_of_label(text, 9, 9)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": [], "annotations": []}', '{"images": [1], "annotations": [2]}']
)
def test_files_that_are_no_annotations(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    folder = images(tmp_path / "images", "a.jpg")
    with pytest.raises(SettingError, match="annotations|images"):
        made(Mdetr(annotations=str(tmp_path / "a.json"), images=folder), tmp_path / "out")


def test_missing_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"filename": "a.jpg", "height": 4, "width": 4, "detection": {}}')
    for source in (
        Odvg(annotations=str(tmp_path / "none"), images=str(tmp_path)),
        Odvg(annotations=str(tmp_path / "a.jsonl"), images=str(tmp_path / "none")),
        Odvg(annotations=str(tmp_path / "a.jsonl"), images=str(tmp_path)),
        GlipTsv(images=str(tmp_path / "none.tsv"), labels=str(tmp_path / "a.jsonl")),
    ):
        with pytest.raises(SettingError):
            made(source, tmp_path / "out")
    with pytest.raises(SettingError, match="images"):
        Odvg(annotations="x", images="")
