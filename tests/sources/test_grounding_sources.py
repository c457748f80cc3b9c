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
from pipeline.sources.odvg import Odvg, record_of_line
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


def test_class_names_with_punctuation_and_duplicates(tmp_path: Path) -> None:
    """Names that are equal but for case and marks are one class; boxes with a name of marks alone are left out."""
    names = ["C++", "c++", "St. Bernard", "person.", "person", "...", " ", "\u200b", "cup_(trophy)", "a; b"]
    instances = [{"bbox": [n, 0, n + 9, 9], "category": name} for n, name in enumerate(names)]
    line = {"filename": "a.jpg", "height": 40, "width": 60, "detection": {"instances": instances}}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    source = Odvg(annotations=str(tmp_path / "a.jsonl"), images=images(tmp_path / "images", "a.jpg"))
    assert list(source.classes) == ["C++", "St. Bernard", "a; b", "cup_(trophy)", "person"]
    (sample,) = samples(made(source, tmp_path / "out"))
    assert read_objects(sample).labels == ("C++", "c++", "St. Bernard", "person.", "person", "cup_(trophy)", "a; b")
    assert json.loads(sample.fields["json"])["left_out"] == 3


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


def glip_files(folder: Path) -> dict[str, tuple[bytes, Any]]:
    """Three images; their labels are the names of their keys as classes."""
    lines = {
        key: (base64.b64encode(jpeg(40, 60, seed)), [{"class": f"class {key}", "rect": [0, 0, 9, 9]}])
        for seed, key in enumerate("abc")
    }
    tables(folder, lines)
    return lines


def test_a_line_list_chooses_and_repeats_lines(tmp_path: Path) -> None:
    """In its order, from 0 on; by settings or by the YAML file, whose paths are below its folder."""
    lines = glip_files(tmp_path / "tables")
    (tmp_path / "tables" / "train.linelist").write_text("2\n0\n2\n\n")
    (tmp_path / "tables" / "map.json").write_text('{"label_to_idx": {"class c": 1, "class a": 2, "class b": 3}}')
    files = {
        "img": "img.tsv",
        "label": "label.tsv",
        "linelist": "train.linelist",
        "labelmap": "map.json",
        "hw": "no.tsv",
    }
    (tmp_path / "tables" / "train.yaml").write_text("".join(f"{key}: {name}\n" for key, name in files.items()))
    plain = tables(tmp_path / "tables", lines)
    listed = replace(plain, linelist=str(tmp_path / "tables" / "train.linelist"))
    named = GlipTsv(images=str(tmp_path / "tables" / "train.yaml"))
    assert list(named.classes) == ["class c", "class a", "class b"] and list(listed.classes) == sorted(named.classes)
    for number, source in enumerate((listed, named)):
        found = samples(made(source, tmp_path / f"out{number}"))
        assert [read_objects(one).labels for one in found] == [("class c",), ("class a",), ("class c",)]
        assert found[0].image() == found[2].image() == jpeg(40, 60, 2) and found[1].image() == jpeg(40, 60, 0)
    other = replace(named, linelist=str(tmp_path / "one"))
    (tmp_path / "one").write_text("1")
    assert [read_objects(one).labels for one in samples(made(other, tmp_path / "out2"))] == [("class b",)]


def test_captions_find_their_image_by_its_number(tmp_path: Path) -> None:
    """Two captions of one image and one of another, whose labels have other keys than the images; old columns."""
    glip_files(tmp_path)
    image = base64.b64encode(jpeg(40, 60, 1))
    (tmp_path / "img.tsv").write_bytes(b"a\tx\t" + base64.b64encode(jpeg(40, 60, 0)) + b"\nb\t[]\t" + image + b"\n")
    (tmp_path / "img.lineidx").unlink()
    (tmp_path / "index.json").write_text('{"7": 1, "8": 0, "9": 5}')
    box = {"tokens_positive": [[0, 3]], "bboxes": [[1, 2, 11, 12]]}
    texts = [("dog", 7), ("cat", 8), ("the dog", 7), ("far", 9), ("unknown", 10)]
    labels = [
        f"t{n}\t{json.dumps({'img_id': number, 'caption': text, **box})}" for n, (text, number) in enumerate(texts)
    ]
    (tmp_path / "label.tsv").write_text("\n".join([*labels, "t5\t[]"]))
    source = GlipTsv(images=str(tmp_path / "img.tsv"), labels=str(tmp_path / "label.tsv"))
    with pytest.raises(SettingError, match="labels: got 6, expected 2 lines"):
        made(source, tmp_path / "no")
    snapshot = made(replace(source, image_index=str(tmp_path / "index.json")), tmp_path / "out")
    found = samples(snapshot)
    assert [read_objects(one).caption for one in found] == ["dog", "cat", "the dog"]
    assert [one.image() for one in found] == [jpeg(40, 60, n) for n in (1, 0, 1)]
    assert snapshot.dropped == {"no_image": 3}


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("train.linelist", "0\n3\n", "linelist: got 3, expected 0 to 2"),
        ("train.linelist", "0\n-1\n", "linelist: got '-1'"),
        ("train.linelist", "one\n", "linelist"),
        ("train.linelist", "", "linelist"),
        ("img.lineidx", "0\n5\n5\n", "images"),
        ("img.lineidx", "7\n90\n900\n", "images"),
        ("img.lineidx", "0\n90\n99999999\n", "images"),
        ("label.lineidx", "0\n" + "9" * 30 + "\n", "labels"),
        ("map.json", "[1]", "label_map"),
        ("map.json", '{"label_to_idx": {"a": "x"}}', "label_map"),
        ("train.yaml", "- img.tsv", "images"),
        ("train.yaml", "img: [1]", "images"),
        ("train.yaml", "label: label.tsv", "images"),
        ("train.yaml", "img: img.tsv", "labels"),
        ("train.yaml", "img: img.tsv\nlabel: 3", "images"),
        ("train.yaml", "img: {", "images"),
        ("train.yaml", "!!python/object/apply:os.system ['true']", "images"),
        ("train.yaml", "img: none.tsv\nlabel: label.tsv", "images"),
        ("index.json", "[]", "image_index"),
    ],
)
def test_broken_files_around_the_tables(tmp_path: Path, file: str, content: str, field: str) -> None:
    glip_files(tmp_path)
    names = {"img": "img.tsv", "label": "label.tsv", "linelist": "train.linelist", "labelmap": "map.json"}
    if file == "index.json":
        names["imageid2idx"] = file
    (tmp_path / "train.yaml").write_text("".join(f"{key}: {name}\n" for key, name in names.items()))
    (tmp_path / "train.linelist").write_text("0\n")
    (tmp_path / "map.json").write_text("{}")
    (tmp_path / file).write_text(content)
    with pytest.raises(SettingError, match=field):
        made(GlipTsv(images=str(tmp_path / "train.yaml")), tmp_path / "out")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.5, "x"])
def test_boxes_with_unusable_scores_are_left_out(score: Any) -> None:
    """In all three formats, also where a format allows none: a sample could not be read afterwards."""
    good, span = [0, 0, 5, 5], [[0, 3]]
    regions = [{"bbox": [good, [1, 1, 4, 4]], "tokens_positive": span, "score": [score, 0.5]}]
    flat = {"caption": "cat", "tokens_positive": [[0, 3]] * 2, "bboxes": [good, [1, 1, 4, 4]], "scores": [score, 0.5]}
    lines = [
        record_of_line({"height": 9, "width": 9, "grounding": {"caption": "cat", "regions": regions}}, {}),
        record_of_label(json.dumps(flat), 9, 9),
    ]
    instances = [{"bbox": good, "category": "cat", "score": score}, {"bbox": [1, 1, 4, 4], "category": "cat"}]
    lines.append(record_of_line({"height": 9, "width": 9, "detection": {"instances": instances}}, {}))
    for number, line in enumerate(lines):
        objects = read_objects(Sample("0", {"boxes.json": line.row("x")["boxes"]}))
        assert line.left_out == 1 and objects.boxes.tolist() == [[1, 1, 4, 4]], number


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
