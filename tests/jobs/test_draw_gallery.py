"""The gallery job, as typed; and that its pages show what they should."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.sources.drawn import gallery, sets, world
from tests.jobs.conftest import JOBS


def draw(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOBS / "draw_gallery.py"), *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_page_is_written(tmp_path: Path) -> None:
    done = draw("attributes", "--output", str(tmp_path / "page.png"))
    assert done.returncode == 0, done.stderr
    page = cv2.imread(str(tmp_path / "page.png"), cv2.IMREAD_COLOR_RGB)
    assert page is not None
    np.testing.assert_array_equal(page, gallery.attributes_page())


def test_smoke() -> None:
    assert draw("smoke").returncode == 0


@pytest.mark.parametrize("arguments", [["scenes", "--output", "page.gif"], ["pages"], ["sets", "--seed", "-1"]])
def test_bad_settings_are_one_sentence(arguments: list[str]) -> None:
    done = draw(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "expected" in done.stderr


def test_pages_have_a_row_for_everything() -> None:
    names = sum(len(noun.variants) or 1 for noun in world.SHAPES)
    assert gallery.shapes_page(size=64).shape[:2] == (24 + 64 * ((names + 1) // 2), 2 * (170 + 5 * 64))
    rows = len(sets.RECIPES) + len(sets.IMAGE_SETS)
    assert gallery.sets_page(columns=2, size=64).shape == (rows * 80, 130 + 2 * 64, 3)
    assert gallery.motions_page(columns=3, size=64).shape == (12 * (64 + 20), 170 + 3 * 64, 3)
    assert gallery.scenes_page(count=3, size=128).shape == (2 * (128 + 120), 2 * 320, 3)
