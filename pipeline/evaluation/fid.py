"""The features of FID: TensorFlow's Inception of 2015 in torchvision's modules (Heusel et al. 2017, arXiv 1706.08500).

The weights are a file in the layout of pytorch-fid, ``pt_inception-2015-12-05-6726825d.pth``, which the user brings.
That network differs from torchvision's in the pooling of its blocks: averages leave out the padding, and the last block
takes a maximum.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception_v3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from pipeline.config import require
from pipeline.errors import DataError, SettingError
from pipeline.loaders.cache import FileCache
from pipeline.models.towers.weights import misfit, read_any_weights
from pipeline.shards.storage import split_file

SIDE, CLASSES = 299, 1008


class FidNetwork(nn.Module):
    """The network with the weights of a file, always in evaluation mode.

    Raises:
        SettingError: no such file, or weights of another network.
    """

    def __init__(self, file: str, field: str = "fid_weights") -> None:
        super().__init__()
        folder, name = split_file(file)
        try:
            state = read_any_weights(FileCache().fetch(folder, name), file)
        except DataError as error:
            raise SettingError(field, file, f"a file of FID's Inception weights ({error})") from error
        self.body = fid_inception()
        wanted = self.body.state_dict()
        # Counters of batch normalisation are not used in evaluation mode, and older files lack them.
        counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
        problem = misfit(wanted, {**counters, **state})
        require(not problem, field, file, f"weights of FID's Inception; these are {problem}")
        self.body.load_state_dict({**counters, **state})
        self.body.fc = nn.Identity()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def vectors(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] from 0 to 1, resized without antialiasing as in pytorch-fid: float32 [N, 2048]."""
        with torch.autocast(images.device.type, enabled=False):
            large = functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
            vectors: Tensor = self.body(large * 2 - 1)
        return vectors


class _PoolsWithoutPadding:
    """Mixed into a block whose last branch is ``branch_pool`` of a mean over 3 x 3 pixels with padding."""

    branch_pool: nn.Module

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)  # type: ignore[misc]
        pooled = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return [*others, self.branch_pool(pooled)]


class _FidA(_PoolsWithoutPadding, InceptionA):  # type: ignore[misc]
    pass


class _FidC(_PoolsWithoutPadding, InceptionC):  # type: ignore[misc]
    pass


class _FidE(_PoolsWithoutPadding, InceptionE):  # type: ignore[misc]
    pass


class _FidLast(InceptionE):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)
        return [*others, self.branch_pool(functional.max_pool2d(x, 3, stride=1, padding=1))]


def fid_inception() -> nn.Module:
    """The network with random weights; 1008 outputs."""
    with torch.random.fork_rng():
        body: nn.Module = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
        body.Mixed_5b, body.Mixed_5c, body.Mixed_5d = _FidA(192, 32), _FidA(256, 64), _FidA(288, 64)
        body.Mixed_6b, body.Mixed_6c = _FidC(768, 128), _FidC(768, 160)
        body.Mixed_6d, body.Mixed_6e = _FidC(768, 160), _FidC(768, 192)
        body.Mixed_7b, body.Mixed_7c = _FidE(1280), _FidLast(2048)
    return body
