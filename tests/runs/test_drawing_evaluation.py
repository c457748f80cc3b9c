"""Evaluation of drawn images by a toy judge that sees the mean colour: hand-made images, counted by hand."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import nn

from pipeline.errors import DataError, SettingError
from pipeline.generation.guides import Guide
from pipeline.models.towers.weights import digest_of
from pipeline.runs.drawing_evaluation import (
    JudgedImage,
    JudgingTexts,
    evaluate_drawings,
    evaluation_table,
    judged_parquet,
    read_labels,
    summaries,
)
from pipeline.runs.drawing_report import SCORES, scores_parquet
from pipeline.runs.drawings import DrawingResult, DrawingUnit
from pipeline.shards.storage import Folder
from tests.generation.toy_clip import ColourClip

CLIPDRAW = "clipdraw:clips=[toy],strokes=5"
SKETCHES = [f"clipasso:clip=toy,saliency=toy,strokes={count}" for count in (32, 4)]
Drawn = tuple[DrawingUnit, tuple[int, int, int], float, int]
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "purple": (200, 10, 220)}


@pytest.fixture
def judge() -> Guide:
    return Guide(ColourClip(8), "judge")


def image(method: str, subject: str, colour: str, seed: int = 1, loss: float = 0.0, side: int = 12) -> Drawn:
    """An image of one colour, which is not always that of its subject."""
    return DrawingUnit(method=method, subject=subject, seed=seed), COLOURS[colour], loss, side


def folder_of(tmp_path: Path, *images: Drawn, guides: Mapping[str, str] | None = None) -> Folder:
    results = []
    (tmp_path / "images").mkdir()
    for unit, colour, loss, side in images:
        Image.new("RGB", (side, side), colour).save(tmp_path / "images" / f"{unit.name}.png")
        numbers: dict[str, Any] = {"steps": 1, "loss": loss, "judge": 0.0, "retries": 0, "seconds": 1.0}
        numbers |= {"files": (f"{unit.name}.png",), "guides": guides or {}}
        results.append(DrawingResult(unit=unit, settings="", history=(), **numbers))
    (tmp_path / SCORES).write_bytes(scores_parquet(results))
    return Folder(str(tmp_path))


def prompts(tmp_path: Path) -> Folder:
    """Two of four show their prompt; images differ in size."""
    return folder_of(
        tmp_path,
        image(CLIPDRAW, "red", "red", loss=2.0),
        image(CLIPDRAW, "red", "blue", seed=2, loss=1.0),
        image(CLIPDRAW, "blue|green:-1", "blue", side=20),
        image(CLIPDRAW, "green", "purple"),
    )


def test_r_precision_and_score_by_hand(tmp_path: Path, judge: Guide) -> None:
    judged = evaluate_drawings(prompts(tmp_path), judge, JudgingTexts())
    assert [one.texts_before for one in judged] == [0, 2, 0, 2]  # red is as far from blue as green is
    assert [round(one.score or 0, 2) for one in judged] == [1, 0.04, 1, 0.03]
    assert [one.strokes for one in judged] == [5] * 4 and all(one.label is None for one in judged)
    assert summaries(judged)[CLIPDRAW]["r_precision"] == 0.5
    assert "| 5 | 4 | 0.518 | 0.500 |" in (table := evaluation_table(judged, JudgingTexts()))
    assert "among 3 texts, by chance 0.333" in table and "Recognition" not in table


def test_distractors_are_rivals_and_doubles_of_prompts_are_not(tmp_path: Path, judge: Guide) -> None:
    folder = folder_of(tmp_path, image(CLIPDRAW, "red", "purple"), image(CLIPDRAW, "green", "green"))
    alone = evaluate_drawings(folder, judge, JudgingTexts())
    assert [one.texts_before for one in alone] == [0, 0]
    texts = JudgingTexts(distractors=("blue", "red", "blue"))
    assert [one.texts_before for one in evaluate_drawings(folder, judge, texts)] == [1, 0]
    assert "among 3 texts" in evaluation_table(evaluate_drawings(folder, judge, texts), texts)


def test_prompts_with_the_same_vector_are_no_rivals(tmp_path: Path, judge: Guide) -> None:
    """Equal positive prompts up to a common factor, in any order; images that show them are all first."""
    subjects = ("red", "red|blue:-0.3", "red:3", "red:0.5|red:0.1|green:-1")
    mixed = ("red:2|blue:2", "blue:0.7|red:0.7")
    drawn = [image(CLIPDRAW, subject, "red") for subject in subjects]
    drawn += [image(CLIPDRAW, subject, "purple") for subject in mixed]
    texts = JudgingTexts(distractors=("green", "red", "red:3"))
    judged = evaluate_drawings(folder_of(tmp_path, *drawn), judge, texts)
    assert [one.texts_before for one in judged] == [0] * 6
    assert {one.texts for one in judged} == {3}
    assert "among 3 texts, by chance 0.333" in evaluation_table(judged, texts)


def test_failed_images_are_left_out(tmp_path: Path, judge: Guide, caplog: pytest.LogCaptureFixture) -> None:
    folder = prompts(tmp_path)
    table = pq.read_table(tmp_path / SCORES)
    for failed, found in ((1, 3), (4, 0)):
        status = ["failed"] * failed + ["finished"] * (4 - failed)
        pq.write_table(table.set_column(table.schema.get_field_index("status"), "status", [status]), tmp_path / SCORES)
        if found:
            assert len(evaluate_drawings(folder, judge, JudgingTexts())) == found
            assert "1 of 4 images" in caplog.text
        else:
            with pytest.raises(DataError, match="failed images only"):
                evaluate_drawings(folder, judge, JudgingTexts())


def test_recognition_by_the_number_of_strokes(tmp_path: Path, judge: Guide) -> None:
    """Of four strokes one of three is recognised, of 32 two of three; the fourth image has no class."""
    many, few = SKETCHES
    folder = folder_of(
        tmp_path,
        *(image(many, f"photos/{name}.png", colour) for name, colour in (("red", "red"), ("a-blue", "blue"))),
        image(many, "photos/green_2.png", "red"),
        *(image(few, f"photos/{name}.png", "red") for name in ("red", "a-blue", "green_2", "0001")),
    )
    texts = JudgingTexts(classes=("red", "green", "blue"), templates=("{}",))
    judged = evaluate_drawings(folder, judge, texts)
    assert [one.label for one in judged] == ["red", "blue", "green", "red", "blue", "green", None]
    assert [one.predicted for one in judged] == ["red", "blue", "red", "red", "red", "red", None]
    assert all(one.score is None and one.texts_before is None for one in judged)
    found = summaries(judged)
    assert list(found) == [few, many] and [one["top1"] for one in found.values()] == [1 / 3, 2 / 3]
    assert found[few]["images"] == 4 and found[few]["labelled"] == 3 and found[few]["top5"] == 1
    table = evaluation_table(judged, texts)
    assert "| 4 | 4 | - | - | 0.333 |" in table and "by chance 0.333; 1 unlabelled" in table
    rows = pq.read_table(io.BytesIO(judged_parquet(judged))).to_pylist()
    assert [JudgedImage(**row) for row in rows] == judged


def test_labels_from_a_file_and_the_best_seed_only(tmp_path: Path, judge: Guide) -> None:
    (tmp_path / "labels.csv").write_text('subject,class\n"blue|green:-1",green\nred,blue\n')
    labels = read_labels(str(tmp_path / "labels.csv"))
    texts = JudgingTexts(classes=("red", "green", "blue"), templates=("{}",), labels=labels)
    judged = evaluate_drawings(prompts(tmp_path), judge, texts, best_only=True)
    assert [(one.subject, one.seed, one.label, one.classes_before) for one in judged] == [
        ("red", 2, "blue", 0),
        ("blue|green:-1", 1, "green", 2),
        ("green", 1, None, None),
    ]


@pytest.mark.parametrize("address", ["toy/", "a/copy/of/toy"])
def test_a_judge_with_the_weights_of_a_guide_is_refused_under_any_address(address: str, tmp_path: Path) -> None:
    """Of a job, and of an older one that stored no digests, where addresses count."""
    guides = {"toy": digest_of(ColourClip(16)), "more": digest_of(nn.Linear(2, 2))}
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, known in ((new, guides), (old, {})):
        folder.mkdir()
        folder_of(folder, image(CLIPDRAW, "red", "red"), guides=known)
    with pytest.raises(SettingError, match="judge: got .*, expected another CLIP .*: one has the same weights"):
        evaluate_drawings(Folder(str(new)), Guide(ColourClip(8), address), JudgingTexts())
    other = ColourClip(8)
    other.weight.data *= 2
    for folder, judge in ((new, Guide(other, address)), (old, Guide(ColourClip(8), address))):
        assert len(evaluate_drawings(Folder(str(folder)), judge, JudgingTexts())) == 1


def test_what_cannot_be_judged_is_an_error(tmp_path: Path, judge: Guide) -> None:
    folder = prompts(tmp_path)
    with pytest.raises(SettingError, match="judge: got 'toy', expected another CLIP than those of clipdraw"):
        evaluate_drawings(folder, Guide(ColourClip(8), "toy"), JudgingTexts())
    with pytest.raises(SettingError, match="at most 5 tokens for judge"):
        evaluate_drawings(folder, judge, JudgingTexts(distractors=("red " * 9,)))
    with pytest.raises(SettingError, match="labels: got 'red: cat', expected one of 1 classes"):
        JudgingTexts(classes=("dog",), labels={"red": "cat"})
    (tmp_path / "labels.csv").write_text("name\nx\n")
    with pytest.raises(SettingError, match="columns subject and class"):
        read_labels(str(tmp_path / "labels.csv"))
    next((tmp_path / "images").iterdir()).write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        evaluate_drawings(folder, judge, JudgingTexts())
    (tmp_path / SCORES).write_bytes(b"no table")
    with pytest.raises(DataError, match=r"scores.parquet cannot be read"):
        evaluate_drawings(folder, judge, JudgingTexts())
    with pytest.raises(SettingError, match=r"drawings: .*the output folder of a finished jobs/draw_prompts.py"):
        evaluate_drawings(Folder(str(tmp_path / "none")), judge, JudgingTexts())
