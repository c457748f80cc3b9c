"""SVG out and in: the same strokes, files by hand and by others, and hostile ones."""

import re
import time
from dataclasses import replace

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.generation import svg
from pipeline.generation.prompts import parse_prompt
from pipeline.generation.strokes import render
from pipeline.generation.svg import curves_of, read_svg, write_svg
from tests.generation.test_strokes import decibels, scene, supersampled


@pytest.mark.parametrize("even_odd", [False, True])
def test_written_and_read_again_are_the_same_strokes(even_odd: bool) -> None:
    strokes = replace(scene(1, 25, 64, images=2), even_odd=even_odd)
    for image, text in enumerate(write_svg(strokes, 64, 48, (0.5, 1.0, 0.25))):
        back = read_svg(text)
        assert (back.height, back.width, back.background) == (64, 48, (0.5, 1.0, 0.25))
        assert torch.equal(back.strokes.segments, strokes.segments[image, None])
        assert torch.equal(back.strokes.filled, strokes.filled[image, None])
        used = torch.arange(10) < 3 * strokes.segments[image, :, None] + 1
        assert (back.strokes.points[0][used] - strokes.points[image][used]).abs().max() < 6e-4
        assert (back.strokes.colours - strokes.colours[image]).abs().max() < 1e-4
        lines = ~strokes.filled[image]
        assert (back.strokes.widths[0] - strokes.widths[image])[lines].abs().max() < 6e-4
        assert back.strokes.even_odd == (even_odd and bool(strokes.filled[image].any()))


BY_HAND = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" width="80px" height="80" viewBox="0 0 40 40"><title>by hand</title>
<rect width="40" height="40" fill="white"/>
<g stroke="navy" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round" fill="none">
<path d="m5 5 6,0 v6h-6z M20.5.5L30 10"/>
<path style="stroke: #f80; stroke-opacity: .5" d="M4 30 Q 9 18 14 30 t 10 0 T34 30"/>
<polyline points="2,38 10,34 18,38 26,34" stroke="rgb(0%, 50%, 100%)"/>
<path d="M2 20 C 6 14 8 14 12 20 S 18 26 22 20 s 3-6 6 0"/>
<line x1="35" y1="2" x2="35" y2="20" stroke-width="3" opacity="0.4"/>
</g>
<polygon points="26,12 34,14 28,20" fill="rgb(255,0,0)" fill-opacity="0.7" stroke="black" stroke-linejoin="round"/>
<rect x="12" y="12" width="5" height="3"/>
</svg>"""


def test_a_file_by_hand_looks_as_resvg_draws_it() -> None:
    """Every command and element that is read, twice as large as its units; groups hand their colours down."""
    scene = read_svg(BY_HAND)
    assert (scene.height, scene.width, scene.background) == (80, 80, (1, 1, 1))
    image = render(scene.strokes, 80, 80)[0].double()
    assert decibels(image, supersampled(BY_HAND, 80)) > 40


def test_an_empty_drawing_has_no_strokes() -> None:
    scene = read_svg('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 30 20"/>')
    assert (scene.width, scene.height, scene.background) == (30, 20, None)
    assert tuple(scene.strokes.points.shape) == (1, 0, 4, 2)


@pytest.mark.parametrize(
    "data", ["5 5", "M 1 1 A 1 1 0 0 0 2 2", "M 1", "M 1 1 L 2", "Z 3", "M1 1 C 1 2 3 4 5 x", "M1 1 # L 2 2"]
)
def test_paths_that_cannot_be_read_are_refused(data: str) -> None:
    with pytest.raises(ValueError):
        curves_of(data)
    with pytest.raises(SettingError, match="in.svg"):
        read_svg(f'<svg viewBox="0 0 9 9"><path d="{data}"/></svg>', "in.svg")


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><svg viewBox="0 0 9 9"><title>&b;</title></svg>'

GROUPS = f'<svg viewBox="0 0 9 9">{"<g>" * 3000}{"</g>" * 3000}</svg>'
CROWD = f'<svg viewBox="0 0 9 9">{"""<path d="M1 1h1v1"/>""" * 5000}<path d="M0 0{" 1 2" * 9000}"/></svg>'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no file", "expected an SVG file"),
        ("<html/>", "got 'html'"),
        (BOMB, "a document type"),
        ("<svg/>", "a width and a height"),
        ('<svg width="1e9" height="5"/>', "a width and a height"),
        ('<svg width="5cm" height="5"/>', "lengths in pixels"),
        ('<svg width="20" height="20" viewBox="0 0 10 40"/>', "aspect ratio"),
        ('<svg width="9" height="9" viewBox="1 0 9 9"/>', "from 0 0"),
        ('<svg viewBox="0 0 9 9"><circle r="1"/></svg>', "the elements g, path"),
        ('<svg viewBox="0 0 9 9"><g transform="scale(2)"/></svg>', "a file without transform"),
        ('<svg viewBox="0 0 9 9"><g opacity="0.5"/></svg>', "opacity of paths"),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1v1M3 3h1v1"/></svg>', "one part"),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1v1" fill="url(#x)"/></svg>', "a colour"),
        ('<svg viewBox="0 0 9 9"><rect width="x" height="2"/></svg>', "an element that can be read"),
        (
            '<svg viewBox="0 0 9 9"><path d="M1 1h1v1" fill-rule="evenodd"/><path d="M1 1h1v1"/></svg>',
            "one fill rule",
        ),
        (GROUPS, "groups 100 deep at most"),
        ('<svg viewBox="0 0 9 9"><g opacity="x"/></svg>', "an opacity of 0 to 1"),
        ('<svg viewBox="0 0 9 9"><g style="display: none"><path d="M1 1h1v1"/></g></svg>', "without display"),
        ('<svg viewBox="0 0 9 9"><rect width="4" height="4" visibility="hidden"/></svg>', "without visibility"),
        ('<svg viewBox="0 0 9 9"><rect width="4" height="4" rx="2"/></svg>', "without rx"),
        (
            '<svg viewBox="0 0 9 9"><path d="M1 1h1" stroke="red" stroke-dasharray="2"/></svg>',
            "without stroke-dasharray",
        ),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1v1" clip-path="url(#a)"/></svg>', "without clip-path"),
        ('<svg viewBox="0 0 9 9"><svg><path d="M1 1h1v1"/></svg></svg>', "the elements g, path"),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1v1" fill="#ff000080"/></svg>', "a colour without alpha"),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1" stroke="red" stroke-width="9%"/></svg>', "lengths in pixels"),
        ('<svg viewBox="0 0 9 9"><path d="M1 1h1e999v1"/></svg>', "finite numbers"),
        ('<svg width="9" height="9" viewBox="0 0 1e-40 1e-40"><path d="M1 1h1v1"/></svg>', "finite numbers"),
        (CROWD, "5001 paths of up to 9000 curves"),
    ],
    ids=lambda one: one[-60:],
)
def test_files_with_more_than_is_read_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        read_svg(text)


@pytest.mark.parametrize(
    ("more", "left", "top", "alpha"),
    [('y="4"', 0, 4, 1), ('x="1"', 1, 0, 1), ('opacity="0.5"', 0, 0, 0.5), ('fill-opacity="25%"', 0, 0, 0.25)],
)
def test_a_first_rectangle_that_does_not_cover_all_is_a_path(more: str, left: int, top: int, alpha: float) -> None:
    found = read_svg(f'<svg width="24" height="24"><rect width="24" height="24" fill="red" {more}/></svg>')
    wanted = torch.ones(3, 24, 24)
    wanted[1:, top:, left:] = 1 - alpha
    assert found.background is None
    torch.testing.assert_close(render(found.strokes, 24, 24)[0], wanted, atol=1e-5, rtol=0)


def test_time_grows_with_the_length_of_a_path() -> None:
    """A list whose first item is removed would take 16 times as long for a path of four times the length."""
    times = []
    for count in (10_000, 40_000):
        began = time.process_time()
        (curves,) = curves_of("M1 1" + " 2 3" * count)
        times.append(time.process_time() - began)
        assert len(curves) == count
    assert times[1] < 8 * times[0]


DIGITS = "1" * 20_000


@pytest.mark.parametrize("name", ["stroke-width", "stroke-opacity", "stroke", "points"])
def test_long_numbers_take_no_time(name: str) -> None:
    """The square of their lengths would be 17 s."""
    began = time.process_time()
    attributes = {"fill": "none", "stroke": "red", "points": "0,0 1,1"}
    attributes[name] = {"stroke": f"rgb({DIGITS}x)", "points": f"0 0 1 {DIGITS}"}.get(name, f"{DIGITS}x")
    written = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    with pytest.raises(SettingError, match="in.svg: got .{,250}, expected (length|an opacity|a colour|finite)"):
        read_svg(f'<svg viewBox="0 0 9 9"><polyline {written}/></svg>', "in.svg")
    assert re.fullmatch(svg.NUMBER, f"{DIGITS}x") is None
    assert parse_prompt(f"a:{DIGITS}x").weight == 1 and parse_prompt(f"a:{'1' * 300}.5e-300").weight > 0.1
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "shape",
    [
        f'<path d="M0 0{"h1" * 5000}"/>',
        '<path d="M0 0h1v1"/>' * 1000,
        f'<polyline points="{"1 2 " * 5000}"/>',
        f'<polygon points="{"1 2 " * 102}"/>',
        '<line x2="5"/>' * 1000,
    ],
    ids=["path", "paths", "polyline", "polygon", "lines"],
)
def test_reading_stops_at_the_first_curve_too_many(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def counted(*given: object) -> object:
        made.append(given)
        return straight(*given)  # type: ignore[arg-type]

    straight = svg._straight
    monkeypatch.setattr(svg, "MOST_CURVES", 100)
    monkeypatch.setattr(svg, "_straight", counted)
    with pytest.raises(SettingError, match="in.svg: .*(more than .* curves|too many elements)"):
        read_svg(f'<svg viewBox="0 0 9 9">{shape}</svg>', "in.svg")
    assert len(made) <= 101


def test_a_path_of_many_curves_and_others_of_few_take_their_room_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points have room for the longest path; reading stops at the first element for which there is none."""
    read: list[object] = []
    path = svg.SHAPES["path"]
    monkeypatch.setitem(svg.SHAPES, "path", lambda *given: read.append(given) or path(*given))
    monkeypatch.setattr(svg, "MOST_POINTS", 2000)
    rest = '<path d="M0 0h1v1"/>' * 100
    with pytest.raises(SettingError, match="7 paths of up to 100 curves"):
        read_svg(f'<svg viewBox="0 0 9 9"><path d="M0 0{"h1v1" * 50}"/>{rest}</svg>')
    assert len(read) == 7
