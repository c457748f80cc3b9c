"""The inter-view adapter against its formula written out, hand-made cases, and a whole training."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SettingError
from pipeline.models.adapters.adapter import Shots, adapter_class
from pipeline.models.adapters.pointclip import Config, InterViewAdapter, smoothed_cross_entropy, smoothed_targets
from pipeline.shards.storage import Folder
from pipeline.training.adapt import Labelled, accuracy, adapt
from pipeline.training.adapt_artifact import load_adapted, save
from pipeline.training.adapt_recipes import AdaptRecipe, paper_recipe

NAMES = ("one", "two", "three")
VIEWS, WIDTH = 4, 8


def clip(width: int = WIDTH, scale: float = 20.0) -> Any:
    """A CLIP that is nothing but its class vectors."""
    vectors = functional.normalize(torch.randn(len(NAMES), width, generator=torch.Generator().manual_seed(5)), dim=1)
    return SimpleNamespace(
        scale=scale, features=width, device=torch.device("cpu"), class_vectors=lambda *_: vectors, digest="0"
    )


def adapter(**values: Any) -> InterViewAdapter:
    return InterViewAdapter(Config(views=VIEWS, **values), clip(), NAMES, ("{}",))


def views(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, VIEWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hand(one: InterViewAdapter, features: Tensor) -> Tensor:
    """The formula with the running statistics of both normalisations, sample by sample."""
    weights = {name: tensor.double() for name, tensor in one.state_dict().items()}

    def normed(value: Tensor, name: str) -> Tensor:
        centred = (value - weights[f"{name}.running_mean"]) / (weights[f"{name}.running_var"] + 1e-5).sqrt()
        return centred * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    rows = []
    for sample in features.double():
        gated = torch.cat([normed(weights["gates"][view] * sample[view], "view_norm") for view in range(VIEWS)])
        whole = normed(weights["gather.weight"] @ gated + weights["gather.bias"], "global_norm").clamp(min=0)
        hidden = (weights["spread.0.weight"] @ whole + weights["spread.0.bias"]).clamp(min=0)
        residual = (weights["spread.2.weight"] @ hidden + weights["spread.2.bias"]).clamp(min=0)
        blended = 0.6 * residual + 0.4 * sample.flatten()
        repeated = one.vectors.double().repeat(1, VIEWS)
        rows.append(20 * (repeated / repeated.norm(dim=1, keepdim=True)) @ (blended / blended.norm()))
    return torch.stack(rows)


def test_logits_are_the_formula_written_out() -> None:
    one = adapter()
    one.train()
    for seed in range(5):  # running statistics that are not the initial ones
        one.logits(views(seed=seed))
    one.eval()
    torch.testing.assert_close(one.logits(views()), by_hand(one, views()).float(), rtol=1e-4, atol=1e-4)


def test_without_a_residual_it_is_the_mean_of_the_views() -> None:
    one = adapter()
    with torch.no_grad():
        for parameter in one.spread[2].parameters():
            parameter.zero_()
    one.eval()
    torch.testing.assert_close(one.adapted(views()), 0.4 * views())
    flat = views().flatten(1)
    # The scale of the whole does not matter, that of a view does: the authors normalise after the concatenation.
    summed = (views() / flat.norm(dim=1)[:, None, None]).sum(dim=1) / math.sqrt(VIEWS)
    torch.testing.assert_close(one.logits(views()), 20 * summed @ one.vectors.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter(ratio=0.0).adapted(views()), views())


def test_the_authors_values() -> None:
    config, one = Config(), adapter()
    assert (config.views, config.ratio, config.dropout, config.smoothing) == (10, 0.6, 0.075, 0.2)
    assert one.gates.tolist() == [0.5] * VIEWS and one.reads == "views"
    wanted = WIDTH * VIEWS * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * WIDTH * VIEWS + WIDTH * VIEWS
    assert sum(parameter.numel() for parameter in one.parameters()) == wanted + VIEWS + 4 * WIDTH
    recipe = paper_recipe("pointclip", 16)
    assert recipe is not None
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.weight_decay) == ("sgd", 0.01, 0.9, 5e-4)
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs, recipe.warmup_rate) == (250, 32, 1, 1e-5)
    assert recipe.rate(0, 0, 10) == 1e-5 and recipe.rate(1, 0, 10) == 0.01
    assert adapter_class("pointclip") is InterViewAdapter


def test_smoothed_targets_sum_to_one() -> None:
    targets = smoothed_targets(torch.tensor([2, 0]), 5, 0.2)
    torch.testing.assert_close(targets[0], torch.tensor([0.05, 0.05, 0.8, 0.05, 0.05]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2))
    logits = torch.randn(2, 5)
    wanted = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(smoothed_cross_entropy(logits, torch.tensor([2, 0]), 0.2), wanted)
    plain = functional.cross_entropy(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(smoothed_cross_entropy(logits, torch.tensor([2, 0]), 0.0), plain)


def test_dropout_is_off_in_evaluation_and_repeats_itself() -> None:
    first, second = adapter(dropout=0.5), adapter(dropout=0.5)
    outputs = [[one.logits(views()) for _ in range(2)] for one in (first, second)]
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])
    with first.still():
        assert torch.equal(first.logits(views()), first.logits(views()))
    assert first.training


def labelled(count: int, seed: int) -> Labelled:
    """Clouds of which one view alone, another for each class, says the class; the text knows nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(NAMES)
    features = torch.randn(count, VIEWS, WIDTH, generator=generator)
    signs = functional.normalize(torch.randn(len(NAMES), WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    features[torch.arange(count), labels] += 6 * signs[labels]
    return Labelled(labels=labels, features=features)


def test_it_learns_what_the_zero_shot_model_cannot_know() -> None:
    train, held_out, test = labelled(96, 0), labelled(48, 1), labelled(300, 2)
    recipe = AdaptRecipe(learning_rate=0.01, epochs=40)
    assert train.features is not None and held_out.features is not None and test.features is not None
    both = [
        adapt("pointclip", Config(views=VIEWS), recipe, clip(), NAMES, ("{}",), train, held_out, seed=3) for _ in "ab"
    ]
    found = accuracy(both[0].adapter, test)
    before = accuracy(adapter(ratio=0.0), test)
    assert before.top1 < 0.5 and found.top1 > 0.75
    first, second = (one.adapter.state_dict() for one in both)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not both[0].adapter.training and 1 <= both[0].chosen["epoch"] <= 40


def test_a_trained_adapter_is_stored_and_read(tmp_path: Path) -> None:
    train, test = labelled(24, 0), labelled(30, 2)
    recipe = AdaptRecipe(learning_rate=0.01, epochs=2)
    adapted = adapt("pointclip", Config(views=VIEWS), recipe, clip(), NAMES, ("{}",), train, labelled(12, 1), seed=3)
    save(adapted, Folder(tmp_path))
    again = load_adapted(Folder(tmp_path), clip())
    first, second = accuracy(adapted.adapter, test), accuracy(again.adapter, test)
    assert torch.equal(first.right, second.right) and first.loss == second.loss
    with pytest.raises(SettingError, match="pointclip: views: got 4, expected 6"):
        accuracy(again.adapter, Labelled(labels=torch.tensor([0]), features=torch.zeros(1, 6, WIDTH)))


def test_what_it_refuses() -> None:
    with pytest.raises(SettingError, match="pointclip: views: got 4, expected 6, the views of a cloud"):
        adapter().prepare(Shots(torch.zeros(2, 6, WIDTH), torch.tensor([0, 1])))
    with pytest.raises(SettingError, match="batch_size: got 1, expected two clouds"):
        adapter().loss(views(1), torch.tensor([0]))
    for values in ({"ratio": 1.5}, {"dropout": 1.0}, {"smoothing": -0.1}, {"views": 0}):
        with pytest.raises(SettingError):
            Config(**values)  # type: ignore[arg-type]
