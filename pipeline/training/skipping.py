"""Steps with a non-finite loss or gradient are skipped without a trace; nothing waits for the device.

All ranks skip the same steps. The optimiser skips its update if ``found_inf`` is set, as for
``torch.amp.GradScaler``; this module restores the buffers that a forward pass changes (running statistics).
"""

import torch
from torch import Tensor

from pipeline.models.method import Method
from pipeline.training import distributed


class Skipping:
    """Finds the steps to skip, and counts them; more than ``limit`` in a row are too many.

    ``total`` is the number of earlier skipped steps, ``row`` that of the last consecutive ones among them.
    """

    def __init__(self, method: Method, limit: int, device: torch.device, total: int = 0, row: int = 0) -> None:
        saved = {id(tensor) for tensor in method.state_dict(keep_vars=True).values()}
        self._buffers = [buffer for buffer in method.buffers() if id(buffer) in saved]
        self._kept: list[Tensor] = []
        self.limit = limit
        self._total, self._row = torch.tensor(total, device=device), torch.tensor(row, device=device)
        self._step, self._earlier, self._bad = -1, self._row, torch.tensor(False, device=device)
        self._too_many = torch.tensor(-1, device=device)

    def before_step(self) -> None:
        """Copy the buffers that the forward pass of an update changes."""
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    @torch.no_grad()
    def after_backward(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Float32 [], 1 if this update is skipped, else 0; all ranks must call.

        ``loss`` is this rank's, ``norm`` that of the gradient of all ranks. A step with several updates counts once.
        """
        bad = distributed.any_rank(~(loss.detach().isfinite() & norm.isfinite()))
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
        if step != self._step:
            self._step, self._earlier, self._bad = step, self._row, torch.zeros_like(bad)
        self._total += bad & ~self._bad
        self._bad = self._bad | bad
        self._row = (self._earlier + 1) * self._bad
        first = step + 1 - self._row
        self._too_many = torch.where((self._too_many < 0) & (self._row > self.limit), first, self._too_many)
        return bad.float()

    def too_many_since(self) -> int | None:
        """The first step of too many skipped ones in a row, or ``None``; waits for the device."""
        step = int(self._too_many)
        return step if step >= 0 else None

    def counts(self) -> tuple[int, int]:
        """The number of skipped steps, and how many of them are the last consecutive ones; waits for the device."""
        return int(self._total), int(self._row)
