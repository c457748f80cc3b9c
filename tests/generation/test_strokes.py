"""Strokes against a supersampled reference (resvg), a dense computation, finite differences and closed forms."""

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import resvg_py
import torch
from PIL import Image
from torch import Tensor

import pipeline.generation.strokes as strokes_module
from pipeline.errors import SettingError
from pipeline.generation.curves import Strokes, rows
from pipeline.generation.strokes import render
from pipeline.generation.svg import write_svg
from tests.benchmarks.strokes import dense


def scene(
    seed: int, strokes: int, side: int, *, images: int = 1, segments: int = 3, widths: float = 8.0, fills: bool = True
) -> Strokes:
    """Random paths of 1 to ``segments`` curves, half of them filled, float64."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(images, strokes, *shape, dtype=torch.float64, generator=random)

    start = draw(1, 2)
    points = torch.cat([start, start + ((draw(3 * segments, 2) - 0.5) * 0.5).cumsum(2)], dim=2) * side
    return Strokes(
        points=points,
        widths=0.3 + widths * draw(),
        colours=draw(4),
        segments=torch.randint(1, segments + 1, (images, strokes), generator=random),
        filled=draw() < 0.5 if fills else None,
    )


def supersampled(svg: str, side: int, factor: int = 8) -> Tensor:
    """resvg's image at ``factor`` times the size, averaged: float64 [3, side, side]."""
    size = side * factor
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.float64) / 255
    return torch.from_numpy(pixels.reshape(side, factor, side, factor, 3).mean((1, 3))).permute(2, 0, 1)


def decibels(one: Tensor, other: Tensor) -> float:
    """Peak signal to noise ratio of images from 0 to 1."""
    return -10 * math.log10(float((one.clamp(0, 1) - other).square().mean()))


def noise(even_odd: bool, seed: int, side: int = 96) -> float:
    """Peak signal to noise ratio of a random scene against the reference: 1 to 60 lines and filled shapes."""
    strokes = replace(scene(seed, 1 + 37 * seed % 60, side), even_odd=even_odd)
    return decibels(render(strokes, side, side)[0], supersampled(write_svg(strokes, side, side)[0], side))


@pytest.mark.parametrize("even_odd", [False, True])
def test_random_scenes_look_as_resvg_draws_their_svg(even_odd: bool) -> None:
    assert min(noise(even_odd, seed) for seed in range(5)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("even_odd", [False, True])
def test_a_hundred_scenes_look_as_resvg_draws_their_svg(even_odd: bool) -> None:
    """50 for each rule, thin lines among them."""
    assert min(noise(even_odd, seed) for seed in range(50)) > 40


def test_gradients_are_those_of_finite_differences() -> None:
    """Of points, widths, colours and background: two images of a line and a filled shape each."""
    side, strokes = 7, scene(3, 2, 7, images=2, widths=3.0, segments=1)
    strokes = replace(strokes, filled=torch.tensor([[False, True], [True, False]]))
    ground = torch.rand(3, side, side, dtype=torch.float64)

    def painted(points: Tensor, widths: Tensor, colours: Tensor, below: Tensor) -> Tensor:
        return render(replace(strokes, points=points, widths=widths, colours=colours), side, side, below)

    leaves = [one.clone().requires_grad_() for one in (strokes.points, strokes.widths, strokes.colours, ground)]
    assert torch.autograd.gradcheck(painted, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_images_and_gradients_are_those_of_all_pixels_and_all_strokes() -> None:
    strokes, side = scene(5, 12, 24, images=2, fills=False, segments=2), 24
    weights = torch.rand(2, 3, side, side, dtype=torch.float64)
    images, gradients = [], []
    for painter in (render, lambda *scene_and_size: dense(*scene_and_size).permute(0, 3, 1, 2)):
        leaves = [one.clone().requires_grad_() for one in (strokes.points, strokes.widths, strokes.colours)]
        image = painter(replace(strokes, points=leaves[0], widths=leaves[1], colours=leaves[2]), side, side)
        images.append(image)
        gradients.append(torch.autograd.grad((image * weights).sum(), leaves))
    assert torch.allclose(*images, atol=1e-9)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_a_batch_is_its_images_one_by_one_in_parts_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    strokes = scene(7, 30, 50, images=3)
    together = render(strokes, 50, 40)
    for image in range(3):
        fields = ("points", "widths", "colours", "segments", "filled")
        alone = Strokes(**{name: getattr(strokes, name)[image, None] for name in fields})
        assert torch.allclose(render(alone, 50, 40)[0], together[image], atol=1e-12)
    monkeypatch.setattr("pipeline.generation.strokes.AT_ONCE", 500)
    assert torch.equal(render(strokes, 50, 40), together)


def test_a_path_of_many_curves_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same pixels and gradients, and never many more pairs than are allowed."""
    most: list[int] = []
    squared = strokes_module._ChordBoxes._squared

    def recorded(self: Any, some: slice, pair: Tensor, *more: Tensor) -> Tensor:
        most.append(len(pair))
        return squared(self, some, pair, *more)

    monkeypatch.setattr(strokes_module._ChordBoxes, "_squared", recorded)
    turns = torch.linspace(0, 40, 601, dtype=torch.float64)
    spiral = 40 + torch.stack([turns.cos(), turns.sin()], dim=1) * turns[:, None]
    results = []
    for at_once in (1 << 18, 3000):
        monkeypatch.setattr(strokes_module, "AT_ONCE", at_once)
        points = spiral.clone().requires_grad_()
        image = render(black(points, width=6), 80, 80)
        results.append([image.detach(), *torch.autograd.grad(image[0, :, :40].sum(), points)])
    assert most[0] > 30_000 and len(most) > 10 and max(most[1:]) < 6000
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def accumulated(node: Any) -> set[str]:
    """The kinds of operations whose gradients lead to the one of ``node``."""
    kinds, ahead, seen = set(), [node], set()
    while ahead:
        one = ahead.pop()
        if one is not None and one not in seen:
            seen.add(one)
            kinds.add(one.name())
            ahead += [before for before, _ in one.next_functions]
    return kinds


def test_gradients_have_the_same_bits_on_two_threads() -> None:
    """``table[index]`` is an IndexBackward0, whose atomic additions are in the order in which threads arrive."""
    strokes = scene(9, 256, 224, widths=2.0)
    strokes = replace(strokes, **{name: getattr(strokes, name).float() for name in ("points", "widths", "colours")})
    weights, results, threads = torch.rand(1, 3, 224, 224), [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            leaves = [one.clone().requires_grad_() for one in (strokes.points, strokes.widths, strokes.colours)]
            image = render(replace(strokes, points=leaves[0], widths=leaves[1], colours=leaves[2]), 224, 224)
            kinds = accumulated(image.grad_fn)
            results.append([image.detach(), *torch.autograd.grad((image * weights).sum(), leaves)])
        table, index = torch.zeros(8, 2, 2).requires_grad_(), torch.randint(8, (100_000,))
        wide = torch.randn(100_000, 2, 2)
        sums = [torch.autograd.grad(rows(table, index), table, wide)[0] for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    exact = torch.zeros(8, 2, 2, dtype=torch.float64).index_add(0, index, wide.double())
    assert all(torch.equal(sums[0], one) for one in sums) and torch.allclose(sums[0], exact.float(), atol=1e-2)
    assert "IndexSelectBackward0" in kinds and "IndexBackward0" not in kinds


def around(x: float, y: float, radius: float) -> Tensor:
    """Four curves around a circle, off by 0.03 % of the radius at most: float64 [13, 2]."""
    k = 4 / 3 * (math.sqrt(2) - 1)
    quarter = torch.tensor([[1, 0], [1, k], [k, 1]], dtype=torch.float64)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    parts = [quarter @ torch.linalg.matrix_power(turn, number) for number in range(4)]
    return torch.cat([*parts, quarter[:1]]) * radius + torch.tensor([x, y], dtype=torch.float64)


def black(points: Tensor, width: float = 1.0, **more: object) -> Strokes:
    """One opaque black path."""
    colours = torch.tensor([[[0, 0, 0, 1.0]]], dtype=points.dtype)
    return Strokes(points=points[None, None], widths=points.new_full((1, 1), width), colours=colours, **more)  # type: ignore[arg-type]


FILLED = torch.ones(1, 1, dtype=torch.bool)


def test_a_disc_has_its_area_and_a_ring_its_own() -> None:
    disc = 1 - render(black(around(20.3, 19.6, 12), filled=FILLED), 40, 40)[0, 0]
    assert float(disc.sum()) == pytest.approx(math.pi * 144, rel=2e-3)
    ring = 1 - render(black(around(20.3, 19.6, 12), width=3), 40, 40)[0, 0]
    assert float(ring.sum()) == pytest.approx(2 * math.pi * 12 * 3, rel=2e-3)


def corners(*places: tuple[float, float]) -> Tensor:
    """Straight curves between places: float64 [3N + 1, 2]."""
    ends = torch.tensor(places, dtype=torch.float64)
    parts = [torch.lerp(a, b, part) for a, b in zip(ends, ends[1:], strict=False) for part in (0.0, 1 / 3, 2 / 3)]
    return torch.stack([*parts, ends[-1]])


def test_a_filled_rectangle_covers_its_part_of_each_pixel() -> None:
    """Also where it leaves the canvas, and whichever way around it goes."""
    box = corners((-3, 1.25), (2.5, 1.25), (2.5, 9), (-3, 9))
    rows = torch.tensor([0, 0.75, 1, 1], dtype=torch.float64)
    columns = torch.tensor([1, 1, 0.5, 0], dtype=torch.float64)
    for points in (box, box.flip(0)):
        covered = 1 - render(black(points, filled=FILLED), 4, 4)[0, 0]
        assert torch.allclose(covered, rows[:, None] * columns, atol=1e-7)


def test_fill_rules_differ_where_a_path_overlaps_itself() -> None:
    """Twice around the same square: nonzero paints it, evenodd does not."""
    square = [(1, 1), (5, 1), (5, 5), (1, 5)]
    twice = black(corners(*square, *square, (1, 1)), filled=FILLED)
    assert float((1 - render(twice, 6, 6)[0, 0]).sum()) == pytest.approx(16)
    assert float((1 - render(replace(twice, even_odd=True), 6, 6)[0, 0]).sum()) == pytest.approx(0, abs=1e-6)


def test_later_strokes_cover_earlier_ones_by_their_alpha() -> None:
    points = corners((0, 5), (10, 5)).expand(1, 2, -1, -1)
    colours = torch.tensor([[[1.0, 0, 0, 1], [0, 0, 1, 0.25]]], dtype=torch.float64)
    image = render(Strokes(points=points, widths=torch.full((1, 2), 6.0).double(), colours=colours), 10, 10)
    assert image[0, :, 5, 5].tolist() == pytest.approx([0.75, 0, 0.25])


def test_a_thin_line_is_as_grey_as_it_is_thin() -> None:
    for width in (0.0, 0.25, 0.5, 1.0):
        column = 1 - render(black(corners((-5, 4.3), (15, 4.3)), width=width), 9, 10)[0, 0, :, 5]
        assert float(column.sum()) == pytest.approx(width, abs=0.02)


def test_far_off_degenerate_and_absent_strokes_leave_the_background() -> None:
    points = torch.full((1, 3, 4, 2), 1e30)
    points[0, 1] = -500
    points[0, 2] = 5.5  # a point, with no width
    strokes = Strokes(points=points, widths=torch.tensor([[3.0, 3, 0]]), colours=torch.ones(1, 3, 4) / 2)
    assert torch.equal(render(strokes, 8, 8), torch.ones(1, 3, 8, 8))
    none = Strokes(points=torch.empty(2, 0, 4, 2), widths=torch.empty(2, 0), colours=torch.empty(2, 0, 4))
    assert torch.equal(render(none, 3, 5, torch.zeros(3, 1, 1)), torch.zeros(2, 3, 3, 5))
    dot = replace(strokes, points=torch.full((1, 3, 4, 2), 4.5), widths=torch.tensor([[0, 0, 3.0]]))
    dark = (1 - render(dot, 9, 9)[0, 0]).sum() / 0.25
    assert float(dark) == pytest.approx(math.pi * 1.5**2, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"points": torch.zeros(1, 2, 5, 2)}, r"points: got \(1, 2, 5, 2\)"),
        ({"points": torch.full((1, 2, 4, 2), torch.nan)}, "points: got 'numbers that are not finite'"),
        ({"widths": torch.ones(1, 3)}, r"widths: got \(1, 3\)"),
        ({"colours": torch.ones(1, 2, 3)}, r"colours: got \(1, 2, 3\)"),
        ({"segments": torch.tensor([[1, 2]])}, r"segments: got \(1, 2\), expected 1 to 1"),
        ({"filled": torch.ones(1, 1, dtype=torch.bool)}, "filled: got"),
    ],
)
def test_wrong_tensors_are_refused(changed: dict[str, Tensor], sentence: str) -> None:
    right = {"points": torch.zeros(1, 2, 4, 2), "widths": torch.ones(1, 2), "colours": torch.ones(1, 2, 4)}
    with pytest.raises(SettingError, match=sentence):
        render(Strokes(**{**right, **changed}), 4, 4)


def test_a_stroke_moves_onto_another_one() -> None:
    """From an overlapping start, by the squares of pixels' differences, as in fitting."""
    target = render(black(torch.tensor([[8.0, 30], [16, 8], [28, 36], [40, 14]]), width=4), 48, 48)
    points = torch.tensor([[11.0, 27], [19, 11], [25, 32], [37, 17]]).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.5)
    first = None
    for _ in range(80):
        loss = (render(black(points, width=4), 48, 48) - target).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 20
