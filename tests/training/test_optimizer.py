"""The optimiser against the update rule written out."""

import pytest
import torch

from pipeline.errors import SettingError
from pipeline.models.method import Method
from pipeline.training.optimizer import AdamW, make_optimizer


class TwoParameters(Method):
    """A weight that decays and a bias that does not."""

    def __init__(self) -> None:
        super().__init__(None)
        self.weight = torch.nn.Parameter(torch.tensor([[2.0]]))
        self.bias = torch.nn.Parameter(torch.tensor([3.0]))

    smallest = transforms = training_step = None  # type: ignore[assignment]


TwoParameters.__abstractmethods__ = frozenset()


def test_one_step_by_hand() -> None:
    """The first step of Adam moves by the rate; decay takes rate x decay of the weight itself, before."""
    method = TwoParameters()
    optimizer = make_optimizer(AdamW(learning_rate=0.1, weight_decay=0.5), method)
    (3 * method.weight.sum() - 5 * method.bias.sum()).backward()
    optimizer.step()
    assert method.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    assert method.bias.item() == pytest.approx(3.0 + 0.1, rel=1e-5)


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0}, {"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0}, {"weight_decay": -1}]
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        AdamW(**bad)
