"""The whole network: the paper's sizes and initial values, and which part depends on which input."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from pipeline.errors import SettingError
from pipeline.loaders.grounding_prompts import SpanTokenizer
from pipeline.models.glip.config import LARGE, SMALLEST, Config
from pipeline.models.glip.network import AlignmentHead, EncodedText, FusedTower, GlipNetwork, TokenWeights, align
from pipeline.models.glip.text import text_settings

WIDTH, TEXT = 8, 6


@contextmanager
def without_memory() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("changes", "millions"),
    [({}, 231.8), ({"fusion": False}, 151.4), (LARGE, 430.4), ({**LARGE, "fusion": False}, 323.3)],
    ids=["GLIP-T", "GLIP-T (A)", "GLIP-L", "GLIP-L without fusion"],
)
def test_the_papers_models_have_their_sizes(changes: dict[str, Any], millions: float) -> None:
    """Without the classifier of fixed classes of the authors' code, which no loss reaches (256 x 80 weights)."""
    with without_memory():
        network = GlipNetwork(replace(Config(), **changes), BertConfig(attn_implementation="sdpa"))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_new_weights_have_the_authors_values() -> None:
    with without_memory():
        tower = FusedTower(Config(), BertConfig(attn_implementation="sdpa"))
    assert len(tower.fusions) == len(tower.texts) == len(tower.images) == 6
    made = FusedTower(Config(**SMALLEST), small_settings())
    assert [float(one.image_scale[0].detach()) for one in made.fusions] == [0.5, 0.5]
    head = AlignmentHead(256, 768)
    assert float(head.prior_bias.detach()) == pytest.approx(-4.59512) and not head.token_bias.any()
    assert float(head.log_scale.detach()) == 0 and head.level_scales.tolist() == [1.0] * 5
    assert float(head.box.weight.detach().std()) == pytest.approx(0.01, rel=0.1) and not head.box.bias.any()


def test_the_first_scale_multiplies_what_tokens_add_to_their_bias() -> None:
    torch.manual_seed(0)
    hidden, features = torch.randn(1, 3, TEXT), torch.randn(1, 5, WIDTH)
    plain, scaled = AlignmentHead(WIDTH, TEXT), AlignmentHead(WIDTH, TEXT, first_scale=10)
    scaled.load_state_dict({**plain.state_dict(), "log_scale": scaled.log_scale})
    with torch.no_grad():
        one, other = (head.token_weights(hidden) for head in (plain, scaled))
        added = [align(features, some) - some.bias[:, None] for some in (one, other)]
    torch.testing.assert_close(added[1], 10 * added[0])
    assert float(network(first_logit_scale=4.0).head.log_scale.detach().exp()) == pytest.approx(1 / 4)
    with pytest.raises(SettingError, match="first_logit_scale: got 0, expected more than 0"):
        Config(first_logit_scale=0)


def small_settings() -> Any:
    return text_settings(Config(**SMALLEST), SpanTokenizer.load("drawn"))


def network(**changes: Any) -> GlipNetwork:
    torch.manual_seed(0)
    return GlipNetwork(replace(Config(**SMALLEST), **changes), small_settings()).eval()


def inputs(count: int = 2, tokens: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    mask = torch.ones(count, tokens, dtype=torch.bool)
    mask[0, 5:] = False
    words = torch.randint(5, 60, (count, tokens))
    return torch.randn(count, 3, 64, 96), torch.where(mask, words, 0), mask


def logits(made: GlipNetwork, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, TokenWeights]:
    with torch.no_grad():
        levels = made.image(images)
        ((found, weights),) = made.compare(levels, [made.encode_text(tokens, mask)])
    return align(found.features, weights), found.moves, weights


def test_levels_have_the_cells_of_their_strides() -> None:
    levels = network().image(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize("fusion", [True, False])
def test_longer_padding_changes_nothing(fusion: bool) -> None:
    """The premise of padding texts to the longest of a batch."""
    made, (images, tokens, mask) = network(fusion=fusion), inputs()
    found, moves, _ = logits(made, images, tokens, mask)
    longer = [torch.cat([one, torch.zeros(2, 16, dtype=one.dtype)], dim=1) for one in (tokens, mask)]
    wide, same, _ = logits(made, images, *longer)
    torch.testing.assert_close(wide[..., :8][mask[:, None].expand_as(found)], found[mask[:, None].expand_as(found)])
    torch.testing.assert_close(same, moves)


@pytest.mark.parametrize("fusion", [True, False])
def test_samples_do_not_depend_on_their_batch(fusion: bool) -> None:
    made, (images, tokens, mask) = network(fusion=fusion), inputs()
    found, moves, _ = logits(made, images, tokens, mask)
    for number in range(2):
        one = slice(number, number + 1)
        alone, own, _ = logits(made, images[one], tokens[one], mask[one])
        torch.testing.assert_close(alone[0][:, mask[number]], found[number][:, mask[number]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own[0], moves[number], rtol=1e-4, atol=1e-5)


def test_texts_depend_on_images_with_fusion_alone() -> None:
    """And images on texts: the reason why features can be stored without fusion, and cannot with it."""
    images, tokens, mask = inputs()
    other, words = torch.flip(images, [3]), torch.where(mask, tokens % 50 + 6, 0)
    for fusion in (False, True):
        made = network(fusion=fusion)
        _, moves, weights = logits(made, images, tokens, mask)
        _, _, unchanged = logits(made, other, tokens, mask)
        assert torch.allclose(weights.vectors[1], unchanged.vectors[1], atol=1e-6) != fusion
        _, same, _ = logits(made, images, words, mask)
        assert torch.allclose(moves, same, atol=1e-7) != fusion


def test_one_pyramid_is_compared_with_several_texts_as_with_each() -> None:
    images, tokens, mask = inputs()
    for fusion in (True, False):
        made = network(fusion=fusion)
        with torch.no_grad():
            levels = made.image(images)
            texts = [made.encode_text(some, mask) for some in (tokens, torch.where(mask, tokens % 50 + 6, 0))]
            together = [align(found.features, weights) for found, weights in made.compare(levels, texts)]
            apart = [
                align(found.features, weights) for text in texts for found, weights in made.compare(levels, [text])
            ]
        for one, other in zip(together, apart, strict=True):
            assert torch.equal(one, other)


def test_logits_are_the_formula() -> None:
    """f . P(w / 2) / exp(s) + b . w + b_0 with unit w, one anchor and token at a time."""
    torch.manual_seed(0)
    head = AlignmentHead(WIDTH, TEXT)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        levels = [torch.randn(2, WIDTH, 2, 3), *(torch.randn(2, WIDTH, 1, 1) for _ in range(4))]
        hidden = torch.randn(2, 4, TEXT)
        found, weights = head.anchor_features(levels), head.token_weights(hidden)
        result = align(found.features, weights)
        for image in range(2):
            for token in range(4):
                unit = hidden[image, token] / hidden[image, token].norm()
                pixel = levels[0][image, :, 1, 2]
                projected = head.project.weight @ (unit / 2) + head.project.bias
                expected = pixel @ projected / head.log_scale.exp() + head.token_bias @ unit + head.prior_bias
                assert float(result[image, 5, token]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
        last = head.level_scales[4] * (head.box.weight @ levels[4][1, :, 0, 0] + head.box.bias)
        torch.testing.assert_close(found.moves[1, -1], last)
        assert found.centerness.shape == (2, 10)


def test_one_text_for_several_images_is_stored_once() -> None:
    one = EncodedText(torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool))
    many = one.expand(5)
    assert many.hidden.shape == (5, 3, 4) and many.hidden.data_ptr() == one.hidden.data_ptr()
