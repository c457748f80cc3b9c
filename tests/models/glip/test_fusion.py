"""The fusion block against transformers' of Grounding DINO on the same weights, and its closed forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.glip.fusion import CrossFusion

WIDTH, HEADS = 32, 4
PAIRS = {
    "image_norm": "layer_norm_vision",
    "text_norm": "layer_norm_text",
    "query": "attn.vision_proj",
    "key": "attn.text_proj",
    "image_value": "attn.values_vision_proj",
    "text_value": "attn.values_text_proj",
    "to_image": "attn.out_vision_proj",
    "to_text": "attn.out_text_proj",
}


def blocks(scale: float = 0.3) -> tuple[CrossFusion, Any]:
    """Ours, and transformers' with its weights; every weight is random."""
    from transformers import GroundingDinoConfig
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer

    torch.manual_seed(1)
    ours = CrossFusion(WIDTH, WIDTH, 64, HEADS, scale=scale).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = GroundingDinoConfig(d_model=WIDTH, encoder_ffn_dim=128, encoder_attention_heads=2 * HEADS)
    theirs = GroundingDinoFusionLayer(config).eval()
    state = {"vision_param": ours.image_scale.detach(), "text_param": ours.text_scale.detach()}
    for name, other in PAIRS.items():
        module = getattr(ours, name)
        state |= {f"{other}.{part}": value.detach() for part, value in module.named_parameters()}
    theirs.load_state_dict(state)
    return ours, theirs


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    return torch.randn(2, 21, WIDTH, dtype=dtype), torch.randn(2, 8, WIDTH, dtype=dtype), mask


def test_it_is_grounding_dinos_fusion_with_the_same_weights() -> None:
    """Both directions, with padding in the first text; its masks are True for padding."""
    ours, theirs = blocks()
    image, text, mask = inputs()
    with torch.no_grad():
        found, expected = ours(image, text, mask), theirs(image, text, attention_mask_text=~mask)
    torch.testing.assert_close(found[0], expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1][0], rtol=1e-5, atol=1e-5)


def test_gradients_are_grounding_dinos_as_well() -> None:
    ours, theirs = blocks()
    image, text, mask = inputs()
    for one, result in ((ours, ours(image, text, mask)), (theirs, theirs(image, text, attention_mask_text=~mask))):
        pixels, tokens = result if one is ours else (result[0][0], result[1][0])
        (pixels.square().sum() + tokens[mask].square().sum()).backward()
    named = dict(theirs.named_parameters())
    for name, other in PAIRS.items():
        for part, parameter in getattr(ours, name).named_parameters():
            torch.testing.assert_close(parameter.grad, named[f"{other}.{part}"].grad, rtol=1e-4, atol=1e-4)


def test_padding_tokens_change_nothing() -> None:
    """Neither their values nor their number: the image and the real tokens stay the same to the last bits."""
    ours, _ = blocks()
    image, text, mask = inputs()
    other = torch.cat([text, torch.full((2, 8, WIDTH), 1e4)], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 8, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        found, expected = ours(image, other, longer), ours(image, text, mask)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][:, :8], expected[1], rtol=1e-5, atol=1e-6)


def test_without_layer_scale_it_is_layer_norm_and_not_the_identity() -> None:
    ours, _ = blocks()
    with torch.no_grad():
        ours.image_scale.zero_()
        ours.text_scale.zero_()
        image, text, mask = inputs()
        pixels, tokens = ours(image, text, mask)
        torch.testing.assert_close(pixels, ours.image_norm(image))
        torch.testing.assert_close(tokens, ours.text_norm(text))
    assert not torch.allclose(pixels, image, atol=0.1)


def test_new_blocks_have_the_authors_weights() -> None:
    """Layer scales of one over the number of blocks, biases of zero, Xavier's range."""
    block = CrossFusion(256, 768, 2048, 8, scale=1 / 6)
    assert block.image_scale.unique().tolist() == block.text_scale.unique().tolist() == [pytest.approx(1 / 6)]
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 6 and not any(module.bias.any() for module in linear)
    limit = (6 / (256 + 2048)) ** 0.5
    assert 0.99 * limit < float(block.query.weight.detach().abs().max()) <= limit


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_bfloat16_is_finite_and_near(size: float) -> None:
    ours, _ = blocks()
    image, text, mask = inputs()
    with torch.no_grad():
        expected = ours(image * size, text * size, mask)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(image * size, text * size, mask)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.1)


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    block = CrossFusion(WIDTH, WIDTH, 64, HEADS, scale=1.0, dropout=0.5)
    image, text, mask = inputs()
    with torch.no_grad():
        assert not torch.equal(block(image, text, mask)[0], block(image, text, mask)[0])
        block.eval()
        assert torch.equal(block(image, text, mask)[0], block(image, text, mask)[0])
