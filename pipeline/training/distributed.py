"""Processes that share a batch; every function also works in a single process."""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.losses import ALONE, Exchange, Visit
from pipeline.models.method import Method

Value = TypeVar("Value")


def rank() -> int:
    """This process's rank, 0 in a single process."""
    return distributed.get_rank() if _together() else 0


def world() -> int:
    """Number of processes that share a batch."""
    return distributed.get_world_size() if _together() else 1


def gather(features: Tensor) -> Tensor:
    """float [B, D] of this rank to float [W * B, D] of all, in the order of ranks, with gradients.

    The gradient of a rank's rows is the sum of the gradients of all ranks' losses. If the loss is the mean over ranks
    and ``DistributedDataParallel`` averages parameters' gradients, that is the exact gradient.
    """
    return cast(Tensor, _Gather.apply(features)) if world() > 1 else features


def exchange(kind: Literal["gather", "ring"]) -> Exchange:
    """How a tiled loss of this rank gets the texts of all: gathered at once, or passed from rank to rank.

    With gather, a rank holds the features of the whole batch. With ring, it holds only its own and a neighbour's, in as
    many smaller messages as there are ranks, sent while the tiles of the previous ones are computed.
    """
    if world() == 1:
        return ALONE
    return _Gathered() if kind == "gather" else _Ring()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The element-wise mean over ranks; all ranks must call."""
    if world() > 1:
        values = values.clone()
        distributed.all_reduce(values)
        values /= world()
    return values


def any_rank(flag: Tensor) -> Tensor:
    """Bool []: whether ``flag`` is true in any rank; all ranks must call."""
    if world() == 1:
        return flag
    count = flag.float()
    distributed.all_reduce(count)
    return count > 0


def from_first(value: Value) -> Value:
    """Rank 0's ``value``, on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box)
    return cast(Value, box[0])


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        distributed.barrier()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, in the same memory: all of it, or the local shard."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole ``tensor``; if it is sharded, all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(complete: Tensor, tensor: Tensor) -> Tensor:
    """``complete``, which every rank has, in the type, on the device and with the sharding of ``tensor``."""
    complete = complete.to(tensor.device, tensor.dtype)
    if not isinstance(tensor, DTensor):
        return complete
    return distribute_tensor(complete.contiguous(), tensor.device_mesh, tensor.placements, src_data_rank=None)


def parallel(module: nn.Module, device: torch.device, whole: bool = True) -> nn.Module:
    """``module`` with the same weights on all ranks and, on GPUs, gradients averaged during the backward pass.

    Returns the module itself, for :func:`average_gradients`, if a step has several backward passes (``whole`` is
    false), and on CPUs. ``DistributedDataParallel`` regroups gradients after its first step, so a resumed run of three
    or more ranks would add them in another order than an uninterrupted one. On a GPU speed is more important.
    """
    if world() > 1 and device.type == "cuda" and whole:
        return DistributedDataParallel(module, device_ids=[device], gradient_as_bucket_view=True)
    _agree(module)
    return module


def shard(method: Method) -> Method:
    """Shard the weights over the ranks (FSDP2): each block is gathered for its computation, the rest for a step.

    Gradients are averaged and sharded in the backward pass, so an optimiser made afterwards updates this rank's part.
    Communication is in float32; autocast decides what is computed in bfloat16, as without sharding. Scalars cannot be
    sharded; :func:`average_gradients` averages theirs. A single process is left as it is. All ranks must call.
    """
    if world() == 1:
        return method
    _agree(method)
    mesh = init_device_mesh(next(method.parameters()).device.type, (world(),))
    for block in method.blocks():
        fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in method.parameters() if parameter.ndim == 0}
    fully_shard(method, mesh=mesh, ignored_params=scalars)
    for name in ("embed", "targets", "compare"):  # entry points of gradient caching, besides forward
        if hasattr(method, name):
            register_fsdp_forward_method(method, name)
    return method


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of a :func:`parallel` module by their mean over ranks; all ranks must call.

    Does nothing if ``DistributedDataParallel`` or :func:`shard` has done so, or in a single process. A parameter
    without a gradient must have none on all ranks.
    """
    if world() == 1 or isinstance(module, DistributedDataParallel):
        return
    found = (parameter.grad for parameter in module.parameters())
    gradients = [gradient for gradient in found if gradient is not None and not isinstance(gradient, DTensor)]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= world()
    means = together.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def _agree(module: nn.Module) -> None:
    """Broadcast the first rank's weights."""
    if world() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            values = tensor.detach().contiguous()
            distributed.broadcast(values, 0)
            tensor.detach().copy_(values)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        return _from_all(features)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _sum_of_mine(gradients[0].contiguous().clone())


class _Gathered:
    """An exchange in which every rank sees all columns at once."""

    def __init__(self) -> None:
        self.world = world()

    def visit(self, columns: Tensor, carried: Tensor, work: Visit, combine: Literal["sum", "logsumexp"]) -> Tensor:
        """Gather, call ``work``, and combine the carried values."""
        carried = carried.repeat(self.world, *[1] * (carried.ndim - 1))
        work(_from_all(columns), carried, rank() * len(columns))
        if combine == "sum":
            return _sum_of_mine(carried)
        largest = carried.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        distributed.all_reduce(carried.sub_(largest).exp_())
        return carried.log_().add_(largest).chunk(self.world)[rank()]


class _Ring:
    """An exchange in which the columns and their carried values pass all ranks and return."""

    def __init__(self) -> None:
        self.world = world()

    def visit(self, columns: Tensor, carried: Tensor, work: Visit, combine: Literal["sum", "logsumexp"]) -> Tensor:
        """Work on one rank's columns while the next ones arrive; carried values are combined on the way."""
        columns, carried = columns.contiguous(), carried.contiguous()
        for hop in range(self.world):
            last = hop == self.world - 1
            arriving, underway = (columns, []) if last else self._pass_on(columns, 0)
            work(columns, carried, None if hop else 0)
            carried, carrying = self._pass_on(carried, 1) if carried.numel() else (carried, [])
            for request in (*underway, *carrying):
                request.wait()
            columns = arriving
        return carried

    def _pass_on(self, tensor: Tensor, tag: int) -> tuple[Tensor, list[distributed.Work]]:
        """Start to send to the next rank and to receive from the previous one."""
        arriving = torch.empty_like(tensor)
        following, preceding = (rank() + 1) % self.world, (rank() - 1) % self.world
        messages = [
            distributed.P2POp(distributed.isend, tensor, following, tag=tag),
            distributed.P2POp(distributed.irecv, arriving, preceding, tag=tag),
        ]
        return arriving, distributed.batch_isend_irecv(messages)


def _from_all(features: Tensor) -> Tensor:
    """[B, ...] of this rank to [W * B, ...] of all, in the order of ranks."""
    features = features.contiguous()
    everything = features.new_empty(world() * len(features), *features.shape[1:])
    distributed.all_gather_into_tensor(everything, features)
    return everything


def _sum_of_mine(everything: Tensor) -> Tensor:
    """Sum over ranks of this rank's rows [B, ...] in every rank's [W * B, ...]; changes ``everything``."""
    if everything.is_cuda:
        mine = everything.new_empty(len(everything) // world(), *everything.shape[1:])
        distributed.reduce_scatter_tensor(mine, everything)
        return mine
    # gloo has no reduce-scatter for all types; an all-reduce gives the same for these small tensors.
    distributed.all_reduce(everything)
    return everything.chunk(world())[rank()]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
