"""Figures of hostile captions; warnings are errors, so a glyph that the font lacks would fail here."""

import io
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation.figures import retrieval_examples, similarity_matrix
from pipeline.loaders.sample_figures import BOX, readable, sample_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = [
    "a red circle on a very long description " * 30,
    "dog \U0001f436 and \u6f22\u5b57, \u0645\u0631\u062d\u0628\u0627",
    "",
    "$x^2 _{ \\frac broken $ tex %",
    "a\nnew\tline \x07 \x00 and \ud800",
    "x" * 100_000,
]


def png(figure: "Figure") -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer))


def images(count: int, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def test_hostile_captions_can_be_drawn() -> None:
    count = len(CAPTIONS)
    scores = torch.rand(count, count)
    assert png(sample_grid(images(count), CAPTIONS, title="$ \U0001f436")).shape[0] > 400
    assert png(similarity_matrix(images(count), CAPTIONS, scores)).shape[0] > 300
    assert png(retrieval_examples(images(count), CAPTIONS, scores)).shape[0] > 600


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_any_number_of_samples_fits(count: int) -> None:
    captions = [f"number {number}" for number in range(count)]
    scores = torch.rand(count, count)
    for figure in (
        sample_grid(images(min(count, 7)), captions[:7]),
        similarity_matrix(images(count), captions, scores),
        retrieval_examples(images(count), captions, scores),
    ):
        image = png(figure)
        assert image.shape[1] < 2500 and image.shape[0] < 2500


def test_a_diverged_model_can_be_drawn() -> None:
    scores = torch.full((3, 3), float("nan"))
    png(similarity_matrix(images(3), ["a", "b", "c"], scores))
    png(retrieval_examples(images(3), ["a", "b", "c"], scores))


def test_text_stays_readable() -> None:
    assert readable("caf\u00e9 \u2013 \u041a\u043e\u0442") == "caf\u00e9 \u2013 \u041a\u043e\u0442"
    assert readable("a \U0001f436\n b") == f"a {BOX} b"
    assert readable("a\x07 \x00 b") == "a b"


def test_the_right_images_have_the_green_frame() -> None:
    captions = ["a", "b", "a", "c"]
    scores = torch.eye(4)
    figure = retrieval_examples(images(4), captions, scores, queries=1, top=3)
    frames = [axis for axis in figure.axes if axis.images and axis.get_xlabel()]
    widths = [axis.spines["left"].get_linewidth() for axis in frames]
    assert widths == [3, 1, 3]  # itself, then 1 and 2 by place: 2 has the same caption


def test_figures_can_be_drawn_in_any_thread() -> None:
    made: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: made.append(png(sample_grid(images(2), ["a", "b"]))))
    thread.start()
    thread.join(30)
    assert len(made) == 1
