"""An image tower that computes the grids of images, for ``stages/annotate/grid_features.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import SettingError
from pipeline.evaluation.allocator import keep_freed_memory
from pipeline.evaluation.embedder import Precision
from pipeline.evaluation.encoder import inference
from pipeline.evaluation.models import load_any
from pipeline.loaders.images import decode
from pipeline.loaders.samples import UnreadableSample
from pipeline.models.clip import Clip
from pipeline.models.method import Method
from pipeline.models.towers.grid import GridTower, fold_norms, grid_features
from pipeline.models.towers.weights import digest_of
from pipeline.stages.annotate.grid_features import PreparedImage

AT_ONCE = {"cpu": 2}
"""Images whose activations are computed together. On a CPU 1, 2 and 4 take the same time; a few need less memory."""


@dataclass(frozen=True, kw_only=True)
class GridSize:
    """The input of the tower."""

    image_size: tuple[int, int] = (384, 640)
    """Height and width in pixels into which an image is resized and padded, multiples of the side of a cell."""


@dataclass(frozen=True, kw_only=True)
class LoadGridEmbedder:
    """Loads the tower at ``checkpoint`` when it is called: that of a CLIP, or the one that a CLIP-ViL was trained with.

    ``checkpoint`` is an address of :func:`pipeline.evaluation.models.load_any`.
    """

    checkpoint: str
    device: str = "auto"
    precision: Precision = "fp32"
    size: GridSize = GridSize()

    def __call__(self, threads: int) -> "GridEmbedder":
        """``threads`` is the number of CPU threads for the model, if it does not run on a GPU.

        Raises:
            SettingError: no such checkpoint, one without such a tower, or a size that its tower does not take.
        """
        model = load_any(self.checkpoint, self.device)
        tower = grid_tower(model)
        if tower is None:
            raise SettingError("checkpoint", self.checkpoint, "a CLIP, a classifier over its tower, or a CLIP-ViL")
        if tower.mean.device.type == "cpu":
            torch.set_num_threads(threads)
            keep_freed_memory()
        return GridEmbedder(tower, self.size.image_size, self.precision)


def grid_tower(model: Method) -> GridTower | None:
    """The image tower of a CLIP up to its grid, or the one that a CLIP-ViL has; ``None`` for other methods."""
    if isinstance(model, Clip):
        return GridTower(model.model).to(model.mean.device)
    own = getattr(model, "tower", None)
    return own if isinstance(own, GridTower) else None


class GridEmbedder:
    """A tower that computes grids; it is changed for inference."""

    def __init__(self, tower: GridTower, image_size: tuple[int, int], precision: Precision = "fp32") -> None:
        self._tower = tower.eval()
        self._tower.check_size(image_size)
        self._transform = self._tower.transform(image_size)
        self._precision = precision
        self._on_cpu = tower.mean.device.type == "cpu"
        teacher = self._tower.digest(image_size)
        fold_norms(self._tower)
        # With channels last, convolutions are faster on a CPU, and tensor cores need it.
        self._tower.to(memory_format=torch.channels_last)
        self.maker = digest_of(None, teacher, precision)
        self.facts: Mapping[str, Any] = {
            "teacher": teacher,
            "width": self._tower.width,
            "size": list(image_size),
            "stride": self._tower.stride,
        }

    def prepare(self, image: bytes) -> PreparedImage | None:
        """The image for :meth:`encode`, and its cells; ``None`` if it cannot be decoded.

        uint8 [1, 3, H, W], channels last. For a CPU it is float32 and normalised, since the threads that prepare run
        beside the tower; a GPU normalises it itself, since a quarter of the bytes are then copied to it.
        """
        try:
            pixels, cells = self._transform(decode(image))
        except UnreadableSample:
            return None
        pixels = pixels[None].contiguous(memory_format=torch.channels_last)
        return PreparedImage(self._tower.normalised(pixels) if self._on_cpu else pixels, cells)

    def encode(self, images: Sequence[Tensor]) -> NDArray[np.float16]:
        """N prepared images to float16 [N, H / stride, W / stride, D]; infinite where half precision is exceeded."""
        with inference(self._tower, self._precision) as device:
            count = AT_ONCE.get(device.type, len(images))
            starts = range(0, len(images), count)
            parts = [self._encoded(torch.cat(list(images[n : n + count])).to(device)) for n in starts]
        array: NDArray[np.float16] = torch.cat(parts).numpy()
        return array

    def _encoded(self, images: Tensor) -> Tensor:
        pixels = images.contiguous(memory_format=torch.channels_last)
        grid = grid_features(self._tower.visual, pixels if self._on_cpu else self._tower.normalised(pixels))
        return grid.half().permute(0, 2, 3, 1).cpu()
