"""Batch normalisation over the rows of all processes, on any device."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.losses import Gather, alone


class GatheredBatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks (Ioffe and Szegedy 2015), on any device.

    torch's SyncBatchNorm runs on GPUs only. Here means and variances are exchanged by the method's gather, whose
    gradients are those of one process with the whole batch. Weights and statistics have torch's names.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, features: Tensor, gather: Gather = alone) -> Tensor:
        """Float [B, width] to the same; every rank has as many rows."""
        if not self.training or (gather is alone and len(features) > 1):
            settings = self.weight, self.bias, self.training, self.momentum, self.epsilon
            return functional.batch_norm(features, self.running_mean, self.running_var, *settings)
        own = torch.stack([features.mean(dim=0), features.var(dim=0, correction=0)])
        means, variances = gather(own[None]).unbind(1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        rows = len(features) * len(means)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * rows / max(rows - 1, 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return (features - mean) * (variance + self.epsilon).rsqrt() * self.weight + self.bias
