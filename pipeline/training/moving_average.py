"""An exponential moving average of the weights (Tarvainen and Valpola 2017, arXiv 1703.01780, equation 1).

After step n, average <- d_n average + (1 - d_n) weights, with d_n = min(decay, (1 + n) / (10 + n)): a lower decay in
the first steps forgets the random start sooner. Frozen weights are copied from the method instead of averaged; running
statistics of batch normalisation are averaged like weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.models.method import Method
from pipeline.training import distributed


class MovingAverage:
    """The average of ``method``'s weights, on the same device, in the same types."""

    def __init__(self, method: Method, decay: float) -> None:
        self.method, self.decay = method, decay
        tensors = method.state_dict(keep_vars=True)
        learns = {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
        learns |= {id(buffer) for buffer in method.buffers() if buffer.is_floating_point()}
        # Tied weights have one average for all their names.
        unique = {id(tensor): tensor for tensor in tensors.values() if id(tensor) in learns}
        averages = {key: tensor.detach().clone() for key, tensor in unique.items()}
        self._names = {name: averages[id(tensor)] for name, tensor in tensors.items() if id(tensor) in averages}
        self._live, self._averages = list(unique.values()), list(averages.values())

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Update the average after ``step`` steps; ``skipped``, float [], is 1 if that step was skipped."""
        weight = (1 - decay_at(step, self.decay)) * (1 - skipped)
        averages, live = distributed.local(self._averages), distributed.local(self._live)
        torch._foreach_lerp_(averages, live, [weight] * len(live))

    def state_dict(self) -> dict[str, Tensor]:
        """All weights of the method, trained ones averaged, by the method's names."""
        return {**self.method.state_dict(), **self._names}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            DataError: an average is missing or of another shape.
        """
        for name, average in self._names.items():
            saved = weights.get(name)
            if saved is None or saved.shape != average.shape:
                raise DataError(f"the checkpoint's moving average holds no {name} of {tuple(average.shape)}")
            average.copy_(distributed.like(saved, average))


def decay_at(step: int, decay: float) -> float:
    """The decay at step number ``step``, counted from 1."""
    return min(decay, (1 + step) / (10 + step))
