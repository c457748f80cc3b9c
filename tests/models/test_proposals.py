"""The region proposer: its draws, its loss against a plain re-derivation, and boxes that come back to the image."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

from pipeline.errors import SettingError
from pipeline.models.proposals import Config, Proposals, generators, norm_layer, sample_balanced, unplaced


def built() -> Proposals:
    torch.manual_seed(0)
    return Proposals(Proposals.smallest())


def test_draws_are_of_both_kinds_and_of_the_generator() -> None:
    labels = torch.tensor([1.0] * 3 + [0.0] * 50 + [-1.0] * 20 + [1.0] * 30)
    chosen = set()
    for seed in range(10):
        positive, negative = sample_balanced(labels, 16, 0.5, torch.Generator().manual_seed(seed))
        assert len(positive) == len(negative) == 8 and (labels[positive] == 1).all() and (labels[negative] == 0).all()
        assert len(set(positive.tolist())) == 8
        chosen |= set(positive.tolist())
    assert len(chosen) > 25
    positive, negative = sample_balanced(labels[:20], 16, 0.5, torch.Generator())
    assert (len(positive), len(negative)) == (3, 13)
    positive, negative = sample_balanced(labels[:5], 16, 0.5, torch.Generator())
    assert (len(positive), len(negative)) == (3, 2)


@pytest.mark.parametrize("level_with_an_anchor", [False, True])
@torch.no_grad()
def test_the_loss_is_the_papers(level_with_an_anchor: bool) -> None:
    """Every anchor is drawn, so it can be written down: entropy over 2 * 10,000, Huber means by level.

    A box beside an anchor, of its size and at its height, has three offsets of exactly 0, which do not count.
    """
    method = Proposals(replace(Proposals.smallest(), anchors_drawn=10_000)).eval()
    network = method.model.proposer
    images = torch.randn(2, 3, 64, 64)
    features = method.model.features(images)
    proposed = network.propose(images, [(64, 64), (64, 50)], features)
    targets = [torch.tensor([[4.0, 6.0, 30.0, 28.0], [30.0, 30.0, 61.0, 60.0]]), torch.zeros(0, 4)]
    if level_with_an_anchor:
        inside = ((proposed.anchors[:, :2] >= 0) & (proposed.anchors[:, 2:] <= 62)).all(dim=1)
        targets[0] = proposed.anchors[inside][:1] + torch.tensor([1.0, 0.0, 1.0, 0.0])
    found = network.losses(proposed, targets, generators(torch.tensor([1, 2])), method.average)

    anchors, entropy = proposed.anchors, torch.zeros(())
    overlap = box_iou(targets[0], anchors)
    best, matched = overlap.max(dim=0)
    covers = (best >= 0.7) | (overlap == overlap.max(dim=1, keepdim=True).values).any(dim=0)
    for logits, truth, kept in (
        (proposed.logits[0], covers, covers | (best < 0.3)),
        (proposed.logits[1], torch.zeros_like(covers), torch.ones_like(covers)),
    ):
        entropy = (
            entropy + functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")[kept].sum()
        )
    assert float(found["objectness"]) == pytest.approx(float(entropy) / 20_000, rel=1e-4)

    boxes, objects = anchors[covers], targets[0][matched[covers]]
    sizes, wanted_sizes = boxes[:, 2:] - boxes[:, :2], objects[:, 2:] - objects[:, :2]
    shift = ((objects[:, 2:] + objects[:, :2]) - (boxes[:, 2:] + boxes[:, :2])) / 2 / sizes
    wanted = torch.cat([shift, (wanted_sizes / sizes).log()], dim=1)
    error = (proposed.moves[0][covers] - wanted).abs()
    huber = torch.where(error < 1 / 9, error**2 / 2, (error - 1 / 18) / 9)
    assert torch.allclose(
        huber, functional.smooth_l1_loss(error, torch.zeros_like(error), beta=1 / 9, reduction="none") / 9
    )
    ends = torch.tensor(proposed.counts).cumsum(0)
    level = torch.searchsorted(ends, torch.where(covers)[0], right=True)
    assert bool((wanted == 0).any()) == level_with_an_anchor
    counts = wanted != 0  # an offset of exactly 0 has the weight 0 in the sum and in the number
    total = sum(float((huber * counts)[level == one].sum() / counts[level == one].sum()) for one in level.unique())
    assert float(found["proposal_box"]) == pytest.approx(total, rel=1e-4)


def test_proposals_come_back_to_the_image_that_was_given() -> None:
    """In its own pixels, inside it, the best first, and alike whatever stands beside it in the batch."""
    method = built().eval()
    torch.manual_seed(0)
    images: list[Tensor] = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for size in ((40, 80), (100, 30))]
    both = method.propose(images)
    for image, (boxes, scores) in zip(images, both, strict=True):
        height, width = image.shape[1:]
        assert len(boxes) == len(scores) > 0 and (scores[:-1] >= scores[1:]).all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:].amax(dim=0) > 0.6 * torch.tensor([width, height])).all()  # not in the square's pixels
        (alone,) = method.propose([image])
        assert torch.allclose(alone[0], boxes, atol=1e-3)


def test_boxes_in_the_square_become_boxes_in_the_image() -> None:
    place = Config(image_size=64).resize(train=False).whole(32, 128)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 16.0], [10.0, 4.0, 20.0, 30.0]])
    assert unplaced(boxes, place).tolist() == [[0, 0, 128, 32], [20, 8, 40, 32]]


def test_anchors_and_losses_are_float32_whatever_the_features_are() -> None:
    """In bfloat16 a corner at 1000 pixels would be off by up to 4."""
    method = Proposals(Proposals.smallest()).eval()
    images, targets = torch.randn(1, 3, 64, 64), [torch.tensor([[4.0, 6.0, 30.0, 28.0]])]
    features = method.model.features(images)
    plain = method.model.proposer.propose(images, [(64, 64)], features)
    halved = {name: level.bfloat16() for name, level in features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = method.model.proposer.propose(images, [(64, 64)], halved)
        losses = method.model.proposer.losses(rough, targets, generators(torch.tensor([1])), method.average)
    assert rough.anchors.dtype == torch.float32 and torch.equal(rough.anchors, plain.anchors)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    again = method.model.proposer.losses(rough, targets, generators(torch.tensor([1])), method.average)
    assert {name: loss.item() for name, loss in losses.items()} == {name: loss.item() for name, loss in again.items()}


def test_batch_normalisation_sends_float32_for_what_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does for what is not: processes would not understand each other."""
    seen: list[Tensor] = []
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", lambda self, given: seen.append(given) or given)
    layer = norm_layer("batch")(8)
    assert isinstance(layer, torch.nn.SyncBatchNorm)
    for count in (2, 0):
        layer(torch.zeros(count, 8, 3, 3, dtype=torch.bfloat16))
    assert [given.dtype for given in seen] == [torch.bfloat16, torch.float32]


def test_a_backbone_that_timm_has_not() -> None:
    with pytest.raises(SettingError, match="backbone"):
        Proposals.check(Config(backbone="resnet51"))


def test_the_papers_network_can_be_built() -> None:
    """ResNet-50 has 23.5 million parameters, the pyramid 3.3, the proposal head 1.2."""
    with torch.device("meta"):
        method = Proposals(Config())
    count = sum(parameter.numel() for parameter in method.parameters())
    assert 26e6 < count < 30e6
    assert len(method.blocks()) == 4


def test_batch_normalisation_over_workers_needs_gpus() -> None:
    group, batch = Config(norm="group"), Config(norm="batch")
    with pytest.raises(SettingError, match="norm: 'batch' is not allowed; allowed: group where workers have no GPU"):
        Proposals.check_workers(batch, gpus=False)
    for config, gpus in ((batch, True), (group, True), (group, False)):
        Proposals.check_workers(config, gpus)
