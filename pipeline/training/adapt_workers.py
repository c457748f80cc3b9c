"""One adaptation on several workers of a Ray cluster, which share the classes of a learned prompt.

It is for a thousand classes and a large text tower. Small ones are better run as many at a time, one worker each.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from pipeline.config import require
from pipeline.errors import ClipmillError, DataError
from pipeline.models.adapters.adapter import FrozenClip
from pipeline.shards.storage import Folder
from pipeline.stages.ray_session import connect
from pipeline.training import distributed
from pipeline.training.adapt import Adapted, Labelled, adapt
from pipeline.training.adapt_artifact import save
from pipeline.training.adapt_recipes import Recipe

logger = logging.getLogger(__name__)

MakeClip = Callable[[torch.device], FrozenClip]
"""Loads CLIP on a device, in the process that will use it; pickles."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The arguments of :func:`pipeline.training.adapt.adapt`, but for CLIP: they travel."""

    method: str
    config: Any
    recipe: Recipe | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Labelled
    validation: Labelled
    seed: int = 0

    def run(self, clip: FrozenClip) -> Adapted:
        """Adapt; raises as :func:`pipeline.training.adapt.adapt`."""
        names = ("method", "config", "recipe", "classes", "templates", "train", "validation", "seed")
        values = {name: getattr(self, name) for name in names}
        return adapt(clip=clip, **values)


def adapt_on_workers(
    work: Adaptation,
    make_clip: MakeClip,
    folder: Folder,
    *,
    workers: int,
    use_gpu: bool | None = None,
    cpus_per_worker: int = 1,
    about: Mapping[str, str] | None = None,
) -> None:
    """Run ``work`` on ``workers`` workers and save it in ``folder``, which all of them reach.

    :func:`pipeline.training.adapt_artifact.load_adapted` reads it back. ``use_gpu`` ``None``: where there are some.

    Raises:
        SettingError, DataError: as :func:`pipeline.training.adapt.adapt`; or more workers than classes.
        StorageError: the folder cannot be written.
    """
    require(1 <= workers <= len(work.classes), "workers", workers, f"1 to {len(work.classes)}, the number of classes")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    connect()
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = ray.cluster_resources().get("GPU", 0) >= workers if use_gpu is None else use_gpu
    config = {"work": ray.put(work), "make_clip": make_clip, "folder": folder.uri, "about": dict(about or {})}
    with tempfile.TemporaryDirectory(prefix="clipmill-adapt-") as scratch:
        trainer = TorchTrainer(
            cast(Any, _worker),
            train_loop_config={**config, "threads": cpus_per_worker},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpu else {})},
            ),
            run_config=RunConfig(storage_path=scratch),
        )
        try:
            result: Any = trainer.fit()
        except TrainingFailedError as error:
            raise DataError(f"a worker of the adaptation was lost: {error}") from error
    if result.return_value is not None:
        raise result.return_value


def _worker(config: Mapping[str, Any]) -> ClipmillError | None:
    """What Ray Train runs in each worker, in a process group; the error that all of them met."""
    import ray
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(config["threads"])
    work: Adaptation = ray.get(config["work"])
    try:
        adapted = work.run(config["make_clip"](device))
        if distributed.rank() == 0:
            save(adapted, Folder(config["folder"]), config["about"])
    except ClipmillError as error:
        return error
    return None
