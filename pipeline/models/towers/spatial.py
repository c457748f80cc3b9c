"""The projection of an image tower's grid into the space of texts, at each location.

A ResNet's map is the output of its last stage; the value and output projections of its attention pool, applied at each
location, put it where the pooled vector is (MaskCLIP: Zhou, Loy, Dai, 2021, arXiv 2112.01071). A vision transformer's
map is made of its patch tokens after the last norm, which the projection of the class token puts there.
"""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.models.towers.grid import RESNET_STRIDE


def check_spatial(visual: nn.Module, address: str) -> None:
    """Raise ``SettingError`` for a tower without such a map; ``address`` names the model."""
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None and not visual.final_ln_after_pool
    allowed = "a CLIP whose image tower is open_clip's ResNet or vision transformer, such as RN50 or ViT-B-32"
    require(plain or isinstance(visual, ModifiedResNet), "checkpoint", address, allowed)


def map_size(visual: Any, height: int, width: int) -> tuple[int, int]:
    """The height and width to resize an image of this size to.

    For a ResNet the nearest multiples of its stride; for a transformer, whose patches have positions, its own size.
    """
    if isinstance(visual, ModifiedResNet):
        rows, columns = (max(1, round(side / RESNET_STRIDE)) * RESNET_STRIDE for side in (height, width))
        return rows, columns
    own: tuple[int, int] = visual.image_size
    return own


def projected_map(visual: Any, found: Tensor) -> Tensor:
    """A grid of :mod:`~pipeline.models.towers.grid`, float [B, C, h, w], in the space of texts: [B, D, h, w], raw."""
    cells = found.movedim(1, -1)
    if isinstance(visual, ModifiedResNet):
        pool = visual.attnpool
        cells = functional.linear(cells, pool.v_proj.weight, pool.v_proj.bias)
        cells = functional.linear(cells, pool.c_proj.weight, pool.c_proj.bias)
    elif visual.proj is not None:
        cells = cells @ visual.proj
    return cells.movedim(-1, 1)
