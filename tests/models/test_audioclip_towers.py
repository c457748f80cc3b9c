"""The log-mel towers against transformers' and timm's own, on copied weights."""

import pytest
import timm
import torch
from transformers import ClapAudioConfig, ClapAudioModelWithProjection, ClapFeatureExtractor

from pipeline.models.audioclip.towers import (
    HTSAT,
    NAMES,
    HtsatNetwork,
    LogMelTower,
    audio_tower,
    is_head,
    sound_input,
)
from pipeline.models.towers.log_mel import LogMel, LogMelConfig

TINY = ClapAudioConfig(
    patch_embeds_hidden_size=16, depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], hidden_size=128
)


def test_htsat_is_transformers_from_waveform_to_features() -> None:
    """Their feature extractor, model and projection."""
    torch.manual_seed(0)
    tower = LogMelTower(LogMelConfig(), HtsatNetwork(TINY, 24)).eval()
    theirs = ClapAudioModelWithProjection(ClapAudioConfig(**{**TINY.to_dict(), "projection_dim": 24})).eval()
    state = tower.network.state_dict()
    theirs.load_state_dict(
        {f"audio_{name}": one for name, one in state.items() if name.startswith(("model.", "projection."))}
    )
    sounds = 0.1 * torch.randn(2, 1, 480_000, generator=torch.Generator().manual_seed(1))
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="fusion")
    values = extractor(list(sounds[:, 0].numpy()), sampling_rate=48_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = theirs(input_features=values[:, :1].float()).audio_embeds
        found, penalty = tower(sounds)
    assert penalty is None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_channels_are_averaged() -> None:
    torch.manual_seed(0)
    tower = audio_tower("small", 8, 0.5).eval()
    sound = 0.1 * torch.randn(1, 2, 8000)
    torch.testing.assert_close(tower(sound)[0], tower(sound.mean(dim=1, keepdim=True))[0])


@pytest.mark.parametrize("name", ["htsat-tiny", "htsat-base"])
def test_sizes_of_htsat(name: str) -> None:
    """LAION-CLAP's audio models: 27.5 million numbers and an output of 768; 1,024 for the base."""
    with torch.device("meta"):
        network = HtsatNetwork(HTSAT[name], 512)
    count = sum(one.numel() for one in network.model.parameters())
    assert network.projection.linear1.in_features == network.model.audio_encoder.num_features
    assert count == pytest.approx(27.5e6, rel=0.01) if name == "htsat-tiny" else count > 60e6


def test_a_vision_transformer_of_timm_reads_bands_by_frames() -> None:
    torch.manual_seed(0)
    tower = audio_tower("timm:vit_tiny_patch16_224", 8, 1.0).eval()
    trunk = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=8, img_size=(128, 96)).eval()
    trunk.load_state_dict(tower.network.trunk.state_dict())
    sound = 0.1 * torch.randn(2, 1, 16_000)
    decibels = LogMel(tower.front.config)(sound[:, 0])
    assert decibels.shape == (2, 101, 128)
    expected = trunk(((decibels[:, :96] + 30) / 35).transpose(1, 2)[:, None])
    torch.testing.assert_close(tower(sound)[0], expected)


def test_a_convolutional_network_of_timm() -> None:
    tower = audio_tower("timm:resnet18", 8, 0.5).eval()
    assert tower(torch.zeros(1, 1, 8000))[0].shape == (1, 8)


@pytest.mark.parametrize("name", [*NAMES, "timm:vit_tiny_patch16_224", "timm:resnet18", "timm:convnext_atto"])
def test_heads_are_what_depends_on_the_width(name: str) -> None:
    """All other weights have the same shape for another width."""
    with torch.device("meta"):
        one, other = (audio_tower(name, width, 2.0).state_dict() for width in (8, 11))
    differing = {key for key in one if one[key].shape != other[key].shape}
    assert differing and differing <= {key for key in one if is_head(key)}
    assert one.keys() == other.keys() and sound_input(name).sample_rate in (16_000, 44_100, 48_000)
