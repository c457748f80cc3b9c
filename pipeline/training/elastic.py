"""A number of workers that follows the cluster: ``workers`` of ``2:8`` takes what there is between two and eight.

Ray Train starts as many workers as the cluster has room for, and starts all of them again, from the latest
checkpoint, when there is room for more or a node is lost. Since an order of samples decides every batch, any of these
numbers trains the same run; only a batch has to be shared evenly, as the losses' gathering of features is. Of workers
whose number does not divide the batch the largest number that does trains, and the others wait for the next start.
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
    """Leave the process group of all workers to those that share a batch; returns whether this one does.

    All workers must call. The new group has the old one's backend, and meets at a store of rank 0.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    count = sharing(world, batch_size)
    if count == world:
        return True
    if rank == 0:
        logger.warning("%d of %d workers train, since only so many can share %d samples", count, world, batch_size)
    backend = distributed.get_backend()
    store = _store_of_first(world)
    distributed.destroy_process_group()
    if rank >= count:
        return False
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    return True


def _store_of_first(world: int) -> Any:
    """A store that rank 0 serves, at a port that was free; the others are told of it through the present group."""
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
