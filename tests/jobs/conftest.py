"""The jobs as users type them, and a Ray of several nodes on this machine, with the kinds of node of cluster.yaml."""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"

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
    # A node that is killed is dead after five failed checks: 2.5 seconds rather than 15.
    head["_system_config"] = {"health_check_period_ms": 500}

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


def load_job(name: str, module_name: str = "job") -> dict[str, Any]:
    """What the script ``jobs/{name}.py`` defines; as a module, since tyro wants to find its source."""
    spec = importlib.util.spec_from_file_location(module_name, JOBS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


Type = Callable[..., int]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Type:
    """``job("export_model", "smoke")`` types a command line in an empty folder and gives the exit code.

    A new sqlite store of MLflow is a copy: its tables take three seconds to make.
    """

    def copied_store(path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(request.getfixturevalue("migrated_store"), path)

    def run(name: str, *words: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(JOBS / f"{name}.py"), *words])
            patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
            try:
                load_job(name, "__main__")
            except SystemExit as end:
                return int(end.code or 0)
            return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.tracking.store.create_sqlite", copied_store)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return run
