"""The losses by the closed forms of the paper's initial values and by torchvision."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from pipeline.models.glip.losses import (
    alignment_loss,
    box_loss,
    centerness,
    centerness_loss,
    generalized_overlaps,
)


def test_a_token_costs_what_it_costs_at_the_beginning() -> None:
    """A logit of -log 99: 7.5e-7 for a token without a box, 1.13 for one of the box's phrase."""
    logits, tokens = torch.full((1, 1, 1), -math.log(99)), torch.ones(1, 1, dtype=torch.bool)
    negative = float(alignment_loss(logits, torch.zeros(1, 1, 1), tokens))
    positive = float(alignment_loss(logits, torch.ones(1, 1, 1), tokens))
    assert negative == pytest.approx(0.75 * 0.01**2 * -math.log(0.99), rel=1e-3) == pytest.approx(7.538e-7, rel=1e-3)
    assert positive == pytest.approx(0.25 * 0.99**2 * -math.log(0.01), rel=1e-4) == pytest.approx(1.1284, rel=1e-4)


def test_the_alignment_loss_is_torchvisions_over_the_real_tokens() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 7, 5) * 3, torch.rand(2, 7, 5) > 0.8
    tokens = torch.tensor([[True] * 5, [True, True, False, False, False]])
    chosen = [sigmoid_focal_loss(logits[0], targets[0].float(), reduction="sum")]
    chosen.append(sigmoid_focal_loss(logits[1, :, :2], targets[1, :, :2].float(), reduction="sum"))
    assert float(alignment_loss(logits, targets, tokens)) == pytest.approx(float(sum(chosen)), rel=1e-5)


def test_boxes_that_do_not_meet_cost_more_than_one() -> None:
    """Unit squares at 0 and at 2 in a square of 3: 1 + 7/9."""
    first, second = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 2, 3, 3]])
    assert float(box_loss(first, second, torch.ones(1))) == pytest.approx(1 + 7 / 9, rel=1e-5)
    assert float(box_loss(first, first, torch.ones(1))) == pytest.approx(0, abs=1e-5)


def test_the_box_loss_is_torchvisions_with_its_gradient() -> None:
    torch.manual_seed(0)
    boxes, truth, weights = torch.rand(60, 4) * 20, torch.rand(60, 4) * 20, torch.rand(60)
    boxes[:, 2:] += boxes[:, :2]
    truth[:, 2:] += truth[:, :2]
    ours, theirs = (boxes.clone().requires_grad_() for _ in range(2))
    found = box_loss(ours, truth, weights)
    expected = (generalized_box_iou_loss(theirs, truth) * weights).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert generalized_overlaps(boxes, truth).abs().max() <= 1


def test_centerness_is_one_in_the_middle_and_falls_to_the_edges() -> None:
    box = torch.tensor([0.0, 0.0, 10.0, 20.0])
    points = torch.tensor([[5.0, 10.0], [2.0, 10.0], [2.0, 5.0], [0.0, 10.0], [-1.0, 10.0], [5.0, 30.0]])
    expected = [1, math.sqrt(2 / 8), math.sqrt(2 / 8 * 5 / 15), 0, 0, 0]
    assert centerness(points, box).tolist() == pytest.approx(expected)


def test_the_centerness_loss_is_the_cross_entropy_of_the_positive() -> None:
    logits, targets = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([0.8, 0.1, 0.0])
    positive = torch.tensor([True, True, False])
    by_hand = [
        -(t * math.log(1 / (1 + math.exp(-z))) + (1 - t) * math.log(1 - 1 / (1 + math.exp(-z))))
        for z, t in ((0.3, 0.8), (-2.0, 0.1))
    ]
    assert float(centerness_loss(logits, targets, positive)) == pytest.approx(sum(by_hand))


def test_what_takes_no_part_has_a_gradient_of_zero() -> None:
    """Weights of zero: extreme predictions and boxes without a meaning give no NaN."""
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [5.0, 5, 5, 5]], requires_grad=True)
    box_loss(boxes, torch.tensor([[0.0, 0, 1, 1]] * 2), torch.tensor([0.0, 0.0])).backward()
    assert boxes.grad is not None and boxes.grad.tolist() == [[0.0] * 4] * 2
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    alignment_loss(logits, torch.zeros(1, 1, 2), torch.zeros(1, 2, dtype=torch.bool)).backward()
    assert logits.grad is not None and not logits.grad.any() and logits.grad.isfinite().all()
