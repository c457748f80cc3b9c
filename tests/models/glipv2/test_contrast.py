"""The loss between images against sums written out pair by pair, in one process and in two ranks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.glipv2.contrast import (
    InterImageHead,
    RegionWords,
    choose_anchors,
    inter_image_loss,
    soft_cross_entropy,
)
from pipeline.models.glipv2.reader import NO_CLASS, PADDING

ANCHORS, TOKENS, WIDTH = 3, 4, 5
STAR, DISC = 11, 12
# Images 0 and 1 have prompts of classes ("star disc" with a padded token, "disc star"), image 2 a caption.
ANCHOR_LABELS = [[STAR, DISC, PADDING], [STAR, STAR, DISC], [NO_CLASS, NO_CLASS, PADDING]]
TOKEN_LABELS = [[NO_CLASS, STAR, DISC, PADDING], [DISC, STAR, STAR, NO_CLASS], [NO_CLASS] * 3 + [PADDING]]
OWN = [[(1,), (2,), ()], [(1, 2), (1, 2), (0,)], [(0, 1), (2,), ()]]


def images(first: int = 0, last: int = 3) -> RegionWords:
    random = torch.Generator().manual_seed(5)
    anchors = functional.normalize(torch.randn(3, ANCHORS, WIDTH, generator=random, dtype=torch.float64), dim=-1)
    tokens = functional.normalize(torch.randn(3, TOKENS, WIDTH, generator=random, dtype=torch.float64), dim=-1)
    positive = torch.zeros(3, ANCHORS, TOKENS, dtype=torch.bool)
    for image, rows in enumerate(OWN):
        for anchor, some in enumerate(rows):
            positive[image, anchor, list(some)] = True
    part = slice(first, last)
    return RegionWords(
        anchors=anchors[part].clone().requires_grad_(),
        tokens=tokens[part].clone().requires_grad_(),
        anchor_labels=torch.tensor(ANCHOR_LABELS)[part],
        token_labels=torch.tensor(TOKEN_LABELS)[part],
        positive=positive[part],
        images=torch.tensor([101, 102, 103])[part],
    )


def by_hand(some: RegionWords, scale: float) -> float:
    """Lists of all real anchors and tokens, and F for every pair of them."""
    anchors = [(i, a) for i in range(3) for a in range(ANCHORS) if ANCHOR_LABELS[i][a] != PADDING]
    tokens = [(i, t) for i in range(3) for t in range(TOKENS) if TOKEN_LABELS[i][t] != PADDING]

    def match(anchor: tuple[int, int], token: tuple[int, int]) -> bool:
        if anchor[0] == token[0]:
            return token[1] in OWN[anchor[0]][anchor[1]]
        label = ANCHOR_LABELS[anchor[0]][anchor[1]]
        return label >= 0 and label == TOKEN_LABELS[token[0]][token[1]]

    logits = torch.tensor(
        [[float(some.anchors[a].detach() @ some.tokens[t].detach()) / scale for t in tokens] for a in anchors]
    )
    wanted = torch.tensor([[float(match(a, t)) for t in tokens] for a in anchors])
    total = 0.0
    for scores, targets in ((logits, wanted), (logits.T, wanted.T)):
        for row, target in zip(scores, targets, strict=True):
            if target.sum():
                total -= float((row.log_softmax(0) * target / target.sum()).sum())
    return total / 2


@pytest.mark.parametrize("log_scale", [0.0, -1.0])
def test_all_pairs_by_hand(log_scale: float) -> None:
    some = images()
    scale = torch.tensor(log_scale, dtype=torch.float64)
    loss = inter_image_loss(some, scale, lambda values: values)
    assert float(loss.detach()) == pytest.approx(by_hand(some, float(scale.exp())), rel=1e-6)


def test_two_ranks_sum_to_one_process_with_gradients() -> None:
    """Each rank computes its own rows and columns only; what the other rank's loss says about them adds up."""
    alone = images()
    zero = torch.tensor(0.0, dtype=torch.float64)
    whole = inter_image_loss(alone, zero, lambda values: values)
    whole.backward()
    parts: Sequence[RegionWords] = (images(0, 1), images(1, 3))
    features = torch.cat([torch.cat([one.anchors, one.tokens], dim=1) for one in parts])
    numbers = torch.cat([torch.cat([one.images[:, None], one.anchor_labels, one.token_labels], dim=1) for one in parts])

    def gather(values: Tensor) -> Tensor:
        return features if values.is_floating_point() else numbers

    total = torch.stack([inter_image_loss(one, zero, gather) for one in parts]).sum()
    total.backward()
    torch.testing.assert_close(total, whole)
    for name in ("anchors", "tokens"):
        found = torch.cat([getattr(one, name).grad for one in parts])
        torch.testing.assert_close(found, getattr(alone, name).grad)


def test_captions_match_nothing_in_other_images() -> None:
    """Without classes, each image's targets are its own; with them, a class in two prompts is a match."""
    some = images()
    alone = replace(some, anchor_labels=torch.where(some.anchor_labels > 0, NO_CLASS, some.anchor_labels))
    zero = torch.tensor(0.0, dtype=torch.float64)
    losses = [float(inter_image_loss(one, zero, lambda values: values).detach()) for one in (some, alone)]
    assert abs(losses[0] - losses[1]) > 1e-3
    # One anchor and one token of the same class in each of two images, whose features are all equal: log 2 everywhere.
    unit = functional.normalize(torch.ones(2, 1, WIDTH), dim=-1)
    labels = torch.tensor([[STAR], [STAR]])
    same = RegionWords(unit, unit, labels, labels, torch.ones(2, 1, 1, dtype=torch.bool), torch.tensor([1, 2]))
    loss = inter_image_loss(same, torch.tensor(0.0), lambda values: values)
    assert float(loss) == pytest.approx(4 * 0.6931472 / 2, rel=1e-5)


def test_no_anchors_anywhere_are_no_loss_and_no_nan() -> None:
    some = images()
    none = replace(
        some, anchor_labels=torch.full_like(some.anchor_labels, PADDING), positive=torch.zeros_like(some.positive)
    )
    loss = inter_image_loss(none, torch.tensor(0.0), lambda values: values)
    loss.backward()
    assert float(loss.detach()) == 0
    assert some.anchors.grad is not None and some.tokens.grad is not None
    assert not some.anchors.grad.any() and not some.tokens.grad.any()


def test_soft_targets_are_torchs() -> None:
    logits = torch.randn(1, 2, 3, 4)
    positive = torch.rand(1, 2, 3, 4) < 0.4
    positive[0, 1] = False
    positive[0, 0, 0, 0] = True
    found = soft_cross_entropy(logits, positive, torch.ones(3, 4, dtype=torch.bool))
    target = positive[0, 0].flatten().float()
    expected = functional.cross_entropy(logits[0, 0].flatten()[None], (target / target.sum())[None])
    torch.testing.assert_close(found[0, 0], expected)
    assert float(found[0, 1]) == 0


def test_anchors_are_drawn_among_the_positive_ones_by_the_number_of_the_sample() -> None:
    """Every positive anchor is as probable as the others; fewer than requested are padded."""
    positive = torch.zeros(2000, 40, dtype=torch.bool)
    positive[:, 10:30] = True
    draws = torch.randint(0, 2**62, (2000,))
    places, real = choose_anchors(positive, draws, 5)
    assert bool(real.all()) and bool(positive.gather(1, places).all())
    assert all(len(set(row)) == 5 for row in places[:100].tolist())
    counts = places.flatten().bincount(minlength=40)[10:30]
    assert int(counts.min()) > 400 and int(counts.max()) < 600, "500 each"
    again = choose_anchors(positive[7:8], draws[7:8], 5)[0]
    assert torch.equal(again[0], places[7])
    few, real = choose_anchors(positive[:1, :12], draws[:1], 5)
    assert real.sum() == 2 and set(few[0, :2].tolist()) == {10, 11}


def test_the_head_gives_unit_vectors() -> None:
    head = InterImageHead(6, 7, 4)
    assert head.log_scale.detach() == 0
    for vectors, count in zip(head(torch.randn(2, 3, 6), torch.randn(2, 5, 7)), (3, 5), strict=True):
        assert vectors.shape == (2, count, 4)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, count))
