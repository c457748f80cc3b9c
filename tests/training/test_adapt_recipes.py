"""The recipes against torch's own schedulers and optimisers, and against the papers' numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.adapters.adapter import adapter_class, adapter_names
from pipeline.training.adapt_recipes import AdaptRecipe, make_optimizer, paper_config, paper_recipe


def rates(recipe: AdaptRecipe, steps: int = 1) -> list[float]:
    return [recipe.rate(epoch, step, steps) for epoch in range(recipe.epochs) for step in range(steps)]


@pytest.mark.parametrize("epochs", [2, 5, 10, 50, 200])
def test_epochs_are_torchs_cosine_behind_a_constant_one(epochs: int) -> None:
    """As the reference: a scheduler of the whole run's length, stepped once an epoch, from its top after epoch 1."""
    recipe = AdaptRecipe(epochs=epochs)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    expected = [1e-5]
    for _ in range(epochs - 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates(recipe) == pytest.approx(expected, rel=1e-9)


def test_the_rates_that_the_reference_logs() -> None:
    few = rates(AdaptRecipe(epochs=50))
    assert few[:4] == pytest.approx([1e-5, 2e-3, 1.998027e-3, 1.992115e-3], rel=1e-6)
    assert few[-1] == pytest.approx(7.885e-6, rel=1e-3)
    maple = paper_recipe("maple", 16)
    assert maple is not None
    assert rates(maple) == pytest.approx([1e-5, 3.5e-3, 3.165780e-3, 2.290780e-3, 1.209220e-3], rel=1e-6)
    cross, cocoop = paper_recipe("maple", 16, "cross"), paper_recipe("cocoop", 16)
    assert cross is not None and cocoop is not None
    assert rates(cross) == pytest.approx([1e-5, 2.6e-3])
    assert rates(cocoop)[-1] == pytest.approx(1.9098e-4, rel=1e-4)


def test_steps_are_torchs_cosine() -> None:
    recipe = paper_recipe("tip_adapter_f", 16)
    assert recipe is not None
    steps = recipe.steps(1600)
    assert steps == 7  # 6 of 256 and one of 64
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs * steps)
    expected = []
    for _ in range(recipe.epochs * steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates(recipe, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "shots", "more", "expected"),
    [
        ("coop", 1, {}, ("sgd", 0.002, 50, 32)),
        ("coop", 2, {}, ("sgd", 0.002, 100, 32)),
        ("coop", 4, {}, ("sgd", 0.002, 100, 32)),
        ("coop", 8, {}, ("sgd", 0.002, 200, 32)),
        ("coop", 16, {}, ("sgd", 0.002, 200, 32)),
        ("coop", 16, {"data_set": "imagenet"}, ("sgd", 0.002, 50, 32)),
        ("cocoop", 16, {"protocol": "base_to_new"}, ("sgd", 0.002, 10, 1)),
        ("maple", 16, {"protocol": "base_to_new"}, ("sgd", 0.0035, 5, 4)),
        ("maple", 16, {"protocol": "cross"}, ("sgd", 0.0026, 2, 4)),
        ("ivlp", 16, {}, ("sgd", 0.0035, 5, 4)),
        ("vpt", 16, {}, ("sgd", 0.0025, 5, 4)),
        ("clip_adapter", 16, {}, ("adamw", 1e-5, 200, 32)),
        ("tip_adapter_f", 16, {}, ("adamw", 0.001, 20, 256)),
        ("tip_adapter_f", 16, {"data_set": "eurosat"}, ("adamw", 0.001, 100, 256)),
    ],
)
def test_the_papers_values(method: str, shots: int, more: dict[str, Any], expected: tuple[Any, ...]) -> None:
    recipe = paper_recipe(method, shots, **more)
    assert recipe is not None
    assert (recipe.optimizer, recipe.learning_rate, recipe.epochs, recipe.batch_size) == expected


def test_the_papers_optimisers() -> None:
    one = [torch.nn.Parameter(torch.zeros(3))]
    coop, tip = paper_recipe("coop", 16), paper_recipe("tip_adapter_f", 16)
    assert coop is not None and tip is not None
    sgd, adam = make_optimizer(coop, one), make_optimizer(tip, one)
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.AdamW)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"], sgd.defaults["nesterov"]) == (0.9, 5e-4, False)
    plain = torch.optim.AdamW(one, lr=1e-3, eps=1e-4)
    assert adam.defaults == plain.defaults


def test_every_method_has_a_recipe_or_does_not_learn() -> None:
    for name in adapter_names():
        assert (paper_recipe(name, 16) is None) == (not adapter_class(name).learns)
        assert paper_config(name) == paper_config(name, "few_shot")
    assert paper_config("coop").context == 16 and paper_config("coop").start is None
    assert paper_config("coop", "base_to_new").start == "a photo of a"
    assert paper_config("maple").depth == 9 and paper_config("maple", "cross").depth == 3
    with pytest.raises(SettingError, match="one of clip_adapter"):
        paper_recipe("no_method", 16)
    with pytest.raises(SettingError, match="1 or more"):
        paper_recipe("coop", 0)


def test_steps_of_an_epoch() -> None:
    """160 shots in batches of 32; a set smaller than a batch is a batch; the rest is left out or kept."""
    recipe = AdaptRecipe(batch_size=32)
    assert [recipe.steps(images) for images in (160, 10, 170, 32, 33)] == [5, 1, 5, 1, 1]
    assert [replace(recipe, drop_last=False).steps(images) for images in (160, 10, 170, 33)] == [5, 1, 6, 2]


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"crop_scale": (0.5, 0.4)},
        {"flip": 1.5},
        {"warmup_epochs": -1},
    ],
)
def test_values_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        AdaptRecipe(**values)
