"""Linear probes: scikit-learn's own answer, a search on a known curve, features against open_clip's tower."""

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.evaluation.data import CardData, open_data
from pipeline.evaluation.linear_probe import (
    CentredCoordinates,
    Linear,
    Probe,
    ProbeSets,
    by_regression,
    by_sgd,
    embed,
    fit,
    joined,
    linear_probe,
    part_of,
    random_view,
    search,
    split,
    tower_features,
)
from pipeline.evaluation.suite import Evaluations
from pipeline.loaders.images import ImageTransform
from pipeline.models.adapters.adapter import Shots
from pipeline.models.adapters.linear_probe import class_rows
from pipeline.models.clip import Clip
from pipeline.shards.snapshot import Snapshot


def clouds(rows: int = 240, classes: int = 4, width: int = 6, views: int = 1, seed: int = 0) -> Shots:
    """Overlapping clouds of points around a centre for each class."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.arange(rows) % classes
    points = centres[labels][:, None] + draw.normal(size=(rows, views, width))
    return Shots(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))


def test_the_search_takes_the_best_of_97_values_with_15_looks() -> None:
    looked: list[float] = []

    def score(logarithm: float) -> float:
        looked.append(logarithm)
        return -abs(logarithm - 1.3)

    assert search(score) == 1.25
    assert looked[:7] == [-6, -4, -2, 0, 2, 4, 6] and len(looked) == len(set(looked)) == 15
    assert search(lambda logarithm: 0.5) == -6  # of equals the strongest penalty
    assert search(lambda logarithm: logarithm) == 6


def test_a_known_validation_set_gives_scikit_learns_fit_of_both_together() -> None:
    train, validation, test = clouds(), clouds(80, seed=1), clouds(400, seed=2)
    fitted = by_regression(train, validation, 4, Probe())
    grid = 10.0 ** np.arange(-6, 6.01, 1 / 8)

    def score(strength: float) -> float:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model = LogisticRegression(C=strength, max_iter=1000)
            model.fit(train.features[:, 0].double(), train.labels)
        return float(model.score(validation.features[:, 0].double(), validation.labels))

    chosen = 10 ** fitted.chosen["log10_c"]
    assert np.isclose(grid, chosen).any()
    assert score(chosen) >= max(map(score, grid)) - 2 / 80
    both = joined(train, validation)
    peer = LogisticRegression(C=chosen, max_iter=1000, tol=1e-6).fit(both.features[:, 0].double(), both.labels)
    ours = fitted.logits(test.first_view()).softmax(dim=1)
    np.testing.assert_allclose(ours, peer.predict_proba(test.features[:, 0].double()), atol=2e-3)


def badly_scaled(rows: int, width: int, seed: int = 0) -> Shots:
    """Like a ConvNet's features after its ReLU: of scales over two decades, with means far from zero."""
    draw, world = np.random.default_rng(seed), np.random.default_rng(99)
    labels = np.arange(rows) % 3
    factors = world.normal(size=(3, 8))[labels] + draw.normal(size=(rows, 8))
    points = factors @ world.normal(size=(8, width)) + draw.normal(size=(rows, width)) + world.uniform(1, 20, width)
    scaled = np.maximum(points, 0) * 10 ** world.uniform(-1, 1, width)
    return Shots(torch.tensor(scaled, dtype=torch.float32)[:, None], torch.tensor(labels))


@pytest.mark.parametrize(("rows", "width"), [(60, 200), (300, 20)])
def test_centred_coordinates_have_scikit_learns_optimum(rows: int, width: int) -> None:
    """With fewer images than features and with more: the weights of a fit in the features themselves, converged."""
    shots = badly_scaled(rows, width)
    coordinates = CentredCoordinates.spanning(shots)
    inside = coordinates.of(shots).first_view()
    assert inside.shape == (rows, min(rows, width))

    def converged(inputs: Any) -> LogisticRegression:
        return LogisticRegression(C=1e-3, max_iter=100_000, tol=1e-9).fit(inputs, shots.labels.numpy())

    peer, ours = converged(shots.first_view().double().numpy()), converged(inside.numpy())
    weight, bias = coordinates.back(*class_rows(ours, 4))
    np.testing.assert_allclose(weight[:3], peer.coef_, rtol=0, atol=2e-4 * np.abs(peer.coef_).max())
    logits = Linear(weight, bias, {}).logits(shots.first_view())
    np.testing.assert_allclose(logits[:, :3].softmax(dim=1), peer.predict_proba(shots.first_view().double()), atol=1e-4)
    assert (logits[:, 3] == -math.inf).all()
    assert ours.n_iter_.max() < peer.n_iter_.max() / 2


def test_it_is_deterministic_and_a_class_without_images_never_wins() -> None:
    train = clouds(classes=2)
    first, second = (by_regression(train, None, 5, Probe(seed=3)) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and first.chosen == second.chosen
    logits = first.logits(clouds(40, classes=2, seed=1).first_view())
    assert logits.shape == (40, 5) and set(logits.argmax(dim=1).tolist()) <= {0, 1}
    assert (logits[:, 2:] == -math.inf).all()


def test_a_share_of_each_class_is_held_out() -> None:
    shots = clouds(103, classes=3)
    kept, held = split(shots, 0.25, seed=0)
    assert torch.bincount(held.labels).tolist() == [35 // 4, 34 // 4, 34 // 4]
    assert sorted(torch.cat([kept.features, held.features]).flatten().tolist()) == sorted(
        shots.features.flatten().tolist()
    )
    again, other = split(shots, 0.25, seed=0)[1], split(shots, 0.25, seed=1)[1]
    assert torch.equal(held.features, again.features) and not torch.equal(held.features, other.features)
    with pytest.raises(SettingError, match="held_out"):
        split(clouds(6, classes=3), 0.25, seed=0)


def test_a_single_class_is_refused() -> None:
    shots = clouds(20, classes=1)
    with pytest.raises(SettingError, match="two classes or more"):
        fit(shots, None, 3, Probe())


def test_sgd_is_the_recurrence_with_momentum_and_a_cosine() -> None:
    """One batch an epoch, so that the order does not matter: against the formulas, written out."""
    train = clouds(40, views=2)
    probe = Probe(protocol="slip", epochs=6, batch=64, learning_rate=0.3, seed=5)
    fitted = by_sgd(train, 4, probe)
    weight = (0.01 * torch.randn(4, 6, generator=torch.Generator().manual_seed(5))).numpy().astype(np.float64)
    bias, speeds, wanted = np.zeros(4), [np.zeros((4, 6)), np.zeros(4)], np.eye(4)[train.labels.numpy()]
    for epoch in range(6):
        inputs = train.features[:, epoch % 2].numpy()
        powers = np.exp(inputs @ weight.T + bias)
        slope = (powers / powers.sum(axis=1, keepdims=True) - wanted) / 40
        speeds = [0.9 * speeds[0] + slope.T @ inputs, 0.9 * speeds[1] + slope.sum(axis=0)]
        rate = 0.15 * (1 + math.cos(math.pi * epoch / 6))
        weight, bias = weight - rate * speeds[0], bias - rate * speeds[1]
    np.testing.assert_allclose(fitted.weight, weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.bias, bias, rtol=1e-4, atol=1e-5)


def test_the_towers_features_come_before_the_projection(clip: Clip) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    visual = cast(Any, clip.model).visual
    clip.eval()
    with torch.no_grad():
        own = tower_features(clip, images)
        assert own.shape == (3, visual.proj.shape[0])
        torch.testing.assert_close(own @ visual.proj, visual((images.float() - clip.mean) / clip.std))
        joint = tower_features(clip, images, "joint")
        torch.testing.assert_close(joint, functional.normalize(own @ visual.proj, dim=-1))


def test_an_unknown_tower_has_joint_features_only(colour_model: Any) -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert tower_features(colour_model, images, "joint").shape == (1, 3)
    with pytest.raises(SettingError, match="joint, for ColourModel"):
        tower_features(colour_model, images)


def test_random_views_are_a_function_of_seed_view_and_image() -> None:
    still = ImageTransform(size=(8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    views = [random_view(still, 0, view)(pixels) for view in range(3)]
    assert torch.equal(views[0], random_view(still, 0, 0)(pixels.copy()))
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[0], random_view(still, 1, 0)(pixels))


def test_views_are_embedded_beside_each_other(
    colour_model: Any, make_snapshot: Callable[..., Snapshot], row: Callable[..., Any]
) -> None:
    snapshot = make_snapshot([row(colour) for colour in ("red", "green", "blue") * 4])
    (prepared,) = ProbeSets(data=(snapshot.folder,)).prepare()
    assert prepared.classes == ("blue", "green", "red")  # all labels there are, sorted
    shots = embed(colour_model, prepared.train, Evaluations(), Probe(features="joint"), views=3)
    assert shots.features.shape == (12, 3, 3)
    assert shots.labels.tolist() == [2, 1, 0] * 4
    torch.testing.assert_close(shots.features[:, 0], shots.features[:, 2])  # any crop has the same colour


@pytest.mark.parametrize("protocol", ["clip", "slip"])
def test_colours_are_told_apart(
    protocol: Any, colour_model: Any, make_snapshot: Callable[..., Snapshot], row: Callable[..., Any]
) -> None:
    train = make_snapshot([row(colour) for colour in ("red", "green", "blue") * 10], name="train")
    test = make_snapshot([row(colour) for colour in ("red", "green", "blue")], name="test")
    probe = Probe(protocol=protocol, features="joint", views=1, learning_rate=0.5)
    held_out = ProbeSets(data=(f"colours={train.folder}",))
    named = ProbeSets(data=(f"colours={train.folder}",), test=(test.folder,), validation=(test.folder,))
    metrics = linear_probe(colour_model, named.prepare(), named.settings(), probe)
    assert metrics["linear_probe/colours/top1"] == 1 and metrics["linear_probe/colours/samples"] == 3
    assert metrics["linear_probe/colours/trained_on"] == 30
    metrics = linear_probe(colour_model, held_out.prepare(), held_out.settings(), probe)
    assert metrics["linear_probe/colours/top1"] == 1 and metrics["linear_probe/colours/samples"] == 6
    assert metrics["linear_probe/colours/trained_on"] == 24


def test_a_drawn_set_is_tested_and_its_pool_learnt_from() -> None:
    data = open_data("drawn_colours")
    pool, tested = part_of(data, "train"), part_of(data, "test")
    assert isinstance(data, CardData) and pool is not None and tested == data
    assert cast(Any, pool.source).split == "colours_train"
    assert part_of(open_data("drawn_val"), "train") is None and part_of(open_data("tuxpaint_stamps"), "train") is None
    (prepared,) = ProbeSets(data=("drawn_colours",), train_samples=20, test_samples=10).prepare()
    assert prepared.test is not None and prepared.test.data == data and prepared.train.data == pool
    first, other = (next(iter(one.samples())).image() for one in (prepared.train, prepared.test))
    assert first != other


def test_labels_that_are_no_classes_are_named(
    colour_model: Any, make_snapshot: Callable[..., Snapshot], row: Callable[..., Any]
) -> None:
    train = make_snapshot([row("red"), row("green")] * 3, name="train")
    test = make_snapshot([row("blue")], name="test")
    sets = ProbeSets(data=(train.folder,), test=(test.folder,))
    with pytest.raises(DataError, match="'blue'"):
        linear_probe(colour_model, sets.prepare(), sets.settings(), Probe(features="joint", held_out=0.4))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"held_out": 1.0}, "held_out"), ({"views": 0}, "views"), ({"momentum": 1.0}, "momentum"), ({"seed": -1}, "seed")],
)
def test_wrong_settings(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingError, match=field):
        Probe(**arguments)


def test_tests_and_data_go_together() -> None:
    with pytest.raises(SettingError, match="one for each of the 1"):
        ProbeSets(data=("drawn_shapes",), test=("drawn_val", "drawn_val"))


def test_logits_are_in_the_classifiers_precision() -> None:
    linear = Linear(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), {})
    assert linear.logits(torch.ones(3, 2)).dtype == torch.float64
