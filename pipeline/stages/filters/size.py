"""Size and aspect ratio of images, as in DataComp's basic filter (Gadre et al., 2023, arXiv 2304.14108).

Keeps images with a shorter side of at least 200 pixels and an aspect ratio of at most 3. The size is that of the
downloaded image if the shard stores it, otherwise that of the stored image.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Size(Filter):
    """Drop small and elongated images: ``small``, ``aspect``."""

    name: ClassVar[str] = "size"
    rank: ClassVar[int] = 4
    min_side: int = 200
    max_aspect: float = 3.0
    stored_size: bool = False
    """Use the size of the stored image, not of the downloaded one."""

    def check(self) -> None:
        """Require valid bounds."""
        require(self.min_side >= 0, "min_side", self.min_side, "0 or more pixels")
        require(self.max_aspect >= 1, "max_aspect", self.max_aspect, "1 or more")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """Judge by width and height; images are not decoded."""
        sizes = view.sizes(original=not self.stored_size)
        shorter, longer = sizes.min(axis=1, initial=1 << 40), sizes.max(axis=1, initial=0)
        aspect = longer / np.maximum(shorter, 1)
        return Verdict({"small": shorter < self.min_side, "aspect": aspect > self.max_aspect})
