"""open_clip's vision transformer with learned rows beside the image's tokens, in its first layers or in all.

The first layer's rows follow the class token and the patches, and pass the layer norm before the transformer, as in
MaPLe. From the second layer on, each layer with its own prompts replaces the previous layer's output rows. The rows are
removed before pooling, so that towers with average pooling average only patches.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config import require


class VisionTower:
    """``model``'s frozen vision transformer.

    Raises:
        SettingError: not open_clip's own vision transformer (ResNets and timm's towers do not support learned rows).
    """

    def __init__(self, model: nn.Module) -> None:
        visual: Any = model.visual
        fits = isinstance(visual, VisionTransformer) and visual.transformer.batch_first
        require(fits, "model", type(visual).__name__, "a CLIP with open_clip's vision transformer, for learned rows")
        self.visual = visual
        self.width: int = visual.transformer.width
        self.layers = len(visual.transformer.resblocks)

    def features(self, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Features, not normalised: float [B, D].

        Args:
            images: float [B, 3, H, W], normalised.
            prompts: for each layer from the first on, float [b, width]; later layers pass the rows on.
        """
        visual = self.visual
        # Layer norm acts on each row alone, so the rows may be normalised separately.
        first = [visual.ln_pre(prompts[0]).expand(len(images), -1, -1)] if len(prompts) else []
        hidden = torch.cat([visual._embeds(images), *first], dim=1)
        for number, block in enumerate(visual.transformer.resblocks):
            if 1 <= number < len(prompts):
                rows = prompts[number].expand(len(images), -1, -1)
                hidden = torch.cat([hidden[:, : -rows.shape[1]], rows], dim=1)
            hidden = block(hidden)
        kept = hidden[:, : hidden.shape[1] - len(prompts[0])] if len(prompts) else hidden
        pooled, _ = visual._pool(kept)
        return cast(Tensor, pooled if visual.proj is None else pooled @ visual.proj)
