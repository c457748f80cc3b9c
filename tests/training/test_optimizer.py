"""The optimiser against the update rule written out."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError
from pipeline.models.clip import Clip, Config
from pipeline.models.method import Method, build_method
from pipeline.models.towers.layers import Layer
from pipeline.training.checkpoint import Checkpoints, read_weights
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW, AdamWWithSgd, Sgd, make_optimizer, rate_scales, set_rates, take_step
from pipeline.training.run import Run, prepare


class TwoParameters(Method):
    """A weight that decays and a bias that does not."""

    def __init__(self) -> None:
        super().__init__(None)
        self.weight = torch.nn.Parameter(torch.tensor([[2.0]]))
        self.bias = torch.nn.Parameter(torch.tensor([3.0]))

    smallest = readers = training_step = None  # type: ignore[assignment]


TwoParameters.__abstractmethods__ = frozenset()


def test_one_step_by_hand() -> None:
    """The first step of Adam moves by the rate; decay takes rate x decay of the weight itself, before."""
    method = TwoParameters()
    optimizer = make_optimizer(AdamW(learning_rate=0.1, weight_decay=0.5), method)
    (3 * method.weight.sum() - 5 * method.bias.sum()).backward()
    optimizer.step()
    assert method.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    assert method.bias.item() == pytest.approx(3.0 + 0.1, rel=1e-5)


def test_momentum_by_hand() -> None:
    """v = 0.9 v + gradient + decay x weight, weight -= rate x v; a step that is left out changes nothing."""
    method = TwoParameters()
    optimizer = make_optimizer(Sgd(learning_rate=0.1, momentum=0.9, weight_decay=0.5), method)
    weight, bias, speed = 2.0, 3.0, [0.0, 0.0]
    for _ in range(2):
        (3 * method.weight.sum() - 5 * method.bias.sum()).backward()
        take_step(optimizer, torch.tensor(0.0))
        speed = [0.9 * speed[0] + 3 + 0.5 * weight, 0.9 * speed[1] - 5]
        weight, bias = weight - 0.1 * speed[0], bias - 0.1 * speed[1]
        assert (method.weight.item(), method.bias.item()) == pytest.approx((weight, bias))
    (torch.inf * method.weight.sum() + method.bias.sum()).backward()
    take_step(optimizer, torch.tensor(1.0))
    assert (method.weight.item(), method.bias.item()) == pytest.approx((weight, bias))


def test_nesterov_by_hand() -> None:
    """v = 0.9 v + gradient, weight -= rate x (gradient + 0.9 v)."""
    method = TwoParameters()
    optimizer = make_optimizer(Sgd(learning_rate=0.1, momentum=0.9, weight_decay=0.0, nesterov=True), method)
    weight, speed = 2.0, 0.0
    for _ in range(3):
        (3 * method.weight.sum()).backward()
        take_step(optimizer, torch.tensor(0.0))
        speed = 0.9 * speed + 3
        weight -= 0.1 * (3 + 0.9 * speed)
        assert method.weight.item() == pytest.approx(weight)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((Sgd, {"momentum": 1.0}), (Sgd, {"drops": (1.5,)}), (AdamW, {"beta1": 1.0})),
        *((Sgd, {"decay_power": 0.0}), (Sgd, {"decay_power": 0.9, "drops": (0.5,)})),
        *((Sgd, {"exponential": 0.0}), (AdamW, {"exponential": 0.5, "decay_power": 0.9})),
        (Sgd, {"nesterov": True, "momentum": 0.0}),
    ],
)
def test_settings_that_cannot_work(kind: type, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        kind(**settings)


def test_layers_step_at_their_own_rates(tiny_config: Config, run: Callable[..., Run], remember: Any) -> None:
    """The first step of Adam moves each weight by its rate, so the rates can be read from a run of one step."""
    optimizer = AdamW(learning_rate=1e-3, layer_decay=0.5, text_rate=0.1, weight_decay=0, epsilon=1e-30)
    settings = run(steps=1, warmup_steps=0, optimizer=optimizer)
    run_training(prepare(tiny_config, settings)[0], torch.device("cpu"), remember())
    torch.manual_seed(settings.seed)
    before, after = build_method(tiny_config).state_dict(), read_weights(Checkpoints(settings.output_folder).at(1))
    moved = {name: float((after[name] - tensor).abs().max()) for name, tensor in before.items()}
    expected = {"model.logit_scale": 1.0, "model.visual.proj": 1.0, "model.visual.conv1.weight": 0.125}
    expected |= {"model.text_projection": 0.1, "model.transformer.resblocks.1.mlp.c_fc.weight": 0.05}
    for name, scale in expected.items():
        assert moved[name] == pytest.approx(1e-3 * scale, rel=1e-2), name


def test_without_decay_the_groups_are_the_methods(tiny_config: Config) -> None:
    """So that checkpoints of earlier runs fit."""
    method = build_method(tiny_config)
    groups = make_optimizer(AdamW(), method).param_groups
    assert [group["params"] for group in groups] == [group["params"] for group in method.parameter_groups()]


@pytest.mark.parametrize(
    "bad",
    [
        {"layer_decay": 0},
        {"layer_decay": 1.1},
        {"image_rate": 0},
        {"text_rate": -1},
        {"learning_rate": 0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0},
        {"weight_decay": -1},
    ],
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        AdamW(**bad)


class Heard(Clip):
    """The tiny CLIP, whose scale stands for a third tower."""

    def layers(self) -> Mapping[str, Layer]:
        return {**super().layers(), "model.logit_scale": Layer("audio", 0)}


def test_a_third_tower_has_a_rate_of_its_own() -> None:
    method = Heard(Clip.smallest())
    scales = rate_scales(AdamW(image_rate=0.5, tower_rates={"audio": 0.1, "text": 0.2}), method)
    assert scales["model.logit_scale"] == 0.1 and set(scales.values()) == {0.1, 0.2, 0.5}
    with pytest.raises(SettingError, match="towers of the method: audio, image, text"):
        rate_scales(AdamW(tower_rates={"depth": 0.1}), method)


@pytest.mark.parametrize("settings", [{"tower_rates": {"audio": 0}}, {"text_rate": 1, "tower_rates": {"text": 1}}])
def test_rates_of_towers_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="tower_rates"):
        AdamW(**settings)


class TwoTowers(TwoParameters):
    """The bias is a tower of its own."""

    def layers(self) -> Mapping[str, Layer]:
        """One layer each."""
        return {"weight": Layer("text", 0), "bias": Layer("image", 0)}


TwoTowers.__abstractmethods__ = frozenset()


def test_two_optimisers_in_one() -> None:
    """AdamW moves one tower by its rate, gradient descent the other by rate x gradient; both by hand."""
    method = TwoTowers()
    own: dict[str, Any] = {"sgd_learning_rate": 0.2, "sgd_drops": (0.5,)}
    config = AdamWWithSgd(learning_rate=0.1, weight_decay=0.5, decay_power=1.0, **own)
    optimizer = make_optimizer(config, method)
    assert set_rates(optimizer, config, 0, 0, 10) == 0.1
    (3 * method.weight.sum() - 5 * method.bias.sum()).backward()
    take_step(optimizer, torch.tensor(0.0))
    assert method.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    assert method.bias.item() == pytest.approx(3.0 + 0.2 * 5)
    assert method.weight.grad is None or not method.weight.grad.any()
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert set_rates(optimizer, config, 5, 0, 10) == pytest.approx(0.05)
    after = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert [rates[id(method.weight)], rates[id(method.bias)]] == pytest.approx([0.1, 0.2])
    assert [after[id(method.weight)], after[id(method.bias)]] == pytest.approx([0.05, 0.02])
    # As in CLIP-ViL's code, the warm-up is AdamW's.
    assert set_rates(optimizer, config, 1, 4, 10) == pytest.approx(0.05)
    warming = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert [warming[id(method.weight)], warming[id(method.bias)]] == pytest.approx([0.05, 0.2])


def test_two_optimisers_skip_a_step_together_and_resume() -> None:
    config = AdamWWithSgd(learning_rate=0.1, sgd_learning_rate=0.2, sgd_momentum=0.9)
    ends = []
    for restart in (False, True):
        method = TwoTowers()
        optimizer = make_optimizer(config, method)
        for step in range(6):
            if restart and step == 3:
                state = optimizer.state_dict()
                optimizer = make_optimizer(config, method)
                optimizer.load_state_dict(state)
            before = [value.item() for value in method.parameters()]
            ((3 + step) * method.weight.sum() - 5 * method.bias.square().sum()).backward()
            take_step(optimizer, torch.tensor(float(step == 2)))
            assert (before == [value.item() for value in method.parameters()]) == (step == 2)
        ends.append([value.item() for value in method.parameters()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("towers", [(), ("audio",), ("image", "text")])
def test_two_optimisers_need_towers_for_both(towers: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="sgd_towers"):
        make_optimizer(AdamWWithSgd(sgd_towers=towers), TwoTowers())
    with pytest.raises(SettingError, match="sgd_towers"):
        AdamWWithSgd(image_rate=0.1)
    for field in ("sgd_learning_rate", "sgd_weight_decay", "sgd_momentum"):
        with pytest.raises(SettingError, match=field):
            AdamWWithSgd(**{field: -1.0})


@pytest.mark.parametrize("optimizer", [AdamW(), Sgd(), AdamWWithSgd(sgd_drops=(0.4,))])
def test_optimisers_go_through_json(optimizer: Any) -> None:
    assert from_json(Run, to_json(Run(optimizer=optimizer))).optimizer == optimizer
