"""How unlike two images look: distances between features of a frozen network.

With features f_l of chosen layers l, of unit length at each position p, and weights w_l of their channels c,

    d(x, y) = sum_l mean_p sum_c w_lc (f_lpc(x) - f_lpc(y))^2

VGG-16 with the weights of LPIPS is LPIPS (Zhang, Isola, Efros, Shechtman, Wang 2018, arXiv 1801.03924); without them
every w is 1.
"""

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.cache import FileCache
from pipeline.models.towers.feature_network import FeatureNetwork
from pipeline.models.towers.weights import read_any_weights
from pipeline.shards.storage import split_file

LPIPS_LAYERS = ("features.3", "features.8", "features.15", "features.22", "features.29")
"""The layers of timm's vgg16 that LPIPS compares: the last activation before each pooling, and the last one."""
_LINEAR = re.compile(r"^lin(\d)\.model\.1\.weight$")


class PerceptualDistance(nn.Module):
    """The distance above, as a loss: frozen, and part of no checkpoint.

    Raises:
        SettingError: no such network, no such layer, or weights that do not fit the layers.
        DataError: a damaged file.
    """

    def __init__(self, address: str, layers: Sequence[str], linear: str = "", field: str = "perceptual") -> None:
        """``linear`` is a file with the weights of LPIPS, in the layout of its authors."""
        super().__init__()
        self.network, self.names = FeatureNetwork(address, field), tuple(layers)
        for name in self.names:
            self.network.module(name)
        for number, weight in enumerate(_linear_weights(linear, f"{field}_linear") if linear else []):
            self.register_buffer(f"weight{number}", weight)
        found = len(list(self.buffers(recurse=False)))
        fits = found in (0, len(self.names))
        require(fits, f"{field}_linear", linear, f"weights of {len(self.names)} layers; it has those of {found}")

    def state_dict(self, *args: Any, destination: Any = None, **settings: Any) -> Any:
        """Nothing."""
        return {} if destination is None else destination

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches float [N, 3, H, W] from 0 to 1 to float32 [N]; gradients reach the first one."""
        with torch.no_grad():
            wanted = self.network.layers(others, self.names)
        weights: list[Tensor | None] = [*self.buffers(recurse=False)] or [None for _ in self.names]
        found = self.network.layers(images, self.names)
        parts = [_distance(*three) for three in zip(found, wanted, weights, strict=True)]
        return torch.stack(parts).sum(dim=0)


def _distance(one: Tensor, other: Tensor, weight: Tensor | None) -> Tensor:
    """Of features [N, C, ...] of one layer, with weights [C] of its channels: float32 [N]."""
    units = (functional.normalize(features.float(), dim=1, eps=1e-10) for features in (one, other))
    squares = torch.sub(*units).square().flatten(2)
    if weight is None:
        return squares.sum(dim=1).mean(dim=1)
    require(
        len(weight) == squares.shape[1], "perceptual_linear", len(weight), f"{squares.shape[1]} channels of a layer"
    )
    return torch.einsum("ncp,c->np", squares, weight).mean(dim=1)


def _linear_weights(file: str, field: str) -> list[Tensor]:
    """The weights of the channels of each layer, [C] each; raises ``SettingError`` for a file without any."""
    folder, name = split_file(file)
    try:
        state = read_any_weights(FileCache().fetch(folder, name), file)
    except DataError as error:
        raise SettingError(field, file, f"a file of LPIPS's linear weights ({error})") from error
    found = sorted((int(match[1]), key) for key in state if (match := _LINEAR.match(key)))
    require(bool(found), field, file, "weights with names such as lin0.model.1.weight")
    return [state[key].float().flatten() for _, key in found]
