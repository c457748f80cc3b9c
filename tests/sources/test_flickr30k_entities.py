"""Flickr30k Entities' files, valid and broken, up to R@k by the types of its phrases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.suite import Evaluations, evaluate
from pipeline.loaders.samples import Samples
from pipeline.models.detections import GroundedBoxes
from pipeline.shards.objects import Objects, read_objects
from pipeline.shards.snapshot import read_snapshot
from pipeline.sources.flickr30k_entities import Flickr30kEntities, record_of_sentence
from tests.grounded import jpeg
from tests.jobs.conftest import Type, job  # noqa: F401  (the fixture that runs jobs)

FIRST = (
    "[/EN#1/people Two men] in [/EN#2/clothing caf\u00e9 hats] see [/EN#3/animals/other a dog] "
    "and [/EN#1/people they] wave ."
)
SECOND = "[/EN#4/scene outside] with [/EN#3/animals the dog]"
XML = """<annotation>
  <filename>36979.jpg</filename>
  <size><width>60</width><height>40</height><depth>3</depth></size>
  <object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>
  <object><name>1</name><name>2</name><bndbox><xmin>21</xmin><ymin>5</ymin><xmax>30</xmax><ymax>14</ymax></bndbox></object>
  <object><name>3</name><bndbox><xmin>41</xmin><ymin>21</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object>
  <object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""
MEN, HAT, DOG = [0, 0, 20, 40], [20, 4, 30, 14], [40, 20, 60, 40]


def published(folder: Path, sentences: str = f"{FIRST}\n{SECOND}\n", xml: str = XML, name: str = "36979") -> None:
    for part, ending, content in (("Sentences", "txt", sentences), ("Annotations", "xml", xml)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{name}.{ending}").write_text(content, encoding="utf-8")
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / f"{name}.jpg").write_bytes(jpeg(40, 60))


def refreshed(job: Type, *words: str) -> list[Objects]:  # noqa: F811
    common = ("flickr30k-entities", "--annotations", ".", "--images", "images", "--output-folder", "out")
    assert job("refresh_dataset", *common, "--processes-count", "0", *words) == 0
    samples = Samples(read_snapshot("out"))
    return [read_objects(samples[number]) for number in range(len(samples))]


def test_sentences_become_samples_with_kinds(job: Type, tmp_path: Path) -> None:  # noqa: F811
    """Marks are taken out; an entity's boxes belong to all of its mentions, a phrase without boxes is left out."""
    published(tmp_path)
    first, second = refreshed(job)
    assert (
        first.caption == "Two men in caf\u00e9 hats see a dog and they wave ."
        and second.caption == "outside with the dog"
    )
    found = [
        (first.caption[one.start : one.end], one.kinds, first.boxes[list(one.objects)].tolist())
        for one in first.phrases
    ]
    assert found == [
        ("Two men", ("people",), [MEN, HAT]),
        ("caf\u00e9 hats", ("clothing",), [HAT]),
        ("a dog", ("animals", "other"), [DOG]),
        ("they", ("people",), [MEN, HAT]),
    ]
    assert first.phrases[0].objects == first.phrases[3].objects and first.open_labels
    assert [(second.caption[one.start : one.end], one.kinds) for one in second.phrases] == [("the dog", ("animals",))]


class DogGrounder:
    """Finds the dog's box for every phrase."""

    def ground(self, images: Any, captions: Any, spans: Any) -> list[GroundedBoxes]:
        def boxes(count: int) -> Tensor:
            return torch.tensor([DOG], dtype=torch.float32).expand(count, 4)

        return [GroundedBoxes(boxes(len(some)), torch.ones(len(some)), torch.arange(len(some))) for some in spans]


def test_recall_by_type(job: Type, tmp_path: Path) -> None:  # noqa: F811
    """A phrase of two types counts for both; the mean is over phrases."""
    published(tmp_path)
    refreshed(job)
    found = evaluate(DogGrounder(), Evaluations(phrase_grounding=("flickr=out",)).prepare())
    expected = {"r1": 2 / 5, "r1/people": 0.0, "r1/clothing": 0.0, "r1/animals": 1.0, "r1/other": 1.0, "phrases": 5}
    assert {name: found[f"grounding/flickr/{name}"] for name in expected} == pytest.approx(expected)


def test_a_split_names_the_images(job: Type, tmp_path: Path) -> None:  # noqa: F811
    for name in ("1", "2", "3"):
        published(tmp_path, sentences=f"[/EN#3/animals dog {name}]", name=name)
    (tmp_path / "test.txt").write_text("3\n1\n\n")
    assert [one.caption for one in refreshed(job, "--split", "test.txt")] == ["dog 3", "dog 1"]
    for content in ("", "../1\n", "1 2\n"):
        (tmp_path / "test.txt").write_text(content)
        source = Flickr30kEntities(annotations=str(tmp_path), images="images", split=str(tmp_path / "test.txt"))
        with pytest.raises(SettingError, match="split"):
            list(source.records())
    for wrong in ({"annotations": "nowhere"}, {"annotations": "images"}, {"split": "none.txt"}):
        with pytest.raises(SettingError, match="annotations|split"):
            list(Flickr30kEntities(**{"annotations": ".", "images": "images", **wrong}).records())


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    "changes",
    [
        {"xml": "<annotation>"},
        {"xml": BOMB},
        {"xml": XML.replace("<width>60</width>", "")},
        {"xml": XML.replace("<width>60</width>", "<width>0</width>")},
        {"xml": XML.replace("<xmin>1</xmin>", "<xmin>left</xmin>")},
        {"sentences": "[/EN#1/people two men"},
        {"sentences": "[/EN#1 two men]"},
    ],
    ids=["cut", "entities", "no size", "no area", "no number", "open mark", "no type"],
)
def test_broken_files_are_rows_with_a_reason(job: Type, tmp_path: Path, changes: dict[str, str]) -> None:  # noqa: F811
    published(tmp_path, name="1")
    published(tmp_path, name="2", **changes)
    (tmp_path / "Sentences" / "3.txt").write_text("[/EN#1/people a man]")
    (tmp_path / "images" / "3.jpg").write_bytes(jpeg(40, 60))
    assert len(refreshed(job)) == 2
    snapshot = read_snapshot("out")
    assert snapshot.rows == 4 and snapshot.dropped == {"bad_annotation": 2}


def test_boxes_outside_of_the_image_are_left_out() -> None:
    record = record_of_sentence("[/EN#9/other it]", (40, 60), {"9": [[-50, 0, 0, 9], [50, 30, 99, 99], [9, 9, 5, 5]]})
    assert [one["bbox"] for one in record.content["objects"]] == [[50, 30, 10, 10]] and record.left_out == 2
