"""A number of workers that follows the cluster: ``workers`` of ``2:8`` uses between two and eight, as available.

Ray Train starts as many workers as fit the cluster. When there is room for more, or a node is lost, it restarts all of
them from the latest checkpoint. The order of samples decides every batch, so any number of workers trains the same run.
Only a batch must be shared evenly, because losses gather features. If the number of workers does not divide the batch,
the largest smaller number that does trains, and the other workers wait for the next start.
"""

import logging
from datetime import timedelta
from typing import Any

from torch import distributed

logger = logging.getLogger(__name__)

JOIN_SECONDS = 300.0


def sharing(workers: int, batch_size: int) -> int:
    """How many of ``workers`` train: the largest number up to it that divides ``batch_size``."""
    return max(count for count in range(1, workers + 1) if batch_size % count == 0)


def join_those_that_share(batch_size: int) -> bool:
    """Replace the process group of all workers by one of those that share a batch; returns whether this one does.

    All workers must call. The new group uses the same backend, and a store on rank 0 for its rendezvous.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    count = sharing(world, batch_size)
    if count == world:
        return True
    if rank == 0:
        message = "%d of %d workers train, the largest number that divides a batch of %d samples"
        logger.warning(message, count, world, batch_size)
    backend = distributed.get_backend()
    store = _store_of_first(world)
    distributed.destroy_process_group()
    if rank >= count:
        return False
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    return True


def _store_of_first(world: int) -> Any:
    """A store on rank 0, at a free port; rank 0 broadcasts its address through the present group."""
    from ray.util import get_node_ip_address

    first = distributed.get_rank() == 0
    box: list[Any] = [None]
    if first:
        host = get_node_ip_address()
        store = _store(host, 0, world, first)
        box = [(host, store.port)]
    distributed.broadcast_object_list(box)
    return store if first else _store(box[0][0], box[0][1], world, first)


def _store(host: str, port: int, world: int, first: bool) -> Any:
    patience = timedelta(seconds=JOIN_SECONDS)
    make: Any = distributed.TCPStore  # type: ignore[attr-defined]
    return make(host, port, world, is_master=first, wait_for_workers=False, timeout=patience)
