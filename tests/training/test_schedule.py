"""The learning rate against the values that the formula gives by hand."""

import pytest
import torch

from pipeline.training.schedule import learning_rate


def test_warm_up_and_cosine_by_hand() -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, steps=12) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)  # half-way between 4 and 12
    assert rates[10] == pytest.approx((1 - 2**-0.5) / 2)
    assert 0 < rates[11] < 0.05


def test_without_warm_up_it_is_torchs_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert learning_rate(step, peak=0.3, warmup_steps=0, steps=20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_a_warm_up_longer_than_the_run() -> None:
    assert learning_rate(1, peak=1.0, warmup_steps=10, steps=2) == 0.2


def test_rates_between_a_first_and_a_final_one() -> None:
    """As SLIP's recipe: a line from 1e-6 to the peak, then half a cosine down to 1e-5."""
    rates = [learning_rate(step, peak=3e-3, warmup_steps=10, steps=110, first=1e-6, final=1e-5) for step in range(111)]
    assert rates[0] == pytest.approx(1e-6 + (3e-3 - 1e-6) / 10) and rates[9] == pytest.approx(3e-3)
    assert rates[60] == pytest.approx((3e-3 + 1e-5) / 2) and rates[110] == pytest.approx(1e-5)


def test_drops_to_a_tenth() -> None:
    """ViLD's recipe: 0.32 from step 1,000 on, a tenth after 162,000 of 180,000 steps, and twice more."""
    at = [
        learning_rate(step, peak=0.32, warmup_steps=1000, steps=180_000, first=0.0032, milestones=(0.9, 0.95, 0.975))
        for step in (0, 999, 161_999, 162_000, 171_000, 175_500, 179_999)
    ]
    assert at == pytest.approx([0.0032 + (0.32 - 0.0032) / 1000, 0.32, 0.32, 0.032, 0.0032, 0.00032, 0.00032])


def test_a_power_of_the_remaining_part() -> None:
    """LSeg's recipe: 0.9, without warm-up."""
    rates = [learning_rate(step, peak=0.004, warmup_steps=0, steps=100, power=0.9) for step in (0, 50, 99)]
    assert rates == pytest.approx([0.004, 0.004 * 0.5**0.9, 0.004 * 0.01**0.9])


def test_an_exponential_is_torchs() -> None:
    """A factor of 0.96 after each of 50 epochs, here of one step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.96)
    for step in range(50):
        found = learning_rate(step, peak=0.3, warmup_steps=0, steps=50, exponential=0.96**50)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
