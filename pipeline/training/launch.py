"""Start a run: in this process, or as workers of a Ray cluster through Ray Train.

Ray Train starts the workers, joins them to one process group, and replaces them all when one dies. It stores no
checkpoints here: the loop finds the latest one in the run's folder. So a restart by Ray Train and a repeated command
work the same way.
"""

import logging
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any, cast

import torch

from pipeline.config import require
from pipeline.errors import ClipmillError
from pipeline.loaders.batches import LoaderConfig
from pipeline.models.method import method_class, method_name
from pipeline.stages.cores import cores
from pipeline.stages.ray_session import connect, log_as_job
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.devices import cuda_problem
from pipeline.training.elastic import join_those_that_share
from pipeline.training.follow import Follower, Record
from pipeline.training.loop import TrainingError, TrainingOutcome, run_training
from pipeline.training.preemption import RayNotice
from pipeline.training.run import RunPlan
from pipeline.training.submit import Evaluate, as_ray_task, in_a_process, in_this_process
from pipeline.training.tracker import LogTracker, OpenTracker

logger = logging.getLogger(__name__)

SHARE = 0.001  # of a node's custom resource: it selects nodes and does not limit the number of workers
LOOK_AGAIN_SECONDS = 10.0  # at most, for workers that the cluster has room for: they are placed at once or not at all


def finished(plan: RunPlan) -> TrainingOutcome | None:
    """The outcome of a finished run, else ``None``."""
    latest = Checkpoints(plan.run.output_folder).latest()
    if latest is None or latest.meta.step < plan.steps:
        return None
    return TrainingOutcome(steps=latest.meta.step, checkpoint=latest.folder.uri)


def launch(plan: RunPlan, open_tracker: OpenTracker = LogTracker) -> TrainingOutcome:
    """Train ``plan`` to its end; does nothing for a finished run.

    Raises:
        TrainingError: the loss or its gradient was not finite.
        ClipmillError: data cannot be read, checkpoints cannot be written, settings do not fit the checkpoints.
    """
    outcome = finished(plan)
    if outcome is not None:
        logger.info("the run in %s is finished: %d steps, %s", plan.run.output_folder, plan.steps, outcome.checkpoint)
        return outcome
    outcome = _on_ray(plan, open_tracker) if plan.run.most_workers else _in_this_process(plan, open_tracker)
    if outcome.problem:
        raise TrainingError(outcome.problem)
    return outcome


def follower(plan: RunPlan, evaluate: Evaluate, record: Record | None = None) -> Follower:
    """The follower that evaluates the checkpoints of ``plan``: in a process, or on the cluster of the training.

    An evaluation gets a GPU if the cluster has one more than the run uses.
    """
    if not plan.run.most_workers:
        return Follower(plan.folder, evaluate, record, in_a_process, in_this_process)
    connect()
    import ray

    cluster = dict(ray.cluster_resources())
    resources = worker_resources(plan, cluster)
    spare_gpu = "GPU" in resources and cluster.get("GPU", 0) > plan.run.most_workers
    submit = as_ray_task(num_cpus=1, num_gpus=1 if spare_gpu else 0)
    return Follower(plan.folder, evaluate, record, submit)


def _in_this_process(plan: RunPlan, open_tracker: OpenTracker) -> TrainingOutcome:
    device = _own_device(plan.run.cluster.accelerator)
    _set_up(device, own_threads(plan.run.loader))
    return run_training(plan, device, open_tracker())


def _own_device(accelerator: str) -> torch.device:
    """The first GPU of this machine, or the CPU; says why where a GPU is asked for and cannot be used."""
    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)  # with its index: torch.cuda.set_device refuses one without
    if accelerator == "gpu":
        logger.warning("training on the CPU: %s", cuda_problem())
    return torch.device("cpu")


def own_threads(loader: LoaderConfig) -> int | None:
    """torch's threads for a training in this process: the cores that its loader leaves, at least one.

    With more threads than free cores, threads wait for one another in every operation, which can cost most of the
    speed. ``None`` if ``OMP_NUM_THREADS`` is set. Workers on Ray have ``cpus_per_worker`` threads instead.
    """
    return None if "OMP_NUM_THREADS" in os.environ else max(1, cores() - loader.processes())


def _on_ray(plan: RunPlan, open_tracker: OpenTracker) -> TrainingOutcome:
    # Ray polls the workers every half second: the time until a dead one is noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    patience, starts = _patience(plan)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    connect()
    import ray
    from ray.train import RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    cluster = dict(ray.cluster_resources())
    resources = worker_resources(plan, cluster)
    method_class(method_name(plan.method)).check_workers(plan.method, "GPU" in resources)
    _check_room(plan, resources, cluster)
    with tempfile.TemporaryDirectory(prefix="clipmill-train-") as scratch:
        trainer = TorchTrainer(
            cast(Any, train_worker),
            train_loop_config={"plan": plan, "open_tracker": open_tracker},
            torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=_number(plan),
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=plan.run.cluster.resize_seconds,
            ),
            # Only the controller writes here, which runs beside this driver; the run has another folder.
            run_config=RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(
                    max_failures=plan.run.cluster.max_failures, controller_failure_limit=starts
                ),
            ),
        )
        try:
            result: Any = trainer.fit()
        except TrainingFailedError as error:
            raise _own_error(error) or error from error
    outcome: TrainingOutcome = result.return_value
    return outcome


def train_worker(config: Mapping[str, Any]) -> TrainingOutcome:
    """The function that Ray Train runs in each worker; a process group exists."""
    from ray.train.torch import get_device

    log_as_job()
    plan: RunPlan = config["plan"]
    device = get_device()
    _set_up(device, plan.run.cluster.cpus_per_worker)
    if not join_those_that_share(plan.run.batch_size):
        return TrainingOutcome(steps=0, checkpoint="")
    is_first = torch.distributed.get_rank() == 0
    return run_training(plan, device, config["open_tracker"]() if is_first else LogTracker(), RayNotice())


def _set_up(device: torch.device, threads: int | None = None) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # operations outside of bfloat16 use TF32
    elif threads is not None:
        torch.set_num_threads(threads)


def worker_resources(plan: RunPlan, cluster: Mapping[str, float]) -> dict[str, float]:
    """The resources of each worker on a cluster that has, at this moment, the resources ``cluster``."""
    wanted = plan.run.cluster
    resources: dict[str, float] = {"CPU": wanted.cpus_per_worker}
    if wanted.accelerator == "gpu" or (wanted.accelerator == "auto" and cluster.get("GPU", 0) > 0):
        resources["GPU"] = 1
    if wanted.train_resource in cluster:
        resources[wanted.train_resource] = SHARE
    return resources


def _check_room(plan: RunPlan, resources: Mapping[str, float], cluster: Mapping[str, float]) -> None:
    """Check the cluster's size: one that is too small may grow, but a private one on this machine cannot."""
    workers = plan.run.fewest_workers
    short = [name for name, each in resources.items() if cluster.get(name, 0) < workers * each]
    if not short:
        return
    name = short[0]
    has = f"{cluster.get(name, 0):.0f} {name}"
    fits = int(cluster.get(name, 0) / resources[name])
    private = "RAY_ADDRESS" not in os.environ
    require(not private, "workers", workers, f"at most {fits} here, since this machine has {has}; 0 needs no Ray")
    logger.warning("%d workers do not fit yet: the cluster has %s; waiting for it to grow", workers, has)


def _patience(plan: RunPlan) -> tuple[float, int]:
    """Seconds to wait for requested workers, and how often to request them again.

    A range of workers is asked for by what the cluster seems to have, which for some 20 seconds counts a node that has
    died: it is better to look again soon than to wait for that one. In all, the wait is 20 times ``resize_seconds``.
    """
    cluster = plan.run.cluster
    if plan.run.fewest_workers == plan.run.most_workers:
        return cluster.start_timeout_seconds, 2
    seconds = min(cluster.resize_seconds, LOOK_AGAIN_SECONDS)
    return seconds, math.ceil(20 * cluster.resize_seconds / seconds)


def _number(plan: RunPlan) -> int | tuple[int, int]:
    fewest, most = plan.run.fewest_workers, plan.run.most_workers
    return most if fewest == most else (fewest, most)


def _own_error(error: Exception) -> ClipmillError | None:
    """The error that a worker raised, if all errors are ours or those of workers that waited for it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    causes = [cause for failure in failures for cause in (failure, failure.__cause__)]
    return next((cause for cause in causes if isinstance(cause, ClipmillError)), None)
