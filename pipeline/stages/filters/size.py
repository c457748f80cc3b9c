"""Size and aspect of images, as DataComp's basic filter has them (Gadre et al., 2023, arXiv 2304.14108).

Kept are images whose shorter side is at least 200 pixels and whose sides differ by a factor of at most 3, as they
were found on the web where the shard knows that, otherwise as they are stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.config import require
from pipeline.stages.filters.filter import Filter, Step, Verdict
from pipeline.stages.filters.view import ShardView


@dataclass(frozen=True, kw_only=True)
class Size(Filter):
    """Drop small and stretched images: ``small``, ``aspect``."""

    name: ClassVar[str] = "size"
    rank: ClassVar[int] = 4
    min_side: int = 200
    max_aspect: float = 3.0
    stored_size: bool = False
    """Judge the stored image, not the one that was downloaded."""

    def check(self) -> None:
        """Bounds that leave something."""
        require(self.min_side >= 0, "min_side", self.min_side, "0 or more pixels")
        require(self.max_aspect >= 1, "max_aspect", self.max_aspect, "1 or more")

    def judge(self, view: ShardView, step: Step) -> Verdict:
        """By width and height alone; images are not decoded."""
        sizes = view.sizes(original=not self.stored_size)
        shorter, longer = sizes.min(axis=1, initial=1 << 40), sizes.max(axis=1, initial=0)
        aspect = longer / np.maximum(shorter, 1)
        return Verdict({"small": shorter < self.min_side, "aspect": aspect > self.max_aspect})
