"""From logits to boxes of phrases: the score's formula, and the reference's rules one image and phrase at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.loaders.grounding import averaging_matrix
from pipeline.models.glip.assignment import make_anchors
from pipeline.models.glip.config import SMALLEST, Config, strides
from pipeline.models.glip.network import AnchorFeatures, TokenWeights
from pipeline.models.glip.phrases import CODER, Candidates, find_candidates, suppress, together

CONFIG = Config(**SMALLEST)
ANCHORS = make_anchors([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], strides(), 4.0, torch.device("cpu"))
COUNT, TOKENS = len(ANCHORS.boxes), 8


def made(images: int = 3, seed: int = 0) -> tuple[AnchorFeatures, TokenWeights]:
    torch.manual_seed(seed)
    features = AnchorFeatures(
        torch.randn(images, COUNT, 4), torch.randn(images, COUNT, 4) * 2, torch.randn(images, COUNT)
    )
    return features, TokenWeights(torch.randn(images, TOKENS, 4), torch.randn(images, TOKENS) - 1)


def positive(*phrases: tuple[int, ...]) -> np.ndarray:
    found = np.zeros((len(phrases), TOKENS), np.bool_)
    for row, tokens in zip(found, phrases, strict=True):
        row[list(tokens)] = True
    return found


def test_the_matrix_averages_over_the_tokens_of_each_images_phrases() -> None:
    found = averaging_matrix([positive((1, 2), (4,)), positive(()), np.zeros((0, 5), np.bool_)], TOKENS)
    assert found.shape == (3, 2, TOKENS)
    assert found[0, 0].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0] and found[0, 1, 4] == 1
    assert not found[1:].any() and found.isfinite().all()


def test_the_score_is_the_root_of_mean_probability_times_centerness() -> None:
    """Probabilities of 0.9 and 0.5, a centerness of 0.8: sqrt(0.7 * 0.8)."""
    features = AnchorFeatures(torch.zeros(1, COUNT, 4), torch.zeros(1, COUNT, 4), torch.full((1, COUNT), math.log(4)))
    bias = torch.full((1, TOKENS), -20.0)
    bias[0, 1:3] = torch.tensor([0.9, 0.5]).logit()
    weights = TokenWeights(torch.zeros(1, TOKENS, 4), bias)
    found = find_candidates(ANCHORS, features, weights, averaging_matrix([positive((1, 2))], TOKENS), CONFIG)
    assert found.scores[0, 0] == pytest.approx(math.sqrt(0.7 * 0.8), rel=1e-5)
    assert (ANCHORS.boxes == found.boxes[0, 0]).all(dim=1).sum() == 1, "no offset: the box is an anchor"


def by_hand(
    features: AnchorFeatures, weights: TokenWeights, image: int, phrases: np.ndarray, config: Config, size: int = 64
) -> list[tuple[float, int, list[float]]]:
    """The reference's rules for one image: threshold, best of each level, decode, clip, suppress, best of all."""
    logits = features.features[image] @ weights.vectors[image].T + weights.bias[image]
    boxes = CODER.decode_single(features.moves[image], ANCHORS.boxes).clamp(0, size)
    rows: list[tuple[float, int, list[float]]] = []
    first = 0
    for count in ANCHORS.counts:
        level = []
        for anchor in range(first, first + count):
            for number, tokens in enumerate(phrases):
                if tokens.any() and (p := float(logits[anchor][tokens].sigmoid().mean())) > config.least_score:
                    score = math.sqrt(p * float(features.centerness[image, anchor].sigmoid()))
                    level.append((score, number, boxes[anchor].tolist()))
        rows += sorted(level, reverse=True)[: config.level_detections]
        first += count
    kept: list[tuple[float, int, list[float]]] = []
    for row in sorted(rows, reverse=True):
        sides = row[2][2] - row[2][0], row[2][3] - row[2][1]
        same = [other for other in kept if other[1] == row[1]]
        far = all(
            float(box_iou(torch.tensor([o[2]]), torch.tensor([row[2]]))) <= config.detection_overlap for o in same
        )
        if min(sides) > 1e-2 and far:
            kept.append(row)
    return kept[: config.detections]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_the_references_rules_image_by_image(seed: int) -> None:
    """Three images with different numbers of phrases, one of them without tokens."""
    config = replace(CONFIG, level_detections=20, detections=12, least_score=0.3)
    features, weights = made(seed=seed)
    phrases = [positive((1, 2), (3,), ()), positive((1, 2, 3, 4)), positive((5,), (6, 7))]
    matrix = averaging_matrix(phrases, TOKENS)
    found = suppress(find_candidates(ANCHORS, features, weights, matrix, config), [(64, 64)] * 3, config)
    for image, one in enumerate(found):
        boxes, scores, numbers = one.boxes, one.scores, one.phrases
        expected = by_hand(features, weights, image, phrases[image], config)
        assert len(scores) == len(expected) > 3
        assert scores.tolist() == pytest.approx([row[0] for row in expected], rel=1e-4)
        assert numbers.tolist() == [row[1] for row in expected]
        torch.testing.assert_close(boxes, torch.tensor([row[2] for row in expected]), rtol=1e-4, atol=1e-3)


def test_a_phrase_without_tokens_is_never_found() -> None:
    features, weights = made()
    matrix = averaging_matrix([positive(()), positive((), (2,)), np.zeros((0, TOKENS), np.bool_)], TOKENS)
    config = replace(CONFIG, least_score=0.0)
    found = suppress(find_candidates(ANCHORS, features, weights, matrix, config), [(64, 64)] * 3, config)
    assert [len(one.boxes) for one in found][::2] == [0, 0]
    assert found[1].phrases.unique().tolist() == [1]


def test_boxes_stay_inside_and_the_threshold_precedes_the_centerness() -> None:
    """A phrase's probability counts, not its score: an anchor of 0.06 and a centerness of 0.01 stays."""
    features, weights = made(1)
    far = AnchorFeatures(features.features, features.moves, torch.full((1, COUNT), math.log(0.01)))
    low = TokenWeights(torch.zeros_like(weights.vectors), torch.full((1, TOKENS), 0.06).logit())
    matrix = averaging_matrix([positive((1,))], TOKENS)
    (one,) = suppress(find_candidates(ANCHORS, far, low, matrix, CONFIG), [(40, 50)], CONFIG)
    assert len(one.scores) and float(one.scores.max()) < 0.05
    assert float(one.boxes.min()) >= 0 and bool((one.boxes <= torch.tensor([50.0, 40.0, 50.0, 40.0])).all())
    below = replace(CONFIG, least_score=0.07)
    (none,) = suppress(find_candidates(ANCHORS, far, low, matrix, below), [(40, 50)], below)
    assert none.boxes.shape == (0, 4)


def test_prompts_keep_the_numbers_of_their_phrases() -> None:
    def part(phrase: int) -> Candidates:
        return Candidates(torch.zeros(1, 1, 4), torch.ones(1, 1), torch.tensor([[phrase]]))

    found: Tensor = together([part(1), part(0)], [0, 40]).phrases
    assert found.tolist() == [[1, 40]]
