"""The loop: deterministic by seed, the same alone and in a batch, resumed exactly, safe from numbers that are none."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import DataError, SettingError
from pipeline.generation.guides import Guide
from pipeline.generation.loop import MOST_RETRIES, LoopConfig, Optimization, Picture
from pipeline.generation.prompts import parse_prompts
from pipeline.generation.similarity import spherical_distance
from pipeline.generation.streams import Draw, generators, uniform
from pipeline.generation.text_objective import TextObjective
from pipeline.generation.views import Cutouts, PerspectiveCrops, RandomSquares, Unchanged, ViewMaker
from tests.generation.toy_clip import ColourClip, colour_guide


class Pixels(Picture):
    """Images whose parameters are their pixels."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.pixels = nn.Parameter(uniform(generators(seeds, 0, Draw.START), 3, 12, 12))

    def render(self) -> Tensor:
        return self.pixels

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.pixels], "lr": 0.02}]

    def rates(self, progress: float) -> Sequence[float]:
        return [1.0 if progress < 0.5 else 0.5]

    @torch.no_grad()
    def after_step(self) -> None:
        self.pixels.clamp_(0, 1)


def optimization(texts: Sequence[str], seeds: Sequence[int], judge: Guide | None = None, **loop: int) -> Optimization:
    """Pixels for colours."""
    prompts = [parse_prompts(text) for text in texts]
    objective = TextObjective(prompts, [colour_guide()], PerspectiveCrops(count=2), "spherical")
    return Optimization(
        Pixels(seeds), objective, LoopConfig(**{"steps": 20, "evaluate_every": 5, **loop}), seeds, judge
    )


TEXTS, SEEDS = ["red", "blue:2|green:-1", "green"], [4, 5, 6]


def test_images_become_their_prompts_and_the_judge_only_looks() -> None:
    judge = colour_guide(10)
    run = optimization(TEXTS, SEEDS, judge, steps=60)
    shown: list[tuple[int, Tensor]] = []
    history = run.run(watch=lambda progress, images: shown.append((progress.step, images.clone()))).history
    assert [step for step, _ in shown] == [entry["step"] for entry in history] == list(range(5, 61, 5))
    means = run.picture.render().mean((2, 3))
    assert means.argmax(1).tolist() == [0, 2, 1]
    for image, colour in enumerate([0, 2, 1]):
        found = judge.images(shown[-1][1])[image, colour]
        assert history[-1]["judge"][image] == pytest.approx(found.item(), abs=1e-5)
        assert history[-1]["judge"][image] > history[0]["judge"][image]
    alone = optimization(TEXTS, SEEDS, steps=60)
    unjudged = alone.run().history
    assert torch.equal(alone.picture.render(), run.picture.render())
    assert [entry["loss"] for entry in unjudged] == [entry["loss"] for entry in history]


def test_an_image_is_the_same_alone_and_in_a_batch() -> None:
    batch = optimization(TEXTS, SEEDS)
    batch.run()
    for image, (text, seed) in enumerate(zip(TEXTS, SEEDS, strict=True)):
        alone = optimization([text], [seed])
        alone.run()
        assert torch.allclose(alone.picture.render()[0], batch.picture.render()[image], atol=1e-5)
        assert alone.progress.history[-1]["loss"][0] == pytest.approx(batch.progress.history[-1]["loss"][image], 1e-4)


class Averaged(Pixels):
    """Shows the mean of its last states, and is pulled to 0 in the first steps."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.register_buffer("mean", self.pixels.detach().clone())

    def shown(self) -> Tensor:
        mean: Any = self.mean
        return mean

    def penalties(self, step: int) -> dict[str, Tensor]:
        return {"size": self.pixels.flatten(1).square().sum(1) / (1 + step) ** 4}

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.shown().lerp_(self.pixels, 0.5)


def test_shown_images_are_evaluated_and_penalties_are_losses() -> None:
    run, plain = optimization(["red"], [1], colour_guide(), steps=1), optimization(["red"], [1], steps=1)
    run.picture = averaged = Averaged([1])
    run.optimizer = torch.optim.Adam(averaged.parameter_groups())
    begin = averaged.pixels.detach().clone()
    run.run()
    plain.run()
    assert bool((averaged.pixels <= begin).all()) and not torch.equal(averaged.pixels, plain.picture.render())
    assert torch.allclose(averaged.shown(), (begin + averaged.pixels) / 2)
    found = colour_guide().images(averaged.shown())[0, 0].item()
    assert run.progress.history[-1]["judge"][0] == pytest.approx(found, abs=1e-5)


def test_a_stopped_image_keeps_its_buffers_too() -> None:
    """As it is alone, where the loop ends with it."""
    settings = {"steps": 40, "evaluate_every": 2, "patience": 2}
    shown = []
    for texts, seeds in ((["red:1:9", "blue"], [1, 2]), (["red:1:9"], [1])):
        objective = TextObjective([parse_prompts(text) for text in texts], [colour_guide()], PerspectiveCrops(count=2))
        run = Optimization(Averaged(seeds), objective, LoopConfig(**settings, least_change=1e-2), seeds)
        run.run()
        shown.append(run.picture.shown()[0])
    assert torch.equal(*shown) and run.progress.step < 40


def test_a_resumed_optimization_has_the_same_bits() -> None:
    whole = optimization(TEXTS, SEEDS)
    whole.run()
    kept: list[bytes] = []
    first = optimization(TEXTS, SEEDS, checkpoint_every=7)
    first.run(save=kept.append)
    assert len(kept) == 3
    again = optimization(TEXTS, SEEDS, checkpoint_every=7)
    again.resume(kept[0])
    assert again.progress.step == 7
    taken = again.progress.seconds = again.progress.seconds + 100
    again.run()
    assert torch.equal(again.picture.render(), whole.picture.render())
    assert again.progress.history == whole.progress.history
    assert 0 < whole.progress.seconds < 100 < taken < again.progress.seconds < taken + 100


def test_checkpoints_of_other_images_or_none_are_refused() -> None:
    run = optimization(["red"], [1])
    content = run.checkpoint()
    for other in (b"", b"abc", content[:200], optimization(["red"], [2]).checkpoint()):
        with pytest.raises(DataError, match="no checkpoint of these images"):
            run.resume(other)


class Breaking(Pixels):
    """Its second image has a loss that is not finite, ``times`` times, from step 8 on."""

    times, seen, step = 1, 0, 0

    def render(self) -> Tensor:
        image = super().render()
        if self.training and self.step >= 8 and self.seen < self.times and torch.is_grad_enabled():
            self.seen += 1
            bad = torch.zeros_like(image)
            bad[1] = torch.nan
            return image + bad
        return image

    def after_step(self) -> None:
        super().after_step()
        self.step += 1


def test_a_loss_that_is_not_finite_repeats_with_half_the_rate_and_leaves_others_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    healthy = optimization(TEXTS, SEEDS)
    healthy.run()
    broken = optimization(TEXTS, SEEDS, checkpoint_every=5)
    broken.picture.__class__ = Breaking
    with caplog.at_level(logging.WARNING):
        broken.run()
    assert "the loss of seed 5 is not finite at step 8: it goes on from step 5 with half the rate" in caplog.text
    assert broken.progress.scale == [1, 0.5, 1] and broken.progress.retries == [0, 1, 0]
    ours, theirs = broken.picture.render(), healthy.picture.render()
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and not torch.equal(ours[1], theirs[1])


def test_a_hopeless_image_fails_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It stays as it was at the last checkpoint before its first loss that is not finite."""
    healthy = optimization(TEXTS, SEEDS, colour_guide(), checkpoint_every=5, evaluate_every=2)
    frames: dict[int, Tensor] = {}
    healthy.run(save=lambda _: frames.update({healthy.progress.step: healthy.images().clone()}))
    run = optimization(TEXTS, SEEDS, colour_guide(), checkpoint_every=5, evaluate_every=2)
    run.names = ["one", "two", "three"]
    run.picture.__class__ = Breaking
    run.picture.times = 100  # type: ignore[assignment]
    progress = run.run()
    assert "the loss of two is not finite at step 5, also with smaller rates: failed, stays at step 5" in caplog.text
    assert progress.step == 20 and progress.failed == [False, True, False]
    assert progress.retries == [0, MOST_RETRIES, 0] and progress.scale == [1, 0, 1]
    ours, theirs = run.images(), healthy.images()
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and torch.equal(ours[1], frames[5][1])
    assert progress.numbers(0) == healthy.progress.numbers(0)
    assert progress.steps(1) == 5 and progress.numbers(1) == healthy.progress.numbers(1)[:2]
    again = optimization(TEXTS, SEEDS, colour_guide())
    again.resume(run.checkpoint())
    assert again.progress.failed == [False, True, False]


class Unlucky(Pixels):
    """Each image has two losses that are not finite, in steps of its own."""

    def render(self) -> Tensor:
        bad = torch.zeros_like(image := super().render())
        if torch.is_grad_enabled():
            for number in range(len(image)):
                if self.step >= 6 * number and self.seen[number] < 2:
                    self.seen[number] += 1
                    bad[number] = torch.nan
                    break
        return image + bad

    def after_step(self) -> None:
        super().after_step()
        self.step += 1


def test_retries_are_those_of_each_image() -> None:
    """Six of a batch, more than one image may have."""
    run = optimization(TEXTS, SEEDS, checkpoint_every=5)
    run.picture.__class__ = Unlucky
    run.picture.step, run.picture.seen = 0, [0, 0, 0]  # type: ignore[assignment]
    progress = run.run()
    assert progress.step == 20 and progress.retries == [2, 2, 2] and not any(progress.failed)
    assert progress.scale == [0.25] * 3


def test_a_batch_of_failed_images_ends() -> None:
    run = optimization(["red", "blue"], [1, 2], steps=9)
    run.picture.__class__ = Hopeless
    progress = run.run()
    assert progress.failed == [True, True] and progress.step == 0 and progress.numbers(1) == []


class Hopeless(Pixels):
    """No loss is finite."""

    def render(self) -> Tensor:
        return super().render() * torch.nan


def test_a_stopped_image_cannot_break_the_others() -> None:
    """Its parameters stay, and so do those of the others, as without its broken losses."""
    runs = [optimization(TEXTS, SEEDS), optimization(TEXTS, SEEDS)]
    runs[1].picture.__class__ = Breaking
    runs[1].picture.times = 100  # type: ignore[assignment]
    for run in runs:
        run.progress.scale = [1, 0, 1]
        run.run()
        assert run.progress.step == 20 and run.progress.retries == [0, 0, 0]
    assert torch.equal(runs[0].picture.pixels, runs[1].picture.pixels)  # type: ignore[arg-type]


def test_an_image_that_does_not_change_stops_and_others_go_on() -> None:
    """The stop of the prompt is met at once: its image has no gradient."""
    run = optimization(["red:1:9", "blue"], [1, 2], steps=40, evaluate_every=2, patience=2)
    first = run.picture.render().detach().clone()
    run.run()
    assert run.progress.scale == [0, 1] and run.progress.step == 40
    assert [run.progress.steps(image) for image in (0, 1)] == [6, 40]
    assert [entry["step"] for entry in run.progress.numbers(0)] == [2, 4, 6] and len(run.progress.numbers(1)) == 20
    assert torch.equal(run.picture.render()[0], first[0]) and not torch.equal(run.picture.render()[1], first[1])
    alone = optimization(["red:1:9"], [1], steps=40, evaluate_every=2, patience=2)
    assert alone.run().step == 6


def test_several_clips_add_up_and_read_their_own_sizes() -> None:
    guides = [colour_guide(8), Guide(ColourClip(16), "large")]
    prompts = [parse_prompts("red")]
    both = TextObjective(prompts, guides, PerspectiveCrops(count=2))
    images = torch.rand(1, 3, 12, 12)
    losses = both.losses(images, generators([1], 0, Draw.VIEWS))
    apart = [TextObjective(prompts, [guide], PerspectiveCrops(count=2)) for guide in guides]
    single = [list(one.losses(images, generators([1], 0, Draw.VIEWS)).values())[0] for one in apart]
    assert torch.allclose(torch.stack(list(losses.values())), torch.stack(single))
    assert float(single[1]) == pytest.approx(float(single[0]), rel=0.1)


@pytest.mark.parametrize("views", [Cutouts(count=3), RandomSquares(count=3)], ids=["cutouts", "squares"])
def test_cutouts_are_made_at_the_size_of_each_clips_input(views: ViewMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled or cut from an image of 40 pixels; at the size of the image, squares would all be the whole image."""
    guides = [colour_guide(8), colour_guide(16), colour_guide(8)]
    sizes: list[tuple[int, int]] = []
    apply = type(views).apply

    def recorded(self: ViewMaker, images: Tensor, drawn: Tensor, size: tuple[int, int]) -> Tensor:
        sizes.append(size)
        return apply(self, images, drawn, size)

    monkeypatch.setattr(type(views), "apply", recorded)
    objective = TextObjective([parse_prompts("red")], guides, views)
    losses = list(objective.losses(torch.rand(1, 3, 40, 40), generators([1], 0, Draw.VIEWS)).values())
    assert sizes == [(8, 8), (16, 16)]
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])


def image_file(folder: Path, colour: tuple[int, ...]) -> str:
    place = str(folder / "prompt.png")
    Image.new("RGBA" if len(colour) == 4 else "RGB", (20, 14), colour).save(place)
    return place


def test_an_image_prompt_is_the_mean_over_all_pairs_of_views(tmp_path: Path) -> None:
    """Against every pair of a view of the image and a view of the prompt; the weight is not multiplied by the views."""
    guide, views = colour_guide(8), Cutouts(count=3, noise=0.5)
    place = image_file(tmp_path, (200, 30, 90))
    objective = TextObjective([parse_prompts(f"image={place}:-0.5|red:2")], [guide], views, "spherical")
    images = torch.rand(1, 3, 24, 24)
    (loss,) = objective.losses(images, generators([1], 0, Draw.VIEWS)).values()
    seen = guide.images(views.apply(images, views.draw(generators([1], 0, Draw.VIEWS)), (8, 8)))
    pixels = torch.tensor([200, 30, 90.0])[:, None, None].expand(1, 3, 14, 20) / 255
    targets = guide.images(views.apply(pixels, views.draw(generators([0], 0, Draw.PROMPTS)), (8, 8)))
    assert not torch.allclose(targets[0], targets[1], atol=1e-3)
    pairs = [spherical_distance(one, other) for one in seen for other in targets]
    red = torch.tensor([1.0, 0, 0])
    wanted = -0.5 * torch.stack(pairs).mean() + 2 * spherical_distance(seen, red).mean()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_the_judge_compares_with_texts_and_images_by_weight(tmp_path: Path) -> None:
    guide, place = colour_guide(8), image_file(tmp_path, (0, 0, 255))
    objective = TextObjective([parse_prompts(f"image={place}:3|red|green:-1")], [guide], Cutouts(count=2))
    wanted = torch.nn.functional.normalize(torch.tensor([1.0, 0, 3]), dim=0)
    assert torch.allclose(objective.references(guide)[0], wanted, atol=0.01)


def test_transparent_parts_of_an_image_prompt_are_white_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    place = image_file(tmp_path, (0, 0, 255, 0))
    objective = TextObjective([parse_prompts(f"image={place}")], [colour_guide(8)], Unchanged())
    assert torch.allclose(objective.targets[0], torch.full((1, 3), 3**-0.5), atol=1e-3)
    with pytest.raises(SettingError, match="no such file"):
        TextObjective([parse_prompts("image=none.png")], [colour_guide(8)], Unchanged())


def test_long_texts_and_models_without_gradients_are_refused() -> None:
    with pytest.raises(SettingError, match="at most 5 tokens for colours; it has 6"):
        colour_guide().texts(["red red red red"])

    class Rounding(ColourClip):
        def encode_image(self, image: Tensor) -> Tensor:
            return super().encode_image(image.round())

    with pytest.raises(SettingError, match="gradients of its images"):
        Guide(Rounding(), "rounding")


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"evaluate_every": 0}, {"checkpoint_every": 0}, {"patience": -1}, {"least_change": -1}]
)
def test_wrong_lengths_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        LoopConfig(**settings)
