"""A narrow Swin transformer for detectors of small images that train in minutes on a CPU.

One block in each of the four stages, a quarter of Swin-T's width, and windows of 4 x 4 cells. timm builds it
(``timm.create_model``) and finds it under the name ``clipmill_small_swin`` once this module is imported.
"""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

# timm's registry looks for this name in the module of every model.
default_cfgs: dict[str, Any] = {}


@register_model
def clipmill_small_swin(pretrained: bool = False, **settings: Any) -> nn.Module:
    """timm's entry point; there are no pretrained weights."""
    if pretrained:
        raise ValueError("clipmill_small_swin has no pretrained weights")
    narrow = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **{**narrow, **settings})
    return model
