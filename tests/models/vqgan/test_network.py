"""The network against transformers' JanusVQVAE with the same weights, and its names against released checkpoints."""

from typing import Any

import pytest
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

from pipeline.errors import SettingError
from pipeline.models.vqgan import Config
from pipeline.models.vqgan.network import VqganNetwork, VqganSizes


def as_ours(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Janus numbers the decoder's stages in the order of their use, taming by resolution."""
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(levels - 1 - int(parts[2]))
        found[".".join(parts)] = tensor
    return found


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 1, 3)])
def test_encoder_and_decoder_equal_transformers(multipliers: tuple[int, ...]) -> None:
    levels = len(multipliers)
    config = JanusVQVAEConfig(
        embed_dim=6, num_embeddings=10, latent_channels=12, base_channels=32, channel_multiplier=list(multipliers),
        num_res_blocks=2, num_patches=8,
    )  # fmt: skip
    peer = JanusVQVAE(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sizes = VqganSizes(
        resolution=32, channels=32, multipliers=multipliers, attention_at=(32 >> (levels - 1),), latent_channels=12,
        codes=10, code_width=6,
    )  # fmt: skip
    network = VqganNetwork(sizes).eval()
    network.load_state_dict(as_ours(peer.state_dict(), levels))
    images = torch.randn(2, 3, 48, 32)
    latents = network.encode(images)
    torch.testing.assert_close(latents, peer.quant_conv(peer.encoder(images)), rtol=1e-4, atol=1e-5)
    assert latents.shape == (2, 6, 48 // network.downsampling, 32 // network.downsampling)
    torch.testing.assert_close(
        network.decode(latents), peer.decoder(peer.post_quant_conv(latents)), rtol=1e-4, atol=1e-5
    )


def test_names_and_shapes_are_those_of_the_released_f16_model() -> None:
    """From the released configuration: 128 channels, multipliers 1 1 2 2 4, attention at 16 pixels."""
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in VqganNetwork(VqganSizes(codes=16_384)).state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.4.block.1.norm1.weight": (512,),
        "encoder.down.4.attn.1.q.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.proj_out.bias": (512,),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quantize.embedding.weight": (16_384, 256),
        "quant_conv.weight": (256, 256, 1, 1),
        "post_quant_conv.weight": (256, 256, 1, 1),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.4.attn.2.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = ("decoder.up.0.upsample", "encoder.down.4.downsample", "encoder.down.3.attn.0", "temb")
    assert not [name for name in shapes if any(part in name for part in absent)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multipliers", ()),
        ("channels", 48),
        ("codes", 1),
        ("dropout", 1.0),
        ("resolution", 100),
        ("attention_at", (7,)),
        ("image_size", 40),
        ("flip", 2.0),
        ("perceptual_layers", ()),
        ("perceptual_weight", -1.0),
        ("restart_after", 0),
        ("discriminator_start", -1),
        ("discriminator_layers", 7),
    ],
)
def test_bad_sizes_are_named(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=field):
        Config(**{field: value})
