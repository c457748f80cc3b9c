"""CLIPDraw: the authors' start, loss and rates, and a drawing that a small CLIP takes for its prompt."""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.generation.loop import LoopConfig, Optimization
from pipeline.generation.method import Subject, generation_class, generation_config, generation_names
from pipeline.generation.methods.clipdraw import ClipDraw, Config, random_strokes
from pipeline.generation.prompts import parse_prompts
from pipeline.generation.streams import Draw, generators
from pipeline.generation.stroke_picture import StrokePicture, StrokeRates
from pipeline.generation.strokes import render
from pipeline.generation.svg import read_svg
from pipeline.generation.views import PerspectiveCrops
from tests.generation.toy_clip import colour_guide


def small(**changed: object) -> Config:
    """Twelve strokes on 32 pixels, by the toy CLIP."""
    loop = LoopConfig(steps=40, evaluate_every=10)
    return Config(**{"clips": ("toy",), "strokes": 12, "side": 32, "width": 3.0, "loop": loop, **changed})  # type: ignore[arg-type]


def subjects(*texts: str) -> list[Subject]:
    return [Subject(prompts=parse_prompts(text)) for text in texts]


def test_strokes_start_as_the_authors_do() -> None:
    start = random_strokes([3, 4], 400, 3, 200, 1.0)
    begin, steps = start.points[:, :, 0] / 200, start.points.diff(dim=2) / 200
    assert 0 <= begin.min() < 0.02 and 0.98 < begin.max() <= 1
    assert steps.abs().max() <= 0.05 and steps.abs().max() > 0.049 and abs(float(steps.mean())) < 1e-3
    lengths = torch.bincount(start.counts().flatten(), minlength=4)
    assert lengths[0] == 0 and lengths[1:].min() > 200
    assert bool((start.widths == 1).all()) and 0.4 < float(start.colours.mean()) < 0.6
    alone = random_strokes([4], 400, 3, 200, 1.0)
    assert torch.equal(alone.points[0], start.points[1]) and torch.equal(alone.counts()[0], start.counts()[1])
    assert not torch.allclose(start.points[0], start.points[1])


def test_the_loss_is_the_papers() -> None:
    """Minus the sum of cosines over views, plus 0.3 times that with a negative prompt."""
    guide = colour_guide()
    picture, objective = ClipDraw(small()).start(subjects("red|blue:-0.3"), [7], {"toy": guide})
    image = picture.render()
    found = objective.losses(image, generators([7], 5, Draw.VIEWS))
    views = PerspectiveCrops(count=4)
    seen = views.apply(image, views.draw(generators([7], 5, Draw.VIEWS)), (32, 32))
    features = guide.images(functional.interpolate(seen, (8, 8), mode="bicubic", antialias=True).clamp(0, 1))
    wanted = -features[:, 0].sum() + 0.3 * features[:, 2].sum()
    assert len(found) == 1 and next(iter(found.values())).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_rates_fall_for_points_only_and_limits_hold() -> None:
    picture, _ = ClipDraw(small()).start(subjects("red"), [7], {"toy": colour_guide()})
    assert isinstance(picture, StrokePicture)
    assert [group["lr"] for group in picture.parameter_groups()] == [1.0, 0.1, 0.01]
    rates = {part: list(picture.rates(part)) for part in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)}
    assert [rates[part][0] for part in rates] == [1, 1, 0.4, 0.4, 0.1, 0.1]
    assert all(some[1:] == [1, 1] for some in rates.values())
    with torch.no_grad():
        picture.widths += torch.linspace(-5, 90, 12)
        picture.colours += torch.linspace(-2, 2, 12)[:, None]
    picture.after_step()
    assert (picture.widths.min(), picture.widths.max()) == (1, 50)
    assert (picture.colours.min(), picture.colours.max()) == (0, 1)


@pytest.mark.parametrize(
    "changed", [{}, {"augmentation": "cutouts"}, {"distance": "spherical", "augmentation": "none"}]
)
def test_a_drawing_becomes_its_prompt(changed: dict[str, object]) -> None:
    """Under a judge of another size, and away from a negative prompt; all three kinds of parameters move."""
    guide, judge, seeds = colour_guide(), colour_guide(12), [1, 2]
    method = ClipDraw(small(**changed))
    picture, objective = method.start(subjects("blue", "red|green:-0.5"), seeds, {"toy": guide})
    first = [one.clone() for one in picture.parameters()]
    run = Optimization(picture, objective, method.loop, seeds, judge)
    begin = (judge.images(picture.render()) * objective.references(judge)).sum(1)
    history = run.run().history
    assert all(end > start for end, start in zip(history[-1]["judge"], begin.tolist(), strict=True))
    assert all(not torch.equal(one, other) for one, other in zip(first, picture.parameters(), strict=True))
    for number, text in enumerate(picture.drawings()):
        again = read_svg(text)
        assert torch.allclose(render(again.strokes, 32, 32)[0], picture.render()[number], atol=0.02)


def test_methods_are_found_by_their_files() -> None:
    assert "clipdraw" in generation_names() and generation_class("clipdraw") is ClipDraw
    assert generation_config("clipdraw") is Config
    with pytest.raises(SettingError, match="did you mean clipdraw"):
        generation_class("clipdrow")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"strokes": 0}, "strokes"),
        ({"segments": 0}, "segments"),
        ({"side": 8}, "side"),
        ({"width": 0.5}, "width"),
        ({"views": 0}, "views"),
        ({"clips": ()}, "clips"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, object], field: str) -> None:
    with pytest.raises(SettingError, match=f"^{field}: "):
        small(**changed)


@pytest.mark.parametrize("rate", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["points", "widths", "colours"])
def test_rates_are_finite(name: str, rate: float) -> None:
    with pytest.raises(SettingError, match=f"^{name}: "):
        StrokeRates(**{name: rate})
