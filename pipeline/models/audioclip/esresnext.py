"""ESResNeXt-fbsp, the audio tower of AudioCLIP: a trained spectrogram and a ResNeXt-50 with attention gates.

Guzhov, Raue, Hees, Dengel, 2021, arXiv 2104.11587. The spectrogram's lower and middle and upper thirds are the three
colours of an image. Beside each of the four stages, a gate between 0 and 1 is computed from the stage's input and
multiplies its output; a fifth one multiplies the mean over all positions. The channels of the sound go through the
same weights one after the other, and their pooled features are added.

The modules have the names of the authors' code, and torchvision's in the trunk, so weights of both can be loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_weight
from torchvision.models.resnet import Bottleneck, ResNet

from pipeline.models.audioclip.fbsp import FbspTransform, framed
from pipeline.models.losses import Gather, alone

FRAME, HOP, TRANSFORM = 1654, 561, 2048  # samples at 44.1 kHz
BLACKMAN_HARRIS = (0.35875, 0.48829, 0.14128, 0.01168)
BANDS = 3
SMALLEST_POWER = 1e-18
IMAGENET = "ResNeXt50_32X4D_Weights.IMAGENET1K_V1"
# Channels before and after each gate, and its kernel; four are beside a stage, the fifth beside the pooling.
_GATES: tuple[tuple[int, int, tuple[int, int]], ...] = (
    *((64, 256, (3, 1)), (256, 512, (1, 5)), (512, 1024, (3, 1)), (1024, 2048, (1, 5))),
    (2048, 2048, (3, 5)),
)


class AttentionGate(nn.Module):
    """Max-pools its input to a size and gives numbers between 0 and 1, by a separable convolution."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        padding = kernel[0] // 2, kernel[1] // 2
        self.conv_depth = nn.Conv2d(before, before, kernel, padding=padding, groups=before)
        self.conv_point = nn.Conv2d(before, after, 1)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Float [B, before, H, W] to [B, after, *size]."""
        pooled = functional.adaptive_max_pool2d(features, list(size))
        return cast(Tensor, self.bn(self.conv_point(self.conv_depth(pooled))).sigmoid())


class EsResNextFbsp(nn.Module):
    """Sound at 44.1 kHz to features; ``blocks`` are the blocks of each stage (fewer in tests)."""

    window: Tensor

    def __init__(self, width: int, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        trunk: Any = ResNet(Bottleneck, list(blocks), groups=32, width_per_group=4)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(trunk, name))
        for number, gate in enumerate(_GATES, start=1):
            self.add_module(f"att{number}", AttentionGate(*gate))
        self.fbsp = FbspTransform(TRANSFORM // 2 + 1)
        self.fc = nn.Linear(2048, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        device = torch.get_default_device()  # torch takes two devices if none is given and the default is not the CPU
        window = torch.signal.windows.general_cosine(
            FRAME, a=BLACKMAN_HARRIS, sym=False, dtype=torch.float64, device=device
        ).float()
        self.register_buffer("window", window, persistent=False)

    def forward(self, audio: Tensor, gather: Gather = alone) -> tuple[Tensor, Tensor]:
        """Float [B, C, T] in -1 to 1 to features, float [B, width], and the penalty of the spectrogram's rows."""
        images, penalty = self.spectrograms(audio, gather)
        pooled = torch.stack([self._pooled(channel) for channel in images.unbind(1)])
        return self.fc(pooled.sum(dim=0)), penalty

    def spectrograms(self, audio: Tensor, gather: Gather = alone) -> tuple[Tensor, Tensor]:
        """Decibels, float32 [B, C, 3, 341, frames], and the penalty."""
        with torch.autocast(audio.device.type, enabled=False):
            with torch.no_grad():
                # The authors read 16-bit integers and map -32,768 to 32,767 onto -1 to 1.
                signal = (audio.to(self.window.dtype) * 32768 + 32768) * 2 / 65535 - 1
                frames = framed(signal, FRAME, HOP) * self.window
                frames = functional.pad(frames, ((TRANSFORM - FRAME) // 2,) * 2)
            real, imaginary, penalty = self.fbsp(frames, gather)
            power = (real.square() + imaginary.square()).transpose(-1, -2)
            rows = power.shape[-2] // BANDS
            bands = power[..., : BANDS * rows, :].unflatten(-2, (BANDS, rows))
            return 10 * torch.where(bands > 0, bands, SMALLEST_POWER).log10(), penalty

    def load_imagenet(self) -> None:
        """Start as torchvision's ResNeXt-50 of ImageNet, as the authors do: downloaded, or from torch's cache."""
        self.load_trunk(cast(Any, get_weight(IMAGENET)).get_state_dict(progress=False))

    def load_trunk(self, state: Mapping[str, Tensor]) -> None:
        """Load torchvision's weights; the gates' batch normalisations start with a bias of 1."""
        missing = self.load_state_dict({name: one for name, one in state.items() if name[:3] != "fc."}, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        for number in range(1, len(_GATES) + 1):
            gate = cast(AttentionGate, getattr(self, f"att{number}"))
            nn.init.ones_(gate.bn.weight)
            nn.init.ones_(gate.bn.bias)

    def _pooled(self, image: Tensor) -> Tensor:
        """One channel's decibels [B, 3, H, W] to [B, 2048]."""
        modules: Any = self
        features = functional.relu(modules.bn1(modules.conv1(image)))
        features = functional.max_pool2d(features, 3, stride=2, padding=1)
        for number in range(1, 5):
            after = getattr(self, f"layer{number}")(features)
            features = after * getattr(self, f"att{number}")(features, after.shape[-2:])
        pooled: Tensor = features.mean(dim=(2, 3), keepdim=True) * modules.att5(features, (1, 1))
        return pooled.flatten(1)
