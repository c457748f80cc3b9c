"""The detection job as users type it: a table or JSON, and an image with what was found; wrong options said so."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation.drawing import COLOURS
from pipeline.models.detections import GroundedBoxes
from pipeline.models.method import build_method
from pipeline.models.vild import Vild
from tests.jobs.conftest import JOBS, Type


def test_smoke_prints_a_table_and_draws(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("detect", "smoke") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "score", "left", "top", "right", "bottom"] and len(lines) == 6
    assert {line.split()[0] for line in lines[1:]} <= {"star", "disc"}
    with Image.open(tmp_path / "detections.png") as image:
        assert image.size == (480, 480) and len(np.unique(np.asarray(image))) > 30


def test_json_is_what_the_detector_says(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    words = ("star", "disc")
    assert job("detect", "smoke", "--json", "--most", "3", "--output", "out/found.png") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = [one["score"] for one in printed]
    assert len(printed) == 3 and scores == sorted(scores, reverse=True)
    assert all(one["word"] in words and 0 <= min(one["box"]) and max(one["box"]) <= 128 for one in printed)
    assert (tmp_path / "out/found.png").stat().st_size > 1000


def test_a_checkpoint_looks_for_any_words(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    method = build_method(Vild.smallest()).eval()
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    asked = ["--checkpoint", "some/run", "--words", "red star", "yellow", "--least-score", "0", "--json"]
    monkeypatch.setattr("pipeline.evaluation.models.load_method", lambda address, device: method)
    assert job("detect", "image", str(tmp_path / "in.png"), *asked) == 0
    printed = json.loads(capsys.readouterr().out)
    (expected,) = method.predict([torch.from_numpy(image).permute(2, 0, 1)], ("red star", "yellow"))
    assert [one["score"] for one in printed] == pytest.approx(expected.scores[:20].tolist(), abs=1e-6)
    assert [one["word"] for one in printed] == [("red star", "yellow")[n] for n in expected.labels[:20].tolist()]


TEXT = "there are some holes on the road"


class TextGrounder(torch.nn.Module):
    """Finds every phrase in a box that depends on its place in the text; of the second phrase nothing at all."""

    def ground(
        self, images: Sequence[Tensor], captions: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[GroundedBoxes]:
        assert list(captions) == [TEXT] and tuple(images[0].shape) == (3, 480, 640)
        assert [TEXT[start:end] for start, end in spans[0]] == ["some holes", "road"]
        boxes = torch.tensor([[100.0, 120, 200, 240], [300, 300, 500, 470], [5, 5, 90, 90]])
        return [GroundedBoxes(boxes, torch.tensor([0.9, 0.6, 0.02]), torch.tensor([0, 0, 1]))]


def test_a_text_is_grounded_with_a_legend_of_its_phrases(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (640, 480), (128, 128, 128)).save(tmp_path / "in.png")
    monkeypatch.setattr("pipeline.evaluation.models.load_method", lambda address, device: TextGrounder())
    asked = ["image", str(tmp_path / "in.png"), "--checkpoint", "some/run", "--text", TEXT]
    assert job("detect", *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines[1:]] == ["some holes"] * 2  # the road's score is too low
    with Image.open(tmp_path / "detections.png") as file:
        pixels = np.asarray(file.convert("RGB"))
    assert pixels.shape[1] == 640 and pixels.shape[0] > 480

    def has(part: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> bool:
        return bool((part == colour).all(axis=2).any())

    assert has(pixels[118:122, 150:160], COLOURS[0]) and not has(pixels[:480], COLOURS[1])
    assert has(pixels[480:], COLOURS[0]) and has(pixels[480:], COLOURS[1])  # both phrases are in the legend

    assert job("detect", *asked, "--json", "--least-score", "0") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(one["word"], one["span"]) for one in printed] == [("some holes", [10, 20])] * 2 + [("road", [28, 32])]


def test_smoke_of_a_text(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("detect", "smoke-text") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "word" and {line.split("  ")[0] for line in lines[1:]} <= {"red star", "disc"}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_photo_of_a_phone_is_turned_as_it_is_displayed(tmp_path: Path, ending: str) -> None:
    """The eight orientations of EXIF 2.32, tag 274, as turns and mirrors of an array."""
    shown = np.zeros((48, 64, 3), np.uint8)
    shown[:16, :16], shown[32:, :32] = 255, 130
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: np.rot90(shown, 2),
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: np.rot90(shown, 2).transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }
    read_image = runpy.run_path(str(JOBS / "detect.py"))["read_image"]
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        place = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(np.ascontiguousarray(pixels)).save(place, exif=exif, quality=95)
        found = read_image(str(place))
        assert found.shape == shown.shape and np.abs(found.astype(int) - shown).mean() < 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "--words", "star", "Star"], "every word once"),
        (["smoke", "--most", "0"], "--most: got 0"),
        (["smoke", "--text", "a star"], "words or a text, one of the two"),
        (["image", "good.png", "--checkpoint", "x"], "words or a text, one of the two"),
        (["smoke-text", "--text", "of and the"], "a text with a noun phrase that rules finds"),
        (["smoke-text", "--extractor", "rulez"], "--extractor: got 'rulez'"),
        (["image", "good.png", "--checkpoint", "clipmill-tiny:untrained", "--text", "a star"], "grounds phrases"),
        (["smoke", "--least-score", "2"], "--least-score: got 2.0"),
        (["smoke", "--output", "found.jpg"], "ends in .png"),
        (
            ["image", "nowhere.png", "--checkpoint", "x", "--words", "a"],
            "image: no such file or folder: 'nowhere.png'",
        ),
        (["image", "broken.png", "--checkpoint", "x", "--words", "a"], "broken.png is not a readable image"),
        (["image", "good.png", "--checkpoint", "clipmill-tiny:untrained", "--words", "a"], "predict"),
        (["image", "good.png", "--checkpoint", "nowhere", "--words", "a"], "--checkpoint: got 'nowhere'"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    assert job("detect", *arguments) in (1, 2)
    out, error = capsys.readouterr()
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
    assert out == ""
