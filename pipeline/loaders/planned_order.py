"""An order of samples that is planned epoch by epoch, such as by the model at the start of each."""

import math

import numpy as np

from pipeline.config import require
from pipeline.loaders.order import Integers


class PlannedOrder:
    """Batches of an epoch from its plan, sample numbers int64 [steps of an epoch, B]; one plan at a time.

    An epoch has as many whole batches as the data have, at least one. A plan decides which samples these batches have,
    so an epoch may show a sample several times, or not at all.

    Raises:
        SettingError: no samples, or a batch size out of range.
    """

    lanes = 1

    def __init__(self, samples: int, batch_size: int) -> None:
        require(samples >= 1, "samples", samples, "at least one sample")
        require(batch_size >= 1, "batch_size", batch_size, "1 or more")
        self.samples, self.batch_size = samples, batch_size
        self.epoch_steps = max(1, samples // batch_size)
        self._epoch, self._plan = -1, np.zeros((0, batch_size), np.int64)

    def steps(self, epochs: float) -> int:
        """The number of global batches of ``epochs`` epochs."""
        return math.ceil(epochs * self.epoch_steps)

    def follow(self, epoch: int, plan: Integers) -> None:
        """Take the batches of ``epoch`` from ``plan``."""
        assert plan.shape == (self.epoch_steps, self.batch_size)
        self._epoch, self._plan = epoch, plan

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Integers:
        """As :meth:`Order.batch`, for steps of the epoch whose plan it follows."""
        require(self.batch_size % world == 0, "batch_size", self.batch_size, f"a multiple of the {world} workers")
        epoch, inside = divmod(step, self.epoch_steps)
        assert epoch == self._epoch, f"step {step} is of epoch {epoch}, the plan of epoch {self._epoch}"
        each = self.batch_size // world
        numbers = self._plan[inside, rank * each : (rank + 1) * each]
        return np.stack([np.full(each, epoch), numbers], axis=1)
