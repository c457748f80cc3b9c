"""The mode of modules: evaluation for a while, then what each of them had."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put ``modules`` into evaluation mode; at the end every part has the mode that it had.

    A frozen part in evaluation mode inside a module in training mode stays in evaluation mode.
    """
    before = [(module, module.training, [(part, part.training) for part in module.modules()]) for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training, parts in before:
            module.train(training)  # methods drop cached vectors where training begins
            for part, mode in parts:
                part.training = mode
