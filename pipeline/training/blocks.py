"""Recomputation and compilation of a model's repeated blocks, one by one.

Both change only a block's ``forward``: the names of its weights, and hooks around it, stay the same. With both, the
compiler includes the recomputation where it can.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def recompute_each(blocks: Iterable[nn.Module]) -> None:
    """Store only each block's input (Chen et al. 2016, arXiv 1604.06174); both passes use the same random numbers.

    Running statistics of batch normalisation count the batch once.
    """
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        contexts = {"context_fn": partial(_counted_once, layers)} if layers else {}
        block.forward = partial(_recomputed, block.forward, contexts)


def compile_each(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block by itself: blocks of one shape share the code, so compilation takes seconds, not minutes.

    Captions are cut to the longest one of a batch; from the second length on, torch compiles for any length.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)


def _recomputed(forward: Callable[..., Any], contexts: dict[str, Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **contexts, **named)


def _counted_once(layers: list[_BatchNorm]) -> Contexts:
    """The contexts of the first pass and of the second."""
    return nullcontext(), _uncounted(layers)


@contextmanager
def _uncounted(layers: list[_BatchNorm]) -> Iterator[None]:
    """Let ``layers`` normalise their batch without adding it to their statistics.

    They still use these (with a momentum of 0), because a second pass must save the same tensors as the first.
    """
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count
