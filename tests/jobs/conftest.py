"""A Ray of several nodes on this machine, with the kinds of node of cluster.yaml."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

# Which node a worker process is on: its raylet has this in its environment.
NODE = "TEST_NODE"


@dataclass(frozen=True)
class Nodes:
    """The cluster, for sub-processes: all its nodes share this process's address, so jobs must not run in here."""

    cluster: Any
    train: tuple[Any, Any]
    add: Callable[[str, str], Any]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with ``RAY_ADDRESS`` set to the cluster."""
        return {**os.environ, "RAY_ADDRESS": self.cluster.address}


@pytest.fixture(scope="module")
def nodes(s3_endpoint: str) -> Iterator[Nodes]:
    """A head without CPUs, one data node and two training nodes.

    ``add_node`` sets signal handlers, so this has to run in the main thread, where pytest runs fixtures.
    """
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need short paths
    small = {"object_store_memory": 100 * 2**20, "num_gpus": 0}
    head = {"num_cpus": 0, "resources": {"data_worker": 1, "train_worker": 1}, "include_dashboard": False, **small}

    def add(name: str, resource: str) -> Any:
        return cluster.add_node(num_cpus=2, resources={resource: 2}, env_vars={NODE: name}, **small)

    with pytest.MonkeyPatch.context() as patch:
        # Here, and not in /tmp/ray, Cluster leaves a note for whoever looks for "the" Ray of this machine.
        patch.setenv("RAY_TMPDIR", folder)
        os.mkdir(f"{folder}/ray")
        cluster = Cluster(initialize_head=True, connect=False, head_node_args={**head, "env_vars": {NODE: "head"}})
        add("data", "data_worker")
        train = (add("train-0", "train_worker"), add("train-1", "train_worker"))
    yield Nodes(cluster, train, add)
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
