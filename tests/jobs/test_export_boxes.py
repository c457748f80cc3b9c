"""Exports, read back by the sources of the same formats."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.loaders.samples import Samples
from pipeline.shards.objects import Objects, read_objects
from pipeline.shards.sample import Sample
from pipeline.shards.snapshot import Snapshot, read_snapshot
from tests.grounded import grounded, jpeg, obj, publish, row
from tests.jobs.conftest import Type

SMALL = ("--processes-count", "0")


def objects_of(snapshot: Snapshot) -> list[Objects]:
    samples = Samples(snapshot)
    return [read_objects(samples[number]) for number in range(len(samples))]


def phrases(objects: Objects) -> list[tuple[str, list[list[float]]]]:
    """Texts of the phrases with their boxes, those with boxes."""
    found = [(objects.caption[one.start : one.end], objects.boxes[list(one.objects)]) for one in objects.phrases]
    return [(text, boxes.round(3).tolist()) for text, boxes in found if len(boxes)]


@pytest.mark.parametrize("kind", ["odvg", "mdetr"])
def test_captions_come_back(job: Type, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("export_boxes", "smoke", "--data", "drawn", "--output-folder", "out", "--format", kind) == 0
    assert "16 samples in 2 files" in capsys.readouterr().out
    ending = {"odvg": "jsonl", "mdetr": "json"}[kind]
    names = [f"out/0000{number}.{ending}" for number in (0, 1)]
    if kind == "mdetr":
        contents = [json.loads(Path(name).read_text()) for name in names]
        ids = [one["id"] for content in contents for one in content["annotations"]]
        assert len(set(ids)) == len(ids) and [one["id"] for one in contents[1]["images"]] == list(range(8, 16))
    known = objects_of(read_snapshot("drawn"))
    for number, name in enumerate(names):
        folder = f"back{number}"
        words = (kind, "--annotations", name, "--images", "out", "--output-folder", folder, *SMALL)
        assert job("refresh_dataset", *words) == 0
        for before, after in zip(known[8 * number :], objects_of(read_snapshot(folder)), strict=False):
            assert after.caption == before.caption and after.open_labels
            assert (after.height, after.width) == (before.height, before.width)
            assert sorted(phrases(after)) == sorted(phrases(before))


def test_boxes_of_classes_come_back(job: Type, tmp_path: Path) -> None:
    objects = [obj("Dog"), obj("hot_dog; frankfurter", (0, 0, 9, 9)), obj("dog", iscrowd=1)]
    publish(
        tmp_path / "data", [grounded(objects, "0"), grounded([], "1")], classes={"dog": "", "hot_dog; frankfurter": ""}
    )
    assert job("export_boxes", "snapshot", "--data", "data", "--output-folder", "out", *SMALL) == 0
    assert json.loads(Path("out/label_map.json").read_text()) == {"0": "dog", "1": "hot_dog"}
    words = ("odvg", "--annotations", "out/00000.jsonl", "--images", "out", "--label-map", "out/label_map.json")
    assert job("refresh_dataset", *words, "--output-folder", "back", *SMALL) == 0
    first, second = objects_of(read_snapshot("back"))
    assert first.labels == ("dog", "hot_dog") and first.boxes.tolist() == [[8, 8, 24, 24], [0, 0, 9, 9]]
    assert len(second) == 0


def test_pseudo_boxes_with_a_threshold(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [grounded([], str(number), caption="a red dog") for number in range(2)]
    for one in samples:
        del one.fields["boxes.json"]
    boxes: list[Any] = [(0, 0, 9, 9), (5, 5, 20, 20)]
    rows = [
        row("0", "a red dog", [(2, 9)], boxes, scores=[0.9, 0.3]),
        row("1", "a red dog", [(2, 9)], height=0, width=0),
    ]
    publish(tmp_path / "data", samples, rows=rows)
    common = ("export_boxes", "snapshot", "--data", "data", "--output-folder", "out", *SMALL)
    assert job(*common, "--pseudo-boxes", "boxes") == 0
    (line,) = Path("out/00000.jsonl").read_text().splitlines()
    (region,) = json.loads(line)["grounding"]["regions"]
    assert region["bbox"] == [[0, 0, 9, 9]] and region["score"] == pytest.approx([0.9])
    assert region["phrase"] == "red dog" and Path("out/images/00000/0.jpg").is_file()
    capsys.readouterr()
    assert job(*common) == 1 and "has no boxes.json" in capsys.readouterr().err
    assert job(*common, "--format", "mdetr", "--content", "boxes") == 2
    assert job(*common, "--pseudo-boxes", "other") == 1 and "other.parquet is missing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["odvg", "mdetr"])
def test_every_caption_of_an_image_is_a_record(job: Type, tmp_path: Path, kind: str) -> None:
    """Two shards; records of one image have numbers and captions of their own, and come back as samples."""
    samples = [Sample(f"{number}", {"jpg": jpeg()}) for number in range(2)]
    rows = []
    for one in samples:
        stored = row(one.key, "", [(0, 1)] * 2, [(0, 0, 9, 9), (5, 5, 20, 20)], captions=["a dog", "nothing", "cats"])
        stored["phrases"] = [{"caption": of, "start": 0, "end": 4, "cut": False} for of in (0, 2)]
        rows.append(stored)
    publish(tmp_path / "data", samples, rows=rows, shard_size=1)
    common = ("export_boxes", "snapshot", "--data", "data", "--output-folder", "out", *SMALL)
    assert job(*common, "--pseudo-boxes", "boxes", "--format", kind) == 0
    ending = {"odvg": "jsonl", "mdetr": "json"}[kind]
    if kind == "mdetr":
        contents = [json.loads(Path(f"out/0000{number}.json").read_text()) for number in range(2)]
        for key in ("images", "annotations"):
            ids = [one["id"] for content in contents for one in content[key]]
            assert len(set(ids)) == len(ids) == {"images": 6, "annotations": 4}[key]
        assert [one["original_img_id"] for one in contents[1]["images"]] == [1] * 3
    words = (kind, "--annotations", f"out/00001.{ending}", "--images", "out", "--output-folder", "back", *SMALL)
    assert job("refresh_dataset", *words) == 0
    found = objects_of(read_snapshot("back"))
    assert [(one.caption, phrases(one)) for one in found] == [
        ("a dog", [("a do", [[0, 0, 9, 9]])]),
        ("nothing", []),
        ("cats", [("cats", [[5, 5, 20, 20]])]),
    ]


def test_objects_of_unknown_classes(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "data", [grounded([obj("dog")], "0")], classes={"cat": ""})
    assert job("export_boxes", "snapshot", "--data", "data", "--output-folder", "out", *SMALL) == 1
    assert "has an object 'dog', but it is none of 1 classes" in capsys.readouterr().err
