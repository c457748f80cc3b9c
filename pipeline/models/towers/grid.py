"""The grid of an image tower: the features of its cells, before they are pooled into one vector.

| tower | features of a cell |
| --- | --- |
| open_clip's ResNets | the last stage (``layer4``), before attention pooling |
| open_clip's vision transformers | the last block's patch tokens after the last norm, without the class token |
| timm's | ``forward_features`` without prefix tokens |

Images may have another size than in the tower's training: position embeddings of open_clip's vision transformers are
interpolated (bicubic), convolutions need nothing. timm's transformers are limited to the size that they were built for.
"""

from typing import Any, Self, cast

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.loaders.grid import GridTransform
from pipeline.models.towers import openclip
from pipeline.models.towers.weights import digest_of

RESNET_STRIDE = 32


class GridTower(nn.Module):
    """The image tower of an open_clip model without the layers behind its grid; images are uint8."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        """``model`` is an open_clip model, whose image tower loses its head.

        Raises:
            SettingError: a tower of another kind.
        """
        super().__init__()
        images = openclip.preprocessing(model)
        self.visual: Any = _without_head(model.visual)
        self.interpolation: str = "bilinear" if images["interpolation"] == "bilinear" else "bicubic"
        self.fill: tuple[int, ...] = tuple(round(255 * one) for one in images["mean"])
        self.register_buffer("mean", torch.tensor(images["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(images["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.stride, self.width = self._measured()

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float [B, D, H / stride, W / stride]."""
        return grid_features(self.visual, self.normalised(image))

    def normalised(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32, in the same memory format."""
        return image.float().sub_(self.mean).div_(self.std)

    def train(self, mode: bool = True) -> Self:
        """Batch normalisation keeps its statistics: batches of large images are small, and workers must agree."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def transform(self, size: tuple[int, int]) -> GridTransform:
        """How an image becomes the input of ``size`` (height, width)."""
        return GridTransform(size=size, stride=self.stride, fill=self.fill, interpolation=self.interpolation)

    def digest(self, size: tuple[int, int]) -> str:
        """SHA-256 hex of all that decides the features of an image at ``size``, for stored grids."""
        return digest_of(self, repr(self.transform(size)), repr(self.std.flatten().tolist()))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ``SettingError`` unless the tower takes images of ``size`` (height, width)."""
        fits = all(side >= self.stride and side % self.stride == 0 for side in size)
        require(fits, "image_size", size, f"multiples of {self.stride}, the side of a cell in pixels")
        if isinstance(self.visual, TimmModel):
            try:
                with torch.no_grad():
                    self.eval()(torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.mean.device))
            except (RuntimeError, AssertionError) as error:
                raise SettingError("image_size", size, f"a size that the tower takes ({error})") from error

    @torch.no_grad()
    def _measured(self) -> tuple[int, int]:
        """Pixels of a cell's side and numbers of its features."""
        if isinstance(self.visual, ModifiedResNet):
            return RESNET_STRIDE, int(self.visual.layer4[-1].conv3.out_channels)
        if isinstance(self.visual, VisionTransformer):
            return int(self.visual.patch_size[0]), int(self.visual.conv1.out_channels)
        was_training, size = self.training, self.visual.image_size
        found = self.eval()(torch.zeros(1, 3, *size, dtype=torch.uint8))
        self.train(was_training)
        return size[0] // found.shape[2], found.shape[1]


def fold_norms(module: nn.Module) -> None:
    """Fold batch normalisation into the convolutions before it, for inference: the same features in less time.

    A pair are two neighbours in the order of registration, in a sequence or called ``conv1`` and ``bn1``. Norms that
    bring an activation, as timm's, stay.
    """
    for child in module.modules():
        names = list(child._modules)
        for name, norm in zip(names, names[1:], strict=False):
            pair = child._modules[name], child._modules[norm]
            paired = isinstance(child, nn.Sequential) or norm == name.replace("conv", "bn")
            if paired and isinstance(pair[0], nn.Conv2d) and type(pair[1]) is nn.BatchNorm2d:
                child._modules[name] = fuse_conv_bn_eval(pair[0], pair[1])
                child._modules[norm] = nn.Identity()


def grid_features(visual: nn.Module, image: Tensor) -> Tensor:
    """Normalised float [B, 3, H, W] to float [B, D, h, w]: see the table above.

    Raises:
        SettingError: a tower of another kind.
    """
    if isinstance(visual, ModifiedResNet):
        hidden = visual.stem(image)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            hidden = stage(hidden)
        return cast(Tensor, hidden)
    if isinstance(visual, VisionTransformer):
        return _patches(visual, image)
    if isinstance(visual, TimmModel):
        return _timm_grid(visual.trunk, image)
    raise SettingError("checkpoint", type(visual).__name__, "a CLIP whose image tower is open_clip's or timm's")


def _patches(visual: Any, image: Tensor) -> Tensor:
    patches = visual.conv1(image)
    shape = patches.shape[2:]
    tokens = patches.flatten(2).transpose(1, 2)
    start = visual.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
    tokens = torch.cat([start, tokens], dim=1) + resized_positions(visual.positional_embedding, shape).to(tokens.dtype)
    tokens = visual.transformer(visual.ln_pre(tokens))
    if visual.attn_pool is None and not visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return cast(Tensor, tokens[:, 1:].transpose(1, 2).unflatten(2, tuple(shape)))


def resized_positions(positions: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Position embeddings [1 + s * s, D] of a square grid behind a class token, as [1 + h * w, D] for another one."""
    side = round((len(positions) - 1) ** 0.5)
    if (side, side) == tuple(shape):
        return positions
    grid = positions[1:].T.unflatten(1, (side, side))[None]
    resized = functional.interpolate(grid.float(), tuple(shape), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


def _timm_grid(trunk: Any, image: Tensor) -> Tensor:
    found: Tensor = trunk.forward_features(image)
    if found.ndim == 3:
        found = found[:, getattr(trunk, "num_prefix_tokens", 0) :]
        rows, columns = trunk.patch_embed.grid_size
        return found.transpose(1, 2).reshape(len(found), -1, rows, columns)
    return found.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else found


def _without_head(visual: Any) -> nn.Module:
    """The tower without what :func:`grid_features` does not read, so that all of its weights have gradients."""
    if isinstance(visual, ModifiedResNet):
        visual.attnpool = nn.Identity()
    elif isinstance(visual, VisionTransformer):
        visual.proj = None
        if visual.attn_pool is not None or visual.final_ln_after_pool:
            visual.attn_pool, visual.ln_post = None, nn.Identity()
    elif isinstance(visual, TimmModel):
        visual.head = nn.Identity()
        if hasattr(visual.trunk, "reset_classifier"):
            visual.trunk.reset_classifier(0, "")
        elif hasattr(visual.trunk, "head"):
            visual.trunk.head = nn.Identity()
    else:
        raise SettingError("checkpoint", type(visual).__name__, "a CLIP whose image tower is open_clip's or timm's")
    return cast(nn.Module, visual)
