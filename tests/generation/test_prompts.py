"""Prompts with weights and stops, and the losses, by hand."""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.generation.prompts import WeightedPrompt, parse_prompt, parse_prompts
from pipeline.generation.similarity import cosine_distance, spherical_distance, weighted


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a red star", WeightedPrompt("a red star")),
        ("a logo:-0.3", WeightedPrompt("a logo", -0.3)),
        ("a city : 2 : 0.6", WeightedPrompt("a city", 2, 0.6)),
        ("a city:2:inf", WeightedPrompt("a city", 2, math.inf)),
        ("note: a cat", WeightedPrompt("note: a cat")),
        ("ratio 4:3:2", WeightedPrompt("ratio 4", 3, 2)),
        ("a:b:1e-2:-inf", WeightedPrompt("a:b", 0.01)),
        ("image=s3://bucket/sky.png:0.5:0.1", WeightedPrompt("image=s3://bucket/sky.png", 0.5, 0.1)),
    ],
)
def test_up_to_two_numbers_follow_a_text(text: str, prompt: WeightedPrompt) -> None:
    assert parse_prompt(text) == prompt


def test_a_prompt_is_a_text_or_an_image() -> None:
    assert [one.image for one in parse_prompts("red|image= a b.png:2|my image=x")] == ["", "a b.png", ""]


def test_several_prompts_of_one_image() -> None:
    assert parse_prompts("red | blue:-1") == (WeightedPrompt("red"), WeightedPrompt("blue", -1))


@pytest.mark.parametrize(
    "text", ["", "  ", ":1", "red:0", "red:nan", "red:inf", "red:1:nan", "red||blue", "red:-1", "image="]
)
def test_empty_texts_and_impossible_numbers_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="^prompt: "):
        parse_prompts(text)


def test_the_spherical_distance_is_half_the_squared_angle() -> None:
    vectors = functional.normalize(torch.randn(50, 7, dtype=torch.float64), dim=1)
    one, other = vectors[:25], vectors[25:]
    angle = (one * other).sum(1).arccos()
    assert torch.allclose(spherical_distance(one, other), angle**2 / 2, atol=1e-9)
    assert torch.allclose(cosine_distance(one, other), -angle.cos())


def test_weights_and_stops() -> None:
    """|w| s d: the gradient is w where s d is above the stop, else 0; the value does not depend on the stop."""
    distances = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8]]).requires_grad_()
    weights, stops = torch.tensor([2.0, -0.5, 3.0, 1.0]), torch.tensor([0.5, -math.inf, -math.inf, math.inf])
    loss = weighted(distances, weights, stops)
    assert torch.allclose(loss, torch.tensor([[0.4, 1.6], [-0.1, -0.4], [0.6, 2.4], [0.2, 0.8]]))
    loss.sum().backward()
    assert distances.grad is not None
    assert torch.allclose(distances.grad, torch.tensor([[0, 2.0], [-0.5, -0.5], [3, 3], [0, 0]]))
