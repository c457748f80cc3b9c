"""The segmentation job as users type it: a table and an overlay; wrong options said so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.models.lseg import Lseg
from pipeline.models.method import build_method
from tests.jobs.conftest import Type


def test_smoke_prints_parts_and_draws(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("segment", "smoke") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "pixels", "probability"]
    assert {line.split()[0] for line in lines[1:]} <= {"star", "disc", "background"}
    assert sum(float(line.split()[1]) for line in lines[1:]) == pytest.approx(100, abs=0.3)
    with Image.open(tmp_path / "segments.png") as image:
        assert min(image.size) > 200 and len(np.unique(np.asarray(image.convert("L")))) > 30


def test_a_checkpoint_segments_by_any_words(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the threshold pixels have no word; a plain CLIP works, too."""
    torch.manual_seed(0)
    method = build_method(Lseg.smallest()).eval()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 200, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    monkeypatch.setattr("pipeline.evaluation.models.load_method", lambda address, device: method)
    asked = ["--checkpoint", "some/run", "--words", "red star", "yellow", "--output", "out/a.png"]
    assert job("segment", "image", str(tmp_path / "in.png"), *asked, "--scales", "1", "0.5", "--flip") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sum(float(line.split()[-2]) for line in lines) == pytest.approx(100, abs=0.2)
    assert (tmp_path / "out/a.png").stat().st_size > 1000
    assert job("segment", "image", str(tmp_path / "in.png"), *asked, "--threshold", "1") == 0
    assert capsys.readouterr().out.split()[-4:] == ["no", "word", "100.0", "-"]
    clip = ["--checkpoint", "clipmill-tiny:untrained", "--words", "red", "blue"]
    assert job("segment", "image", str(tmp_path / "in.png"), *clip) == 0
    assert (tmp_path / "segments.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "--words", "star", "Star"], "every word once"),
        (["smoke", "--threshold", "2"], "--threshold: got 2"),
        (["smoke", "--scales", "0"], "scales"),
        (["smoke", "--output", "found.jpg"], "ends in .png"),
        (["image", "nowhere.png", "--checkpoint", "x", "--words", "a"], "no such file or folder: 'nowhere.png'"),
        (["image", "broken.png", "--checkpoint", "x", "--words", "a"], "broken.png is not a readable image"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    assert job("segment", *arguments) in (1, 2)
    out, error = capsys.readouterr()
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
    assert out == ""
