"""The runner: what learns and what stays, what decides and what does not, and every wrong input."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError, SettingError
from pipeline.loaders.order import RandomStream, permutation
from pipeline.models.adapters import coop, tip_adapter, tip_adapter_f
from pipeline.models.adapters.adapter import Adapter, FrozenClip, adapter_class
from pipeline.training import adapt as runner
from pipeline.training.adapt import Accuracy, Labelled, accuracy, adapt
from pipeline.training.adapt_recipes import AdaptRecipe
from tests.training.few_shot import (  # noqa: F401
    LEARNERS,
    METHODS,
    NAMES,
    TEMPLATES,
    clip_fixture,
    make_clip,
    make_images,
    run,
    sets_fixture,
    short,
    small,
)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", METHODS)
def test_clip_stays_as_it_is_bit_for_bit(method: str, clip: FrozenClip, sets: Any) -> None:
    train, validation, test = sets
    before = {name: tensor.clone() for name, tensor in clip.method.state_dict().items()}
    adapted = run(clip, method, train, validation)
    accuracy(adapted.adapter, test)
    assert same(before, clip.method.state_dict()) and not clip.method.training
    assert not any(p.requires_grad or p.grad is not None for p in clip.method.parameters())
    learned = {id(parameter) for parameter in adapted.adapter.parameters()}
    assert not learned & {id(parameter) for parameter in clip.method.parameters()}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> FrozenClip:
    return make_clip(tmp_path_factory.mktemp("resnet"), image_size=32, layers=[1, 1, 1, 1], width=16, patch_size=None)


@pytest.mark.parametrize("method", [name for name in METHODS if adapter_class(name).reads == "features"])
def test_a_residual_tower_keeps_its_statistics(method: str, resnet: FrozenClip) -> None:
    train, validation = make_images(resnet, 6, 0, views=2), make_images(resnet, 6, 1)
    before = {name: tensor.clone() for name, tensor in resnet.method.state_dict().items()}
    assert any("running_mean" in name for name in before)
    adapted = run(resnet, method, train, validation, recipe=short(method, epochs=1))
    assert int(accuracy(adapted.adapter, validation).seen.sum()) == 6
    assert same(before, resnet.method.state_dict())


def test_a_worded_start_is_what_open_clip_says_of_a_residual_tower(resnet: FrozenClip) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    adapter = coop.CoOp(coop.Config(start="a photo of a"), resnet, NAMES, ())
    with torch.no_grad():
        found = adapter.logits(resnet.raw_features(images))
        texts = resnet.method.tokenizer([f"a photo of a {name}." for name in NAMES])
        features, words, scale = resnet.model(resnet.normalised(images), texts)[:3]
    torch.testing.assert_close(found, scale * features @ words.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_all_that_is_random(method: str, clip: FrozenClip, sets: Any) -> None:
    train, validation, _ = sets
    torch.manual_seed(torch.seed() % 2**32)  # the global state must not matter
    first = run(clip, method, train, validation)
    torch.rand(7)
    again = run(clip, method, train, validation)
    assert same(first.adapter.state_dict(), again.adapter.state_dict()) and first.history == again.history
    assert first.chosen == again.chosen
    if first.adapter.learns:
        other = run(clip, method, train, validation, seed=2)
        assert not same(first.adapter.state_dict(), other.adapter.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_test_images_decide_nothing(method: str, clip: FrozenClip, sets: Any) -> None:
    """They are no argument of ``adapt``; and measuring on poisoned ones changes nothing that was learned."""
    train, validation, test = sets
    assert set(inspect.signature(adapt).parameters) == {
        *("method", "config", "recipe", "clip", "classes", "templates", "train", "validation", "seed", "log")
    }
    adapted = run(clip, method, train, validation)
    before = {name: tensor.clone() for name, tensor in adapted.adapter.state_dict().items()}
    honest = accuracy(adapted.adapter, test)
    poisoned = Labelled(labels=(test.labels + 1) % 3, features=-1e3 * test.features, images=test.images[::-1])
    accuracy(adapted.adapter, poisoned)
    assert same(before, adapted.adapter.state_dict())
    again = accuracy(adapted.adapter, test)
    assert torch.equal(honest.right, again.right) and honest.loss == again.loss
    assert same(before, run(clip, method, train, validation).adapter.state_dict())


@pytest.mark.parametrize("method", LEARNERS)
def test_validation_images_choose_and_do_not_teach(method: str, clip: FrozenClip, sets: Any) -> None:
    """With the last epoch taken, other validation images leave the learned tensors as they are."""
    train, validation, test = sets
    recipe = short(method, select="last")
    first, second = (run(clip, method, train, held, recipe=recipe) for held in (validation, test))
    named = {name for name, _ in first.adapter.named_parameters()}
    states = ({name: one.adapter.state_dict()[name] for name in named} for one in (first, second))
    assert same(*states) and first.chosen["epoch"] == 3
    assert all("validation/top1" not in numbers for numbers in first.history)


@pytest.mark.parametrize("method", LEARNERS)
def test_the_best_epoch_by_validation_images_is_kept(method: str, clip: FrozenClip, sets: Any) -> None:
    train, validation, _ = sets
    states: list[dict[str, Tensor]] = []
    found: list[Adapter] = []
    real = runner._AdapterTraining.__init__

    def spy(self: Any, adapter: Adapter, *arguments: Any) -> None:
        found.append(adapter)
        real(self, adapter, *arguments)

    def log(numbers: Mapping[str, float], epoch: int) -> None:
        assert numbers["epoch"] == epoch == len(states) + 1
        states.append({name: p.detach().clone() for name, p in found[0].named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._AdapterTraining, "__init__", spy)
        adapted = run(clip, method, train, validation, recipe=short(method, epochs=6), log=log)
    scores = [(numbers["validation/top1"], -numbers["validation/loss"]) for numbers in adapted.history]
    best = scores.index(max(scores))
    assert adapted.chosen["epoch"] == best + 1 and len(states) == 6
    assert same(states[best], dict(adapted.adapter.named_parameters()))
    # What was kept is what was measured: with the first alpha and beta, the same accuracy again.
    if method != "tip_adapter_f":
        again = accuracy(adapted.adapter, validation)
        assert (again.top1, -again.loss) == scores[best]


def test_coop_learns_as_a_plain_loop_of_torch(clip: FrozenClip, sets: Any) -> None:
    """torch's SGD and its schedulers around the class vectors, in the same order of images."""
    train, validation, _ = sets
    one_view = Labelled(labels=train.labels, features=train.features[:, :1])
    recipe = AdaptRecipe(epochs=4, batch_size=5, learning_rate=0.1, select="last")
    adapted = adapt("coop", coop.Config(context=3), recipe, clip, NAMES, (), one_view, validation, seed=3)
    plain = coop.CoOp(coop.Config(context=3, seed=3), clip, NAMES, ())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for epoch in range(4):
        order = torch.from_numpy(permutation(3, RandomStream.FEW_SHOT_ORDER, epoch, 0, 12))
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = 1e-5
        for batch in order[:10].split(5):
            images = functional.normalize(one_view.features[batch, 0], dim=1)
            logits = clip.scale * images @ plain.class_vectors().T
            optimizer.zero_grad()
            functional.cross_entropy(logits, one_view.labels[batch]).backward()
            optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = 0.1
        else:
            cosine.step()
    torch.testing.assert_close(adapted.adapter.context, plain.context, rtol=1e-5, atol=1e-7)
    assert (adapted.adapter.context - coop.CoOp(coop.Config(context=3, seed=3), clip, NAMES, ()).context).norm() > 0.1


def test_every_view_is_used_and_every_image_once_an_epoch(clip: FrozenClip, sets: Any) -> None:
    train, validation, _ = sets
    adapter = coop.CoOp(coop.Config(), clip, NAMES, ())
    training = runner._AdapterTraining(adapter, AdaptRecipe(batch_size=4), train, validation, 5, None)
    seen = set()
    for epoch in range(40):
        batches = list(training._batches(epoch, 3))
        assert sorted(np.concatenate(batches).tolist()) == list(range(12))
        for numbers in batches:
            rows = training.images.view(numbers, epoch)
            assert torch.equal(rows, training.images.view(numbers, epoch))
            matches = (train.features[torch.from_numpy(numbers)] == rows[:, None]).all(dim=2)
            assert (matches.sum(dim=1) == 1).all()
            views = matches.int().argmax(dim=1).tolist()
            seen |= set(zip(numbers.tolist(), views, strict=True))
    assert len(seen) == 36
    assert not np.array_equal(next(training._batches(0, 3)), next(training._batches(1, 3)))


def test_random_crops_are_a_function_of_seed_epoch_and_image(clip: FrozenClip, sets: Any) -> None:
    train, validation, _ = sets
    images = runner._Images(adapter_class("vpt")(small("vpt"), clip, NAMES, TEMPLATES), train, AdaptRecipe(), 5)
    numbers = np.array([3, 1])
    first = images.view(numbers, 0)
    assert first.shape == (2, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, images.view(numbers[::-1].copy(), 0).flip(0))
    assert not torch.equal(first, images.view(numbers, 1))
    still = clip.method.transforms(train=False)
    assert torch.equal(images.plain(numbers), torch.stack([still.read(train.images[n]) for n in (3, 1)]))


def test_tips_alpha_and_beta_come_from_validation_images(clip: FrozenClip, sets: Any) -> None:
    train, validation, _ = sets
    for method, kind in (("tip_adapter", tip_adapter.TipAdapter), ("tip_adapter_f", tip_adapter_f.TipAdapterF)):
        adapted = run(clip, method, train, validation)
        assert isinstance(adapted.adapter, kind)
        alpha, beta, _ = adapted.adapter.search(validation.shots())
        assert (adapted.chosen["alpha"], adapted.chosen["beta"]) == (alpha, beta)
        assert adapted.adapter.choice.tolist() == [alpha, beta]
    fixed = adapt("tip_adapter", tip_adapter.Config(search=False), None, clip, NAMES, TEMPLATES, train, validation)
    assert fixed.chosen == {} and fixed.adapter.choice.tolist() == [1.0, 5.5]
    assert set(run(clip, "linear_probe", train, validation).chosen) == {"C"}


@pytest.mark.parametrize("method", ["tip_adapter_f", "linear_probe"])
def test_a_few_shots_teach_the_colours(method: str, clip: FrozenClip, sets: Any) -> None:
    """Even features of random weights distinguish colours."""
    train, validation, test = sets
    adapted = run(clip, method, train, validation, recipe=short(method, epochs=20, learning_rate=0.01))
    zero_shot = run(clip, "zero_shot", train, validation)
    assert accuracy(adapted.adapter, test).top1 > accuracy(zero_shot.adapter, test).top1 + 0.2


class Fixed(Adapter):
    """Gives its input as logits."""

    def build(self) -> None: ...

    def rebind(self) -> None: ...

    def logits(self, images: Tensor) -> Tensor:
        return images


def test_accuracy_by_hand() -> None:
    """Of equal logits the first wins; a class that does not occur does not count."""
    clip: Any = SimpleNamespace(device=torch.device("cpu"), features=3)
    adapter = Fixed(None, clip, NAMES, ())
    logits = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 3, 0], [1, 1, 1], [0, 2, 1]])
    found = accuracy(adapter, Labelled(labels=torch.tensor([0, 1, 1, 0, 1]), features=logits[:, None]))
    assert found.right.tolist() == [2, 2, 0] and found.seen.tolist() == [2, 3, 0]
    assert found.top1 == pytest.approx(4 / 5) and found.mean_per_class == pytest.approx((1 + 2 / 3) / 2)
    expected = functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0, 1]))
    assert found.loss == pytest.approx(float(expected))
    assert isinstance(found, Accuracy)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_evaluation_do_not_matter(method: str, clip: FrozenClip, sets: Any) -> None:
    train, validation, test = sets
    adapted = run(clip, method, train, validation)
    whole = accuracy(adapted.adapter, test)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FEATURES_AT_ONCE", "PIXELS_AT_ONCE", "PROMPTS_AT_ONCE"):
            patch.setattr(runner, name, 7)
        parts = accuracy(adapted.adapter, test)
    assert torch.equal(whole.right, parts.right) and whole.loss == pytest.approx(parts.loss, rel=1e-4)


def test_what_cannot_be(clip: FrozenClip, sets: Any) -> None:
    train, validation, test = sets
    alone = Labelled(labels=train.labels, images=train.images)
    blind = Labelled(labels=train.labels, features=train.features)
    wrong = Labelled(labels=train.labels + 1, features=train.features)
    wide = Labelled(labels=train.labels, features=torch.zeros(12, 1, 25))
    broken = Labelled(labels=train.labels, images=[b"no image"] * 12)
    one = Labelled(labels=torch.zeros(12, dtype=torch.int64), features=train.features)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: run(clip, "coop", alone, validation), SettingError, "train.*features of images, which CoOp reads"),
        (lambda: run(clip, "vpt", blind, validation), SettingError, "train.*pixels of images, which VisualPrompts"),
        (lambda: run(clip, "coop", wrong, validation), SettingError, "train.*labels from 0 to 2"),
        (lambda: run(clip, "coop", train, wrong), SettingError, "validation.*labels from 0 to 2"),
        (lambda: run(clip, "zero_shot", train, wide), DataError, "validation: features of width 25.*have 24"),
        (lambda: run(clip, "vpt", broken, validation), DataError, "cannot be read"),
        (lambda: run(clip, "linear_probe", one, validation), SettingError, "shots of two classes or more"),
        (lambda: run(clip, "coop", train, validation, seed=-1), SettingError, "seed: got -1"),
        (lambda: run(clip, "no_method", train, validation, recipe=AdaptRecipe()), SettingError, "one of clip_adapter"),
        (lambda: Labelled(labels=train.labels), SettingError, "features or images"),
        (lambda: Labelled(labels=train.labels[:0], images=[]), SettingError, "one image or more"),
        (lambda: Labelled(labels=train.labels, images=[b""]), SettingError, "images: got 1"),
        (lambda: Labelled(labels=train.labels, features=train.features / 0), DataError, "not finite"),
        (lambda: adapt("coop", coop.Config(), None, clip, NAMES, (), train, validation), SettingError, "a recipe"),
    ]
    for make, kind, said in cases:
        with pytest.raises(kind, match=said):
            make()


@pytest.mark.parametrize("method", LEARNERS)
def test_half_precision_learns_the_same_within_its_own(method: str, clip: FrozenClip, sets: Any) -> None:
    """What is learned stays float32; the first loss is that of float32 to two digits, and not to all."""
    low, full = (run(clip, method, sets[0], sets[1], recipe=short(method, precision=p)) for p in ("bf16", "fp32"))
    assert all(parameter.dtype == torch.float32 for parameter in low.adapter.parameters())
    first, other = low.history[0]["train/loss"], full.history[0]["train/loss"]
    assert first == pytest.approx(other, rel=0.05, abs=0.05) and first != other


@pytest.mark.parametrize("method", LEARNERS)
def test_a_rate_that_diverges_is_said_so(method: str, clip: FrozenClip, sets: Any) -> None:
    recipe = short(method, learning_rate=1e30, warmup_epochs=0, weight_decay=0.1, epochs=8)
    with pytest.raises(SettingError, match="learning_rate: got 1e\\+30.*stays finite"):
        run(clip, method, sets[0], sets[1], recipe=recipe)


def test_an_adapter_of_other_classes_is_measured_on_them(clip: FrozenClip, sets: Any) -> None:
    train, validation, test = sets
    adapted = run(clip, "coop", train, validation)
    adapted.adapter.bind(("cyan", "pink"), TEMPLATES)
    two = Labelled(labels=test.labels % 2, features=test.features)
    assert accuracy(adapted.adapter, two).right.shape == (2,)
    with pytest.raises(SettingError, match="data.*labels from 0 to 1"):
        accuracy(adapted.adapter, test)


def test_the_tests_know_every_method(root: Path = Path(__file__).parents[2]) -> None:
    files = {path.stem for path in (root / "pipeline" / "models" / "adapters").glob("*.py")}
    assert set(METHODS) <= files and len(METHODS) == 10
