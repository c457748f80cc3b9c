"""Tip-Adapter-F: Tip-Adapter with trained keys.

Zhang, Fang, Zhang, Gao, Li, Dai, Qiao, Li, 2022, arXiv 2207.09519, section 3.2: the cache of Tip-Adapter initialises a
linear layer. Its keys are trained by cross-entropy at the initial alpha and beta; its values are fixed. Then alpha and
beta are chosen again. The keys are not normalised again in training.

To hold a run against: ImageNet with RN50 and 1/2/4/8/16 shots, 61.32/61.69/62.52/64.00/65.51; 16 shots, mean of
eleven sets, 75.83. Recipe: AdamW, rate 0.001, 20 epochs (100 on EuroSAT), batches of 256; the best epoch by
validation images (the authors' code takes it by the test set).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.models.adapters.tip_adapter import Config, TipAdapter

__all__ = ["Config", "TipAdapterF"]


class TipAdapterF(TipAdapter):
    """A cache with trained keys."""

    learns = True

    def build(self) -> None:
        """An empty cache, whose keys are parameters."""
        super().build()
        keys = self.keys
        del self.keys
        self.register_parameter("keys", nn.Parameter(keys))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a cache of any number of shots; its keys have no gradient yet."""
        super().restore(tensors)
        self.keys.grad = None
