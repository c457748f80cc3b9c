"""One piece of work on several workers of a Ray cluster, as a process group: how an adaptation shares its classes.

It is for a thousand classes and a large text tower. Small adaptations are better run side by side, one worker each.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any, cast

import torch

from pipeline.config import require
from pipeline.errors import ClipmillError, DataError
from pipeline.stages.ray_session import connect, log_as_job

Work = Callable[[torch.device], object]
"""Called in every worker with its device, in a process group; pickles. What it gives back is lost: rank 0 writes."""


def on_workers(work: Work, *, workers: int, use_gpu: bool = False, cpus_per_worker: int = 1) -> None:
    """Run ``work`` once on each of ``workers`` workers, which form a process group.

    With :func:`pipeline.training.adapt.adapt` in it, the classes of a learned prompt are spread over the workers.

    Raises:
        ClipmillError: what ``work`` raised, as it raised it.
        SettingError: more workers than this machine has room for, where no cluster could grow.
        DataError: a worker was lost.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    connect()
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    _check_room(workers, resources)
    with tempfile.TemporaryDirectory(prefix="clipmill-adapt-") as scratch:
        trainer = TorchTrainer(
            cast(Any, _worker),
            train_loop_config={"work": ray.put(work), "threads": cpus_per_worker},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=RunConfig(storage_path=scratch),
        )
        try:
            result: Any = trainer.fit()
        except TrainingFailedError as error:
            raise DataError(f"a worker of the adaptation was lost: {error}") from error
    if result.return_value is not None:
        raise result.return_value


def _check_room(workers: int, resources: dict[str, int]) -> None:
    """A cluster may grow; a private one on this machine cannot, and would wait in vain."""
    import ray

    cluster = dict(ray.cluster_resources())
    fits = min(int(cluster.get(name, 0) / each) for name, each in resources.items())
    private = "RAY_ADDRESS" not in os.environ
    require(workers <= fits or not private, "workers", workers, f"at most {fits} on this machine")


def _worker(config: dict[str, Any]) -> ClipmillError | None:
    """What Ray Train runs in each worker; the error that all of them met, since Ray would keep its text alone."""
    import ray
    from ray.train.torch import get_device

    log_as_job()
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(config["threads"])
    try:
        ray.get(config["work"])(device)
    except ClipmillError as error:
        return error
    return None
