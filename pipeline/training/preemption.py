"""Preemption notices: a node is about to be removed, as clouds announce for spot machines.

Ray gets the notice from its autoscaler, or from ``ray drain-node``, and passes it to every worker of the run. Workers
run until the node is gone. A checkpoint is written before that, and Ray Train restarts the workers afterwards.
"""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

Notice = Callable[[], bool]
"""Called by rank 0 at intervals: whether a node of this run got a notice since the last call."""


def never() -> bool:
    """A training without Ray gets no notices."""
    return False


class RayNotice:
    """The notices that Ray Train has passed to this worker.

    Reads Ray Train's internal state of this worker. Its public ``get_preemption_info`` returns the same value, but
    waits for all workers each time, also for those that do not train (see ``pipeline.training.elastic``).
    """

    def __init__(self) -> None:
        self.known: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        """Whether there are nodes with a notice since the last call."""
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        nodes = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        new = nodes - self.known
        self.known |= nodes
        for node in sorted(new):
            logger.warning("node %s is about to be removed: writing a checkpoint now", node)
        return bool(new)
