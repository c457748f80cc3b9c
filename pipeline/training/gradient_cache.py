"""Contrastive batches beyond memory: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.

Gao, Zhang, Han, Callan, 2021, arXiv 2101.06983 (GradCache), section 3.2: embed the batch in parts without a graph;
compute the loss of all embeddings, and its gradient with respect to them; embed each part again, with a graph, and
backpropagate its embeddings' gradient. This takes two forward passes and one backward pass, with activations of one
part.

The gradient equals that of the whole batch, except for rounding. The loss is evaluated once, so the gradient of the
scale and the bias is exact too; accumulation that evaluates it with every part adds these several times. Random numbers
(dropout, patch dropout) are the same in both passes. Batch normalisation is not exact: each part is normalised by its
own rows, as on another worker. Its running statistics count every part once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.method import EmbeddingMethod

Precision = Callable[[], AbstractContextManager[object]]
"""Makes the autocast of a forward pass; a new one each time, because it caches converted weights."""

Phase = Callable[[str], AbstractContextManager[object]]
"""Called when the ``forward`` and the ``backward`` part of a step begin and end."""


def backward_in_parts(
    method: EmbeddingMethod,
    batch: Mapping[str, Tensor],
    rows: int,
    precision: Precision,
    phase: Phase = nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of the batch's losses to the parameters; returns the losses.

    ``rows`` of ``batch`` go through :meth:`EmbeddingMethod.embed` at once. Parameters must not be wrapped in
    ``DistributedDataParallel``, which would average them after every part. The second forward pass counts as part of
    the backward part.
    """
    split = zip(*(values.split(rows) for values in batch.values()), strict=True)
    parts = [dict(zip(batch, values, strict=True)) for values in split]
    device = next(method.parameters()).device
    embedded: list[dict[str, Tensor]] = []
    states = []
    with phase("forward"):
        with torch.no_grad(), _kept_statistics(method):
            for part in parts:
                states.append(_random_state(device))
                with precision():
                    embedded.append({**method.embed(part), **method.targets(part)})
        leaves = {key: torch.cat([part[key] for part in embedded]).requires_grad_() for key in embedded[0]}
        del embedded
        with precision():
            losses = method.compare(leaves)
    with phase("backward"):
        torch.stack(list(losses.values())).sum().backward()
        slopes = {key: leaf.grad.split(rows) for key, leaf in leaves.items() if leaf.grad is not None}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for number, part in enumerate(parts):
                _set_random_state(states[number], device)
                with precision():
                    again = method.embed(part)
                # The embeddings of a locked tower need no gradient, and targets never do.
                learns = [key for key in slopes if key in again and again[key].requires_grad]
                torch.autograd.backward([again[key] for key in learns], [slopes[key][number] for key in learns])
    return {name: loss.detach() for name, loss in losses.items()}


def normalises_batches(method: nn.Module) -> bool:
    """Whether a row's embedding depends on the other rows of its part, so that parts are not exact."""
    return any(isinstance(module, _BatchNorm) for module in method.modules())


@contextmanager
def _kept_statistics(method: EmbeddingMethod) -> Iterator[None]:
    """Let batch normalisation use its batch without counting it: the batch is seen a second time."""
    layers = [module for module in method.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    counting = [layer for layer in layers if layer.training]
    for layer in counting:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in counting:
            layer.track_running_stats = True


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    here = torch.get_rng_state()
    return (here, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (here,)


def _set_random_state(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
