"""Questions as VQA v2, SNLI-VE and GQA publish them."""

import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SettingError
from pipeline.loaders.questions import read_questions
from pipeline.loaders.samples import Samples
from pipeline.shards.questions import QUESTIONS
from pipeline.shards.sample import Sample
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.questions import Questions, image_name
from pipeline.sources.source import Row
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

VQA_QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 17, "question": "Is it day?", "question_id": 17000},
        {"image_id": 18, "question": "Of a test set?", "question_id": 18000},
    ],
}
VQA_ANNOTATIONS = {
    "annotations": [
        {
            "question_id": number,
            "image_id": number // 1000,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1 + n} for n in range(9)]
            + [{"answer": "other", "answer_confidence": "maybe", "answer_id": 10}],
        }
        for number, kind, answer in (
            (458752000, "other", "net"),
            (458752001, "other", "pitcher"),
            (17000, "yes/no", "yes"),
        )
    ]
}
RELATIONS = [
    {"Flickr30K_ID": "4705552913", "sentence1": "a", "sentence2": "Two women hug.", "gold_label": "neutral"},
    {"Flickr30K_ID": "4705552913", "sentence1": "a", "sentence2": "Men fight.", "gold_label": "contradiction"},
    {"Flickr30K_ID": "99", "sentence1": "a", "sentence2": "No majority.", "gold_label": "-"},
    {"Flickr30K_ID": "36979", "sentence1": "a", "sentence2": "A group sits.", "gold_label": "entailment"},
]
GQA = {
    "02930152": {
        "imageId": "2354786",
        "question": "Is the sky dark?",
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
        "types": {"structural": "verify", "semantic": "attr"},
    },
    "07333408": {"imageId": "n161313", "question": "What is on the wall?", "answer": "pipe", "types": {}},
}


def jpeg(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), number % 255, np.uint8)).save(content, format="jpeg")
    return content.getvalue()


def write(folder: Path, layout: str, content: Any = None) -> Questions:
    """The files of a layout, with images of all questions but one."""
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images" / "deeper"
    images.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"images": str(folder / "images"), "layout": layout}
    if layout == "vqa":
        names = ["COCO_train2014_000000458752", "COCO_train2014_000000000017", "COCO_train2014_000000000099"]
        (folder / "q.json").write_text(json.dumps(VQA_QUESTIONS if content is None else content))
        (folder / "a.json").write_text(json.dumps(VQA_ANNOTATIONS))
        settings |= {"questions": str(folder / "q.json"), "annotations": str(folder / "a.json")}
    elif layout == "snli-ve":
        names = ["4705552913", "99"]
        lines = "\n".join(json.dumps(one) for one in content or RELATIONS)
        (folder / "q.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        settings |= {"questions": str(folder / "q.jsonl.gz")}
    else:
        names = ["2354786", "n161313"]
        (folder / "q.json").write_text(json.dumps(content or GQA))
        settings |= {"questions": str(folder / "q.json")}
    for number, name in enumerate(names):
        (images / f"{name}.jpg").write_bytes(jpeg(number))
        (images / f"{name}.json").write_text("{}")  # not an image, and no rival of one
    (folder / "images" / ".hidden.jpg").write_bytes(b"")
    return Questions(**settings)


def rows_of(source: Questions, folder: Path) -> list[Row]:
    pieces = list(source.slices(10, Folder(str(folder / "scratch"))))
    return [row for piece in pieces for row in source.rows(piece)]


def asked(row: Row) -> list[tuple[str, tuple[str, ...], str]]:
    found = read_questions(Sample("0", {QUESTIONS: row.members[QUESTIONS]}), QUESTIONS)
    return [(one.question, one.answers, one.kind) for one in found]


def test_vqa(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = rows_of(write(tmp_path, "vqa"), tmp_path)
    assert [row.url for row in rows] == [
        "deeper/COCO_train2014_000000458752.jpg",
        "deeper/COCO_train2014_000000000017.jpg",
    ]
    assert [one[0] for one in asked(rows[0])] == [
        "What is this photo taken looking through?",
        "What position is this man playing?",
    ]
    assert asked(rows[1]) == [("Is it day?", ("yes",) * 9 + ("other",), "yes_no")]
    assert rows[0].columns["questions"] == 2 and rows[0].body("image") == jpeg(0)
    assert "1 of 4 questions have no answer" in caplog.text


def test_snli_ve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (row,) = rows_of(write(tmp_path, "snli-ve"), tmp_path)
    assert asked(row) == [
        ("Two women hug.", ("neutral",), "neutral"),
        ("Men fight.", ("contradiction",), "contradiction"),
    ]
    assert "1 of 4 questions have no answer" in caplog.text and "1 of 2 images have no file" in caplog.text


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    source = write(tmp_path, "snli-ve")
    lines = [json.dumps(one) for one in RELATIONS]
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress("\n\n".join([*lines, " \n"]).encode(), mtime=0))
    (row,) = rows_of(source, tmp_path)
    assert len(asked(row)) == 2


def test_two_files_of_one_image_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "gqa")
    for folder in ("images", "images/deeper"):
        (tmp_path / folder / "unasked.png").write_bytes(jpeg(0))
    assert len(rows_of(source, tmp_path)) == 2
    (tmp_path / "images" / "2354786.png").write_bytes(jpeg(0))
    with pytest.raises(SettingError, match="images.*one file for each image, not .*2354786.*2354786"):
        rows_of(source, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"annotations": [{"answers": []}]}',
        b'{"annotations": [{"question_id": 17000, "answers": 3}]}',
        b'{"annotations": [{"question_id": 17000, "answers": [{"answer": ["yes"]}]}]}',
    ],
)
def test_a_bad_file_of_answers_is_named(content: bytes, tmp_path: Path) -> None:
    source = write(tmp_path, "vqa")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SettingError, match="^annotations: got .*a.json.*answers in the layout vqa"):
        rows_of(source, tmp_path)


def test_gqa(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, "gqa"), tmp_path)
    assert [asked(row) for row in rows] == [
        [("Is the sky dark?", ("yes",), "verify")],
        [("What is on the wall?", ("pipe",), "")],
    ]


def test_a_snapshot_of_them(tmp_path: Path) -> None:
    """Through the real stages; another answer gives other shards."""
    source = write(tmp_path, "gqa")
    options = {"kind": "questions", "questions": source.questions, "images": source.images, "layout": "gqa"}

    def refreshed(name: str = "out") -> Any:
        return refresh(open_source(options), Folder(str(tmp_path / name)), AS_IT_IS, Workers(processes_count=0))

    first = refreshed()
    assert QUESTIONS in first.fields and refreshed().digest == first.digest
    samples = Samples(first, open_shards=1)
    found = [read_questions(samples[number], QUESTIONS)[0].answers for number in range(len(samples))]
    assert found == [("yes",), ("pipe",)]
    write(tmp_path, "gqa", {**GQA, "07333408": {**GQA["07333408"], "answer": "tube"}})
    assert refreshed("other").shards[0].sha256 != first.shards[0].sha256


@pytest.mark.parametrize(
    ("path", "layout", "name"),
    [
        ("train2014/COCO_train2014_000000000017.jpg", "vqa", "17"),
        ("a/b.jpg", "vqa", "b"),
        ("2354786.jpg", "gqa", "2354786"),
        ("0012.jpg", "snli-ve", "0012"),
    ],
)
def test_names_of_images(path: str, layout: Any, name: str) -> None:
    assert image_name(path, layout) == name


@pytest.mark.parametrize(
    ("layout", "content", "field"),
    [
        ("vqa", {"questions": [{"image_id": 17, "question": "a?"}]}, "questions"),
        ("vqa", {"questions": [{"image_id": "x", "question": "a?", "question_id": 17000}]}, "questions"),
        ("vqa", {"questions": [{"image_id": float("inf"), "question": "a?", "question_id": 17000}]}, "questions"),
        ("vqa", [], "questions"),
        ("vqa", {"questions": [{"image_id": 18, "question": "a?", "question_id": 1}]}, "annotations"),
        ("gqa", {"1": {"imageId": "2354786", "question": ["a"], "answer": "b"}}, "questions"),
        ("gqa", {"1": {"imageId": "2354786", "question": "a?", "answer": " "}}, "questions"),
        ("gqa", {"1": {"imageId": "nowhere", "question": "a?", "answer": "b"}}, "images"),
        ("snli-ve", [{"sentence2": "a", "gold_label": "neutral"}], "questions"),
        ("snli-ve", ["text"], "questions"),
    ],
)
def test_other_files_are_refused(layout: str, content: Any, field: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=field):
        rows_of(write(tmp_path, layout, content), tmp_path)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "gqa")
    for changes, field in (
        ({"annotations": "a.json"}, "annotations"),
        ({"layout": "vg"}, "layout"),
        ({"images": ""}, "images"),
    ):
        settings: dict[str, Any] = {"questions": source.questions, "images": source.images, "layout": "gqa", **changes}
        with pytest.raises(SettingError, match=field):
            Questions(**settings)
    for changes, field in (
        ({"images": str(tmp_path / "no")}, "images"),
        ({"questions": "no.json"}, "questions"),
        ({"layout": "vqa"}, "annotations"),
    ):
        settings = {"questions": source.questions, "images": source.images, "layout": "gqa", **changes}
        with pytest.raises(SettingError, match=field):
            rows_of(Questions(**settings), tmp_path)


def test_an_image_that_vanishes_is_a_problem(tmp_path: Path) -> None:
    source = write(tmp_path, "gqa")
    (piece,) = source.slices(10, Folder(str(tmp_path / "scratch")))
    (tmp_path / "images" / "deeper" / "n161313.jpg").unlink()
    problems = [row.problem for row in source.rows(piece)]
    assert problems[0] is None and problems[1] is not None and not problems[1].message.endswith("jpg")
