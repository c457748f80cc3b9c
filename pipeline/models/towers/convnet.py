"""A plain stack of strided convolutions for images of 64 pixels: the image tower of ``clipmill-small``.

On two CPU cores it learns three times as much in a minute as the smallest ResNets and transformers of open_clip and
timm (docs/benchmarks.md): it is shallow, and its output layer sees the positions of objects. timm finds it as
``clipmill_convnet`` once this module is imported, and so does open_clip as a ``timm_model_name``.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

CHANNELS = (32, 64, 128, 192)
GRID = 4
"""Cells a side before the output layer: 64 pixels after four strides of two."""

# timm's registry looks for this name in the module of every model.
default_cfgs: dict[str, Any] = {}


class ConvNet(nn.Module):
    """Four convolutions of stride 2 and one of stride 1, batch-normalised, and a linear layer over all positions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = (3, *CHANNELS)
        blocks = [_block(before, after, stride=2) for before, after in zip(channels, channels[1:], strict=False)]
        self.blocks = nn.Sequential(*blocks, _block(CHANNELS[-1], CHANNELS[-1], stride=1))
        self.pool = nn.AdaptiveAvgPool2d(GRID)
        self.head = nn.Linear(CHANNELS[-1] * GRID**2, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float [B, 3, H, W] to float [B, num_classes]; H and W are 64, or are pooled to it."""
        features: Tensor = self.head(self.pool(self.forward_features(image)).flatten(1))
        return features

    def forward_features(self, image: Tensor) -> Tensor:
        """Normalised float [B, 3, H, W] to the map before pooling, float [B, 192, H/16, W/16]; timm's name."""
        features: Tensor = self.blocks(image)
        return features


@register_model
def clipmill_convnet(pretrained: bool = False, num_classes: int = 1000, **_: Any) -> ConvNet:
    """timm's entry point; there are no pretrained weights."""
    if pretrained:
        raise ValueError("clipmill_convnet has no pretrained weights")
    return ConvNet(num_classes)


def _block(before: int, after: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())
