"""The losses of the codebook, how many codes are in use, and the restart of those that are not."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.models.losses import Gather, alone
from pipeline.models.towers.image_codes import perplexity

DECAY = 0.99  # per step, of the share of each code
RECENT = 100  # steps in which a code must be chosen to count as used
SPARE_ROWS = 256  # latents of a rank, of a step, that may become codes


def codebook_loss(latents: Tensor, codes: Tensor) -> Tensor:
    """Draws the codes to the latents: mean squared distance, with gradients of ``codes`` alone."""
    return (codes.float() - latents.float().detach()).square().mean()


def commitment_loss(latents: Tensor, codes: Tensor) -> Tensor:
    """Draws the latents to their codes."""
    return (latents.float() - codes.float().detach()).square().mean()


class CodebookUse(nn.Module):
    """Which codes the training chose, over all ranks: an average of their shares, and the step of their last use.

    All of it is saved, so that a resumed run restarts the same codes.
    """

    shares: Tensor
    last_used: Tensor
    steps: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("shares", torch.zeros(codes))
        self.register_buffer("last_used", torch.full((codes,), -RECENT - 1))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def count(self, numbers: Tensor, gather: Gather = alone) -> None:
        """Add the codes int64 [...] of a step; ``steps`` is the number of steps before it."""
        counts = torch.zeros_like(self.shares).index_add_(0, numbers.flatten(), self.shares.new_ones(numbers.numel()))
        counts = gather(counts[None]).sum(dim=0)
        self.shares.lerp_(counts / counts.sum(), 1 - DECAY)
        self.last_used.copy_(torch.where(counts > 0, self.steps, self.last_used))

    def usage(self) -> Tensor:
        """The part of the codes that the last 100 steps chose: float [], 0 to 1."""
        return (self.steps - self.last_used <= RECENT).float().mean()

    def perplexity(self) -> Tensor:
        """Of the averaged shares."""
        return perplexity(self.shares)


@torch.no_grad()
def spare_latents(latents: Tensor, gather: Gather = alone) -> Tensor:
    """Random latents of this step from [N, D, h, w], of all ranks: float [R, D], up to 256 of each."""
    rows = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randperm(len(rows), device=rows.device)[:SPARE_ROWS]
    return gather(rows[chosen])


@torch.no_grad()
def restart(codebook: Tensor, use: CodebookUse, unused_steps: int, spare: Tensor) -> Tensor:
    """Replace codes that were not chosen for ``unused_steps`` steps by ``spare`` latents [R, D], R of them at most.

    Returns:
        bool [K]: the codes that were replaced.
    """
    dead = use.steps - use.last_used.clamp(min=0) > unused_steps
    place = dead.cumsum(0) - 1  # of a dead code among the dead ones
    taken = spare[place.clamp(0, len(spare) - 1)].to(codebook.dtype)
    replaced = dead & (place < len(spare)) & taken.isfinite().all(dim=1)
    _write(codebook, replaced, taken)
    use.last_used.copy_(torch.where(replaced, use.steps, use.last_used))
    return replaced


def _write(codebook: Tensor, chosen: Tensor, rows: Tensor) -> None:
    """Overwrite the ``chosen`` rows, bool [K], by those of float [K, D]; a sharded codebook stays sharded."""
    if not isinstance(codebook, DTensor):
        codebook.copy_(torch.where(chosen[:, None], rows, codebook))
        return
    whole = torch.where(chosen[:, None], rows, codebook.full_tensor())
    mesh, placements = codebook.device_mesh, codebook.placements
    codebook.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
