"""A narrow vision transformer for dense methods on small images: four blocks on patches of 8 pixels.

timm builds it and finds it under the name ``clipmill_small_vit`` once this module is imported.
"""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

# timm's registry looks for this name in the module of every model.
default_cfgs: dict[str, Any] = {}


@register_model
def clipmill_small_vit(pretrained: bool = False, **settings: Any) -> nn.Module:
    """timm's entry point; there are no pretrained weights."""
    if pretrained:
        raise ValueError("clipmill_small_vit has no pretrained weights")
    narrow = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**narrow, **settings})
    return model
