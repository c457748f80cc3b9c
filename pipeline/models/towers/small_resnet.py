"""A narrow ResNet for detectors of small images that train in minutes on a CPU.

One basic block in each of the four stages, half of ResNet-18's depth and a quarter to a half of its width, behind a
stem of three small convolutions. timm builds it (``timm.create_model``) and finds it under the name
``clipmill_small_resnet`` once this module is imported.
"""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

# timm's registry looks for this name in the module of every model.
default_cfgs: dict[str, Any] = {}


@register_model
def clipmill_small_resnet(pretrained: bool = False, **settings: Any) -> nn.Module:
    """timm's entry point; there are no pretrained weights."""
    if pretrained:
        raise ValueError("clipmill_small_resnet has no pretrained weights")
    narrow = {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128), "stem_type": "deep", "stem_width": 12}
    narrow["zero_init_last"] = False  # the network is shallow, so all its blocks are active from the start
    model: nn.Module = timm.create_model("resnet18", **{**narrow, **settings})
    return model
