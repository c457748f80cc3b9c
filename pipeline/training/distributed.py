"""Several processes that share a batch; every function also works in a process alone."""

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


def exchange(kind: Literal["gather", "ring"]) -> Exchange:
    """How a tiled loss of this rank sees the texts of all: gathered at once, or passed from rank to rank.

    Gathered, a rank holds the features of the whole batch; in a ring only its own and a neighbour's, in as many smaller
    messages as there are ranks, sent while the tiles of the last ones are computed.
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


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor, in the same memory: all of it, or its part of a sharded one."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, which may be sharded: then all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(complete: Tensor, tensor: Tensor) -> Tensor:
    """``complete``, which every rank has, as this rank holds ``tensor``: its type, its device, sharded as it is."""
    complete = complete.to(tensor.device, tensor.dtype)
    if not isinstance(tensor, DTensor):
        return complete
    return distribute_tensor(complete.contiguous(), tensor.device_mesh, tensor.placements, src_data_rank=None)


def parallel(module: nn.Module, device: torch.device, whole: bool = True) -> nn.Module:
    """``module`` with the same weights in all ranks and, on GPUs, its gradients averaged while they are computed.

    It is the module itself, for :func:`average_gradients`, where a step has several backward passes instead of a
    ``whole`` one, and on CPUs: ``DistributedDataParallel`` groups gradients anew after its first step, and a resumed
    run would add those of three or more ranks in another order than one that never stopped. On a GPU speed counts for
    more.
    """
    if world() > 1 and device.type == "cuda" and whole:
        return DistributedDataParallel(module, device_ids=[device], gradient_as_bucket_view=True)
    _agree(module)
    return module


def shard(method: Method) -> Method:
    """Divide the weights among the ranks (FSDP2): each block is gathered while it is computed, the rest for a step.

    Gradients are averaged and divided on the way back, so an optimiser made afterwards steps on this rank's part. All
    of it travels in float32: autocast decides what is computed in bfloat16, as without sharding. Scalars cannot be
    divided; :func:`average_gradients` averages theirs. A process alone has nothing to divide. All ranks must call.
    """
    if world() == 1:
        return method
    _agree(method)
    mesh = init_device_mesh(next(method.parameters()).device.type, (world(),))
    for block in method.blocks():
        fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in method.parameters() if parameter.ndim == 0}
    fully_shard(method, mesh=mesh, ignored_params=scalars)
    for name in ("embed", "targets", "compare"):  # the doors of gradient caching, besides forward
        if hasattr(method, name):
            register_fsdp_forward_method(method, name)
    return method


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of what :func:`parallel` gave by their mean over ranks; all ranks must call.

    Does nothing where ``DistributedDataParallel`` or :func:`shard` has done so, or the process is alone. A parameter
    without a gradient must be one in all ranks.
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
    """Give all ranks the first one's weights."""
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
        """Gather, work, and combine what all ranks carry."""
        carried = carried.repeat(self.world, *[1] * (carried.ndim - 1))
        work(_from_all(columns), carried, rank() * len(columns))
        if combine == "sum":
            return _sum_of_mine(carried)
        largest = carried.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        distributed.all_reduce(carried.sub_(largest).exp_())
        return carried.log_().add_(largest).chunk(self.world)[rank()]


class _Ring:
    """An exchange in which the columns and what they carry go round all ranks and come home."""

    def __init__(self) -> None:
        self.world = world()

    def visit(self, columns: Tensor, carried: Tensor, work: Visit, combine: Literal["sum", "logsumexp"]) -> Tensor:
        """Work on one rank's columns while the next ones arrive; what is carried is combined on its way."""
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
        """Begin to send to the next rank and to receive from the one before."""
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
    """[W * B, ...] of every rank to the sum over ranks of this rank's [B, ...]; changes ``everything``."""
    if everything.is_cuda:
        mine = everything.new_empty(len(everything) // world(), *everything.shape[1:])
        distributed.reduce_scatter_tensor(mine, everything)
        return mine
    # gloo has no reduce-scatter for all types; the sum of everything is the same for these small tensors.
    distributed.all_reduce(everything)
    return everything.chunk(world())[rank()]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
