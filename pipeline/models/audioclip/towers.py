"""Audio towers by name: waveforms to features.

| name | network | sound |
| --- | --- | --- |
| esresnext-fbsp | the paper's, see ``esresnext`` | 44.1 kHz, stereo |
| htsat-tiny, htsat-base | transformers' ``ClapAudioModel`` (HTS-AT, arXiv 2202.00874) and CLAP's projection | 48 kHz |
| timm:NAME | a model of timm on 128 mel bands, such as timm:vit_base_patch16_224 (as AST, arXiv 2104.01778) | 16 kHz |
| small | four convolutions, for runs of minutes | 16 kHz |

Towers of mel bands read the mean of a sound's channels. Their decibels are computed on the training device.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
from torch import Tensor, nn
from transformers import ClapAudioConfig, ClapAudioModel
from transformers.models.clap.modeling_clap import ClapProjectionLayer

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.models.audioclip.esresnext import EsResNextFbsp
from pipeline.models.losses import Gather, alone
from pipeline.models.towers.log_mel import LogMel, LogMelConfig

TIMM = "timm:"
LONGEST_HTSAT = 1024  # frames, the size of its square input times the folds of the bands


@dataclass(frozen=True, kw_only=True)
class SoundInput:
    """What a tower reads by default."""

    sample_rate: int
    channels: Literal[1, 2] = 1


CLAP_BANDS = LogMelConfig()
AST_BANDS = LogMelConfig(sample_rate=16_000, window=1024, hop=160, bands=128, low=20.0, high=8_000.0)
SMALL_BANDS = LogMelConfig(sample_rate=16_000, window=1024, hop=256, bands=64, low=50.0, high=8_000.0)
HTSAT = {
    "htsat-tiny": ClapAudioConfig(),
    "htsat-base": ClapAudioConfig(patch_embeds_hidden_size=128, depths=[2, 2, 12, 2], hidden_size=1024),
}
NAMES = ("esresnext-fbsp", *HTSAT, "small")


class LogMelTower(nn.Module):
    """Decibels of mel bands, then a network on them, float [B, frames, bands] to [B, D]."""

    def __init__(self, bands: LogMelConfig, network: nn.Module) -> None:
        super().__init__()
        self.front = LogMel(bands)
        self.network = network

    def forward(self, audio: Tensor, gather: Gather = alone) -> tuple[Tensor, Tensor | None]:
        """Float [B, C, T] in -1 to 1 to float [B, D]; no penalty."""
        return self.network(self.front(audio.mean(dim=1))), None


class HtsatNetwork(nn.Module):
    """transformers' HTSAT without fusion, and CLAP's two linear layers."""

    def __init__(self, config: ClapAudioConfig, width: int) -> None:
        super().__init__()
        settings = ClapAudioConfig(**{**config.to_dict(), "projection_dim": width})
        self.model = ClapAudioModel(settings)
        self.projection = ClapProjectionLayer(settings)

    def forward(self, decibels: Tensor) -> Tensor:
        """Float [B, frames, 64] to [B, width]."""
        pooled = self.model(input_features=decibels[:, None]).pooler_output
        return cast(Tensor, self.projection(pooled))


class TimmNetwork(nn.Module):
    """A model of timm on an image of one channel: bands by frames."""

    def __init__(self, name: str, width: int, bands: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        settings: dict[str, Any] = {"in_chans": 1, "num_classes": width}
        try:
            self.trunk = timm.create_model(name, img_size=(bands, frames), **settings)
        except TypeError:  # convolutional networks take images of any size, and no such setting
            self.trunk = timm.create_model(name, **settings)

    def forward(self, decibels: Tensor) -> Tensor:
        """Float [B, frames or more, bands] to [B, width]; surplus frames at the end are not read."""
        image = _centred(decibels[:, : self.frames]).transpose(1, 2)[:, None]
        return cast(Tensor, self.trunk(image))


class SmallNetwork(nn.Module):
    """Four convolutions of stride 2, the mean over time, and a linear layer that sees the frequencies."""

    def __init__(self, width: int, bands: int, channels: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        before = (1, *channels)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(one, two, 3, stride=2, padding=1), nn.GroupNorm(1, two), nn.ReLU())
                for one, two in zip(before, channels, strict=False)
            )
        )
        self.head = nn.Linear(channels[-1] * (bands // 2 ** len(channels)), width)

    def forward(self, decibels: Tensor) -> Tensor:
        """Float [B, frames, bands] to [B, width]."""
        features: Tensor = self.blocks(_centred(decibels)[:, None])
        return cast(Tensor, self.head(features.mean(dim=2).flatten(1)))


def _centred(decibels: Tensor) -> Tensor:
    """Decibels of usual sounds, -100 to 40, to about -2 to 2."""
    return (decibels + 30) / 35


def check_tower(name: str, seconds: float, sample_rate: int | None = None) -> None:
    """Raise ``SettingError`` unless :func:`audio_tower` can build the tower for sounds of this length."""
    if name.startswith(TIMM):
        model = name.removeprefix(TIMM)
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5) or ["vit_base_patch16_224"]
        require(timm.is_model(model), "audio_tower", name, f"timm:NAME, such as {', '.join(near)}")
    else:
        require(name in NAMES, "audio_tower", name, f"{', '.join(NAMES)}, or timm:NAME")
    if bands := _bands(name):
        rate = sample_rate or bands.sample_rate
        require(rate == bands.sample_rate, "audio_rate", sample_rate, f"{bands.sample_rate}, that of {name}")
    if name in HTSAT:
        longest = LONGEST_HTSAT * CLAP_BANDS.hop / CLAP_BANDS.sample_rate
        frames = CLAP_BANDS.frames(round(seconds * CLAP_BANDS.sample_rate))
        require(frames <= LONGEST_HTSAT, "audio_seconds", seconds, f"less than {longest:g}, for {name}")


def sound_input(name: str) -> SoundInput:
    """The rate and the channels that a tower reads."""
    bands = _bands(name)
    return SoundInput(sample_rate=bands.sample_rate) if bands else SoundInput(sample_rate=44_100, channels=2)


def audio_tower(name: str, width: int, seconds: float) -> nn.Module:
    """A tower with random weights for sounds of ``seconds``; see :func:`check_tower` for what can be wrong.

    Called with float [B, C, T] in -1 to 1 and a gather it gives features [B, width] and a penalty, a scalar or none.
    """
    bands = _bands(name)
    if bands is None:
        return EsResNextFbsp(width)
    if name in HTSAT:
        return LogMelTower(bands, HtsatNetwork(HTSAT[name], width))
    if name == "small":
        return LogMelTower(bands, SmallNetwork(width, bands.bands))
    frames = bands.frames(round(seconds * bands.sample_rate)) // 16 * 16  # whole patches
    require(frames > 0, "audio_seconds", seconds, "0.2 or more, for a tower of timm")
    try:
        network = TimmNetwork(name.removeprefix(TIMM), width, bands.bands, frames)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingError("audio_tower", name, f"a model of timm for {bands.bands} x {frames} ({error})") from error
    return LogMelTower(bands, network)


def is_head(name: str) -> bool:
    """Whether a weight of a tower belongs to its output layers, which depend on its width."""
    return name.startswith(("fc.", "network.projection.", "network.head.", "network.trunk.head", "network.trunk.fc."))


def _bands(name: str) -> LogMelConfig | None:
    if name == "esresnext-fbsp":
        return None
    return {"small": SMALL_BANDS}.get(name, CLAP_BANDS if name in HTSAT else AST_BANDS)
