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
    """``module`` with the same weights in all ranks and, on GPUs, its gradients averaged while they are computed.

    On CPUs it is the module itself, for :func:`average_gradients`: ``DistributedDataParallel`` groups gradients anew
    after its first step, and a resumed run would add those of three or more ranks in another order than one that never
    stopped. On a GPU speed counts for more.
    """
    if world() > 1 and device.type == "cuda":
        return DistributedDataParallel(module, device_ids=[device], gradient_as_bucket_view=True)
    if world() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            values = tensor.detach().contiguous()
            distributed.broadcast(values, 0)
            tensor.detach().copy_(values)
    return module


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of what :func:`parallel` gave by their mean over ranks; all ranks must call.

    Does nothing where ``DistributedDataParallel`` has done so, or the process is alone. A parameter without a gradient
    must be one in all ranks.
    """
    if world() == 1 or isinstance(module, DistributedDataParallel):
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= world()
    means = together.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


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
