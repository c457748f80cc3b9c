"""The segmentation job as users type it: a table and an overlay; wrong options said so."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

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
    (tmp_path / "some.json").write_text('{"red star": 1}')
    assert job("segment", "image", str(tmp_path / "in.png"), *asked, "--threshold", "some.json") == 0
    out = capsys.readouterr().out
    assert "no word" in out and "yellow" in out and "red star" not in out
    clip = ["--checkpoint", "clipmill-tiny:untrained", "--words", "red", "blue"]
    assert job("segment", "image", str(tmp_path / "in.png"), *clip) == 0
    assert (tmp_path / "segments.png").stat().st_size > 1000


class Grouping(Lseg):
    """A segmenter that groups the columns of an image by tens, and by fifties."""

    def groups(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """See ``Grouper``."""
        columns = [torch.arange(one.shape[2]).expand(one.shape[1:]) for one in images]
        return [tuple((one // width).to(torch.int16) for width in (10, 50)) for one in columns]


def test_groups_of_each_stage_are_drawn(job: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images beside each other instead of two; the groups' colours are those of the stages."""
    torch.manual_seed(0)
    method = Grouping(Lseg.smallest()).eval()
    Image.fromarray(np.full((30, 200, 3), 200, dtype=np.uint8)).save(tmp_path / "in.png")
    monkeypatch.setattr("pipeline.evaluation.models.load_method", lambda address, device: method)
    asked = ["image", str(tmp_path / "in.png"), "--checkpoint", "some/run", "--words", "red", "yellow"]
    sizes = []
    for more in ([], ["--groups"]):
        assert job("segment", *asked, "--output", "a.png", *more) == 0
        with Image.open(tmp_path / "a.png") as image:
            sizes.append(image.size)
    assert sizes[1][0] == 2 * sizes[0][0]
    with Image.open(tmp_path / "a.png") as image:
        right = np.asarray(image.convert("RGB"))[:, 3 * image.width // 4 :]
    colours, counts = np.unique(right[np.ptp(right, axis=2) > 40].reshape(-1, 3), axis=0, return_counts=True)
    assert (counts > 500).sum() == 4  # of the groups of fifty columns


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "--words", "star", "Star"], "every word once"),
        (["smoke", "--groups"], "a method that groups pixels; Lseg has no groups"),
        (["smoke", "--threshold", "2"], "--threshold: got 2"),
        (["smoke", "--threshold", "none.json"], "--threshold: no such file or folder: 'none.json'"),
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
