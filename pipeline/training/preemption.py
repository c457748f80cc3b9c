"""Notice of a node that is about to be taken away, as clouds give it for machines at a lower price.

Ray learns of it from its autoscaler, or from ``ray drain-node``, and tells every worker of the run. The workers go on
until the node is gone; what matters is that a checkpoint is written before, and Ray Train starts them again after.
"""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

Notice = Callable[[], bool]
"""Asked by rank 0 from time to time: whether a node of this run has been given notice since it was asked last."""


def never() -> bool:
    """No notice comes to a training without Ray."""
    return False


class RayNotice:
    """The notices that Ray Train has passed to this worker.

    Read where Ray Train keeps them for this worker. Its public ``get_preemption_info`` gives the same value, but waits
    for all workers each time, those included that do not train (see ``pipeline.training.elastic``).
    """

    def __init__(self) -> None:
        self.known: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        """Whether there are nodes with notice that were not there before."""
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        nodes = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        new = nodes - self.known
        self.known |= nodes
        for node in sorted(new):
            logger.warning("node %s is about to be taken away: writing a checkpoint now", node)
        return bool(new)
