"""CLIP-Adapter, Tip-Adapter, Tip-Adapter-F and the linear probe by hand-made cases, closed forms and scikit-learn."""

import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.models.adapters import clip_adapter, linear_probe, tip_adapter, tip_adapter_f, zero_shot
from pipeline.models.adapters.adapter import FrozenClip, Shots, adapter_class, adapter_names

TWO = ("this", "that")


def stand_in(vectors: Sequence[Sequence[float]], scale: float = 100.0) -> Any:
    """A CLIP that is nothing but its class vectors; these methods ask no more of it."""
    table = torch.tensor(vectors, dtype=torch.float64)
    return SimpleNamespace(
        scale=scale, features=table.shape[1], device=torch.device("cpu"), class_vectors=lambda *_: table
    )


def shots(features: Sequence[Sequence[float]], labels: Sequence[int]) -> Shots:
    return Shots(torch.tensor(features, dtype=torch.float64)[:, None], torch.tensor(labels))


def random_shots(count: int = 24, views: int = 1, classes: int = 3, width: int = 8, seed: int = 0) -> Shots:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    noise = torch.randn(count, views, width, generator=generator, dtype=torch.float64)
    return Shots(3 * centres[labels][:, None] + noise, labels)


def three() -> Any:
    generator = torch.Generator().manual_seed(5)
    return stand_in(functional.normalize(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=1).tolist())


NAMES = ("one", "two", "three")


def test_methods_are_found_by_name() -> None:
    names = ["clip_adapter", "cocoop", "coop", "ivlp", "linear_probe", "maple"]
    assert adapter_names() == [*names, "pointclip", "tip_adapter", "tip_adapter_f", "vpt", "zero_shot"]
    assert adapter_class("tip_adapter_f") is tip_adapter_f.TipAdapterF
    with pytest.raises(SettingError, match="one of clip_adapter, cocoop"):
        adapter_class("coop2")


# -- Tip-Adapter


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [(1.0, 5.5, (96.1108032, 81.0)), (1.17, 1.0, (96.7842744, 81.17))],
)
def test_tip_by_hand(alpha: float, beta: float, expected: tuple[float, float]) -> None:
    """Keys (1, 0) of class 0 and (.6, .8) of class 1; the image is (.6, .8)."""
    tip = tip_adapter.TipAdapter(
        tip_adapter.Config(alpha=alpha, beta=beta), stand_in([(0.8, 0.6), (0.0, 1.0)]), TWO, ()
    ).double()
    tip.prepare(shots([(1, 0), (0.6, 0.8)], [0, 1]))
    logits = tip.logits(torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    torch.testing.assert_close(logits, torch.tensor([expected], dtype=torch.float64), rtol=1e-8, atol=1e-7)


def test_more_evidence_for_a_class_raises_it() -> None:
    """The labels are multiplied with the exponential; inside of it, the third shot would lower its class."""
    tip = tip_adapter.TipAdapter(tip_adapter.Config(), stand_in([(0.8, 0.6), (0.0, 1.0)]), TWO, ()).double()
    tip.prepare(shots([(1, 0), (0.6, 0.8), (0.8, 0.6)], [0, 1, 0]))
    logits = tip.logits(torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    evidence = math.exp(-2.2) + math.exp(-0.22)
    torch.testing.assert_close(logits, torch.tensor([[96 + evidence, 81.0]], dtype=torch.float64))


def test_tips_limits() -> None:
    """alpha 0 is CLIP; beta 0 counts shots; a great beta is the nearest neighbour; a shot twice counts twice."""
    clip, few = three(), random_shots(9)
    images = random_shots(20, seed=3).first_view()

    def logits(alpha: float, beta: float, of: Shots = few) -> Tensor:
        tip = tip_adapter.TipAdapter(tip_adapter.Config(alpha=alpha, beta=beta), clip, NAMES, ()).double()
        tip.prepare(of)
        return tip.logits(images)

    plain = zero_shot.ZeroShotClassifier(zero_shot.Config(), clip, NAMES, ()).logits(images)
    torch.testing.assert_close(logits(0, 5.5), plain)
    torch.testing.assert_close(logits(2, 0), plain + 2 * 3)
    nearest = (functional.normalize(images, dim=1) @ functional.normalize(few.first_view(), dim=1).T).argmax(dim=1)
    assert torch.equal((logits(1e250, 400) - plain).argmax(dim=1), few.labels[nearest])
    twice = Shots(torch.cat([few.features, few.features]), torch.cat([few.labels, few.labels]))
    torch.testing.assert_close(logits(1, 3, twice) - plain, 2 * (logits(1, 3) - plain))


def test_views_are_averaged_before_they_are_normalised() -> None:
    tip = tip_adapter.TipAdapter(tip_adapter.Config(), stand_in([(1, 0), (0, 1)]), TWO, ()).double()
    views = torch.tensor([[[8.0, 0.0], [0.0, 6.0]], [[0.0, 1.0], [0.0, 3.0]]], dtype=torch.float64)
    tip.prepare(Shots(views, torch.tensor([0, 1])))
    torch.testing.assert_close(tip.keys, torch.tensor([[0.8, 0.6], [0.0, 1.0]], dtype=torch.float64))


def test_the_search_is_brute_force_and_sees_validation_alone() -> None:
    config = tip_adapter.Config(alphas=7, betas=9, largest_alpha=40.0)
    tip = tip_adapter.TipAdapter(config, three(), NAMES, ()).double()
    few, held = random_shots(6), random_shots(60, seed=7)
    tip.prepare(few)
    tip.select(few, held)
    best = (-1.0, 0.0, 0.0)
    for beta in [0.1 + i * 11.9 / 9 for i in range(9)]:
        for alpha in [0.1 + j * 39.9 / 7 for j in range(7)]:
            values = functional.one_hot(few.labels).double()
            unit = functional.normalize(held.first_view(), dim=1)
            keys = functional.normalize(few.first_view(), dim=1)
            logits = alpha * torch.exp(-beta * (1 - unit @ keys.T)) @ values + 100 * unit @ tip.vectors.T
            accuracy = (logits.argmax(dim=1) == held.labels).double().mean().item()
            best = max(best, (accuracy, -beta, -alpha))
    assert tip.choice.tolist() == pytest.approx([-best[2], -best[1]])
    found = (tip.logits(held.first_view()).argmax(dim=1) == held.labels).double().mean().item()
    assert found == pytest.approx(best[0]) and best[0] > 0.5


def test_the_authors_grid() -> None:
    """ImageNet: 200 betas below 7 and 20 alphas below 3, whose last are 6.9655 and 2.855."""
    assert tip_adapter.grid(7, 200)[-1] == pytest.approx(6.9655) and len(tip_adapter.grid(7, 200)) == 200
    assert tip_adapter.grid(3, 20)[-1] == pytest.approx(2.855)


def test_a_trained_cache_begins_as_the_cache_and_has_the_gradient_of_the_paper() -> None:
    clip, few, batch = three(), random_shots(9), random_shots(12, seed=4)
    config = tip_adapter.Config(alpha=1.3, beta=2.5)
    still = tip_adapter.TipAdapter(config, clip, NAMES, ()).double()
    trained = tip_adapter_f.TipAdapterF(config, clip, NAMES, ()).double()
    still.prepare(few)
    trained.prepare(few)
    images, labels = batch.first_view(), batch.labels
    torch.testing.assert_close(trained.logits(images), still.logits(images))
    trained.loss(images, labels).backward()
    # dLoss / dk_j = alpha beta / B sum_n (p_n[c_j] - y_n[c_j]) A_nj f_n
    unit = functional.normalize(images, dim=1)
    weights = torch.exp(-2.5 * (1 - unit @ still.keys.T))
    error = (still.logits(images).softmax(dim=1) - functional.one_hot(labels))[:, few.labels]
    expected = 1.3 * 2.5 / len(images) * (error * weights).T @ unit
    torch.testing.assert_close(trained.keys.grad, expected)
    assert [name for name, _ in trained.named_parameters()] == ["keys"]
    assert not any(parameter.requires_grad for parameter in still.parameters())


@pytest.mark.parametrize("kind", [tip_adapter.TipAdapter, tip_adapter_f.TipAdapterF])
def test_a_cache_is_restored_whatever_its_size(kind: type[tip_adapter.TipAdapter]) -> None:
    clip, few = three(), random_shots(9)
    first, second = (kind(tip_adapter.Config(), clip, NAMES, ()).double() for _ in range(2))
    first.prepare(few)
    first.choice.copy_(torch.tensor([2.0, 3.0]))
    second.restore(first.state_dict())
    images = random_shots(5, seed=8).first_view()
    assert torch.equal(first.logits(images), second.logits(images))
    with pytest.raises(SettingError, match="those that it was trained with"):
        first.bind(("x", "y", "z"), ())


@pytest.mark.parametrize(
    ("few", "said"),
    [
        (random_shots(6, width=7), "features of width 8"),
        (random_shots(8, classes=4), "labels from 0 to 2"),
    ],
)
def test_shots_of_something_else(few: Shots, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        tip_adapter.TipAdapter(tip_adapter.Config(), three(), NAMES, ()).prepare(few)


def test_shots_that_are_no_numbers() -> None:
    features = random_shots(4).features
    features[2, 0, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        Shots(features, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(SettingError, match="as many labels"):
        Shots(features[:3], torch.tensor([0, 1]))


# -- CLIP-Adapter


def adapter_by_hand(**options: Any) -> clip_adapter.ClipAdapter:
    config = clip_adapter.Config(reduction=2, **options)
    made = clip_adapter.ClipAdapter(config, stand_in([(1, 0), (0, 1)]), TWO, ()).double()
    for branch in (made.visual, made.textual):
        if branch is not None:
            branch[0].weight = nn.Parameter(torch.tensor([[1.0, -1.0]], dtype=torch.float64))
            branch[2].weight = nn.Parameter(torch.tensor([[2.0], [1.0]], dtype=torch.float64))
    return made


def test_clip_adapter_by_hand() -> None:
    """x = (4, 3) gives hidden 1, (2, 1), blended (3.6, 2.6); x = (3, 4) gives hidden 0 and keeps its direction."""
    logits = adapter_by_hand().logits(torch.tensor([(4.0, 3.0), (3.0, 4.0)], dtype=torch.float64)).detach()
    expected = torch.tensor([(81.0679, 58.5491), (60.0, 80.0)], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_clip_adapters_limits() -> None:
    images = random_shots(10, width=2, classes=2).first_view()
    clip = zero_shot.ZeroShotClassifier(zero_shot.Config(), stand_in([(1, 0), (0, 1)]), TWO, ())
    torch.testing.assert_close(adapter_by_hand(ratio=0.0).logits(images).detach(), clip.logits(images))
    alone = adapter_by_hand(ratio=1.0)
    assert alone.visual is not None
    adapted = alone.visual(images)
    expected = 100 * functional.normalize(adapted, dim=1)
    torch.testing.assert_close(alone.logits(images), expected)
    textual = adapter_by_hand(branch="textual", text_ratio=0.0)
    torch.testing.assert_close(textual.logits(images).detach(), clip.logits(images))


def test_the_text_branch_by_hand() -> None:
    """W rows (1, 0) and (0, 1): hidden 1 and 0, so (1, 0) becomes .2 (2, 1) + .8 (1, 0) = (1.2, .2)."""
    made = adapter_by_hand(branch="textual")
    length = math.hypot(1.2, 0.2)
    expected = torch.tensor([(1.2 / length, 0.2 / length), (0.0, 1.0)], dtype=torch.float64)
    torch.testing.assert_close(made.head(), expected)
    assert adapter_by_hand(branch="both").head() is None
    assert made.visual is None and len(list(made.parameters())) == 2


def test_the_final_relu_is_a_choice() -> None:
    made = adapter_by_hand(ratio=1.0, final_relu=False)
    assert made.visual is not None
    made.visual[2].weight = nn.Parameter(torch.tensor([[-2.0], [1.0]], dtype=torch.float64))
    logits = made.logits(torch.tensor([(4.0, 3.0)], dtype=torch.float64)).detach()
    torch.testing.assert_close(logits, 100 / math.sqrt(5) * torch.tensor([(-2.0, 1.0)], dtype=torch.float64))


def test_the_papers_number_of_parameters(clip: FrozenClip) -> None:
    made = clip_adapter.ClipAdapter(clip_adapter.Config(), clip, TWO, ("{}",))
    assert sum(parameter.numel() for parameter in made.parameters()) == 32 * 32 // 4 * 2


@pytest.mark.parametrize("kind", [zero_shot.ZeroShotClassifier, clip_adapter.ClipAdapter, tip_adapter.TipAdapter])
def test_names_that_a_prompt_would_cut(clip: FrozenClip, kind: type[Any]) -> None:
    """77 tokens: start, end, "a photo of a", the full stop and 70 of the name."""
    config = sys.modules[kind.__module__].Config()
    fits, long = "very " * 69 + "old", "very " * 70 + "old"
    kind(config, clip, ("dog", fits), ("a photo of a {}.",))
    with pytest.raises(SettingError, match="a name that fits 77 tokens with its prompts, which take 78"):
        kind(config, clip, ("dog", long), ("{}.", "a photo of a {}."))


# -- Linear probe


@pytest.mark.parametrize("noise", [1.0, 0.02, 30.0])  # the best C is in the middle, at the upper end, somewhere
def test_the_probe_is_scikit_learns_on_raw_features(noise: float) -> None:
    """The search written out: the first best of seven, then eight halvings in which the lower end wins a tie."""
    few, held = random_shots(12, views=2), random_shots(60, seed=2)
    few = Shots(few.features + noise * torch.randn(few.features.shape, dtype=torch.float64), few.labels)
    probe = linear_probe.LinearProbe(linear_probe.Config(), three(), NAMES, ()).double()
    probe.select(few, held)
    inputs, targets = few.features.flatten(0, 1).numpy(), few.labels.repeat_interleave(2).numpy()
    test, wanted = held.first_view().numpy(), held.labels.numpy()

    def fit(power: float) -> LogisticRegression:
        return LogisticRegression(C=10.0**power, max_iter=1000).fit(inputs, targets)

    peak = [6, 4, 2, 0, -2, -4, -6][int(np.argmax([fit(p).score(test, wanted) for p in (6, 4, 2, 0, -2, -4, -6)]))]
    low, high = peak - 1.0, peak + 1.0
    for _ in range(8):
        right = fit(low).score(test, wanted) < fit(high).score(test, wanted)
        final = high if right else low
        low, high = ((low + high) / 2, high) if right else (low, (low + high) / 2)
    assert probe.choices()["C"] == pytest.approx(10**final)
    theirs = fit(final)
    ours = probe.logits(held.first_view())
    torch.testing.assert_close(
        ours.log_softmax(dim=1), torch.from_numpy(theirs.predict_log_proba(test)), rtol=1e-4, atol=1e-4
    )


def test_the_search_of_the_probe_by_hand() -> None:
    """At equal scores the lower end stays, down to a tenth of the first C; the last winner counts, not the best."""
    asked: list[float] = []

    def level(power: float) -> tuple[float, float]:
        asked.append(power)
        return 0.5, power

    assert linear_probe._best(level, 8) == 5.0  # a decade below 1e6
    assert sorted(asked)[:7] == [-6, -4, -2, 0, 2, 4, 5]
    peak = linear_probe._best(lambda power: (1.0 if power == 0 else 0.5 - abs(power - 0.9) / 10, power), 1)
    assert peak == 1.0  # of -1 and 1 in the last halving, not 0 with its higher score
    assert linear_probe._best(lambda power: (-abs(power - 2), power), 0) == 2


@pytest.mark.parametrize("present", [(0, 1), (0, 2)])
def test_classes_without_shots_never_win(present: tuple[int, int]) -> None:
    few = random_shots(30)
    kept = torch.isin(few.labels, torch.tensor(present))
    some = Shots(few.features[kept], few.labels[kept])
    probe = linear_probe.LinearProbe(linear_probe.Config(halvings=0), three(), NAMES, ()).double()
    probe.select(some, some)
    predicted = probe.logits(some.first_view()).argmax(dim=1)
    assert set(predicted.tolist()) <= set(present)
    assert (predicted == some.labels).double().mean() > 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip_adapter.Config(ratio=1.5),
        lambda: clip_adapter.Config(reduction=0),
        lambda: tip_adapter.Config(alpha=-1),
        lambda: tip_adapter.Config(betas=0),
        lambda: tip_adapter.Config(largest_beta=0.1),
        lambda: linear_probe.Config(iterations=0),
    ],
)
def test_bad_settings(make: Callable[[], object]) -> None:
    with pytest.raises(SettingError):
        make()
