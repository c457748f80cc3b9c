"""Several processes that share a batch; every function also works in a process alone."""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return distributed.get_rank() if _together() else 0


def world() -> int:
    """How many processes share a batch."""
    return distributed.get_world_size() if _together() else 1


def gather(features: Tensor) -> Tensor:
    """float [B, D] of this rank to float [W * B, D] of all, in the order of ranks, with gradients.

    The gradient that reaches a rank's rows is the sum of what all ranks' losses say about them. Where the loss is the
    mean over ranks and ``DistributedDataParallel`` averages parameters' gradients, that is the exact gradient.
    """
    return cast(Tensor, _Gather.apply(features)) if world() > 1 else features


def mean_over_ranks(values: Tensor) -> Tensor:
    """The element-wise mean over ranks; all ranks must call."""
    if world() > 1:
        values = values.clone()
        distributed.all_reduce(values)
        values /= world()
    return values


def first_step(step: Tensor) -> int:
    """The least of the ranks' step numbers that is not negative, -1 if there is none; all ranks must call."""
    value = torch.where(step < 0, torch.iinfo(torch.int64).max, step)
    if world() > 1:
        distributed.all_reduce(value, distributed.ReduceOp.MIN)
    return -1 if int(value) == torch.iinfo(torch.int64).max else int(value)


def from_first(value: Value) -> Value:
    """Rank 0's ``value``, in every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box)
    return cast(Value, box[0])


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        distributed.barrier()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` with its gradients averaged over ranks; the module itself when the process is alone."""
    if world() == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # Without this, gradients are grouped anew after the first step, and a resumed run would add those of three
        # or more ranks in another order than one that never stopped. On a GPU speed counts for more.
        find_unused_parameters=device.type == "cpu",
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        features = features.contiguous()
        everything = features.new_empty(world() * len(features), *features.shape[1:])
        distributed.all_gather_into_tensor(everything, features)
        return everything

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        everything = gradients[0].contiguous()
        if everything.is_cuda:
            mine = everything.new_empty(len(everything) // world(), *everything.shape[1:])
            distributed.reduce_scatter_tensor(mine, everything)
            return mine
        # gloo has no reduce-scatter for all types; the sum of everything is the same for these small tensors.
        everything = everything.clone()
        distributed.all_reduce(everything)
        return everything.chunk(world())[rank()]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
