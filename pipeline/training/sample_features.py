"""Features of all samples of a training snapshot by the model of this moment, for plans of batches.

A shard is a unit of work: of a Ray Data stage where the training runs on Ray and the cluster has a free CPU, else of
this process. A sample is read as the training reads it at its position in the epoch, replacement of unreadable samples
included, and encoded in evaluation mode in float32. So the features are a function of the seed, the epoch, the snapshot
and the weights, up to rounding.
"""

import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ClipmillError
from pipeline.loaders.batches import training_batches
from pipeline.loaders.order import Integers
from pipeline.models.method import BatchPlanner, Method, method_class, method_name
from pipeline.shards.snapshot import Snapshot
from pipeline.stages.shard_tasks import data_resource
from pipeline.training.run import RunPlan

logger = logging.getLogger(__name__)

AT_ONCE = 32  # samples of a batch; each may hold many parts, such as pairs of clips and texts


@dataclass(frozen=True)
class FeatureWork:
    """What the features follow from besides the weights; ``description`` are the method's text files."""

    plan: RunPlan
    planner: BatchPlanner
    snapshot: Snapshot
    epoch: int
    description: Mapping[str, str]

    def bounds(self) -> list[int]:
        """The number of the first sample of each shard, and of all samples."""
        return [0, *accumulate(shard.samples for shard in self.snapshot.shards)]


@dataclass(frozen=True)
class SamplesInTurn:
    """An order of the samples ``first`` to ``stop`` in one epoch, ``AT_ONCE`` in a batch."""

    epoch: int
    first: int
    stop: int
    lanes = 1

    def steps(self, epochs: float = 1) -> int:
        """Batches of all these samples."""
        return -(-(self.stop - self.first) // AT_ONCE)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Integers:
        """int64 [B, 2] of (epoch, number)."""
        numbers = np.arange(self.first, self.stop)[step * AT_ONCE : (step + 1) * AT_ONCE]
        return np.stack([np.full(len(numbers), self.epoch), numbers], axis=1)


def sample_features(method: Method, work: FeatureWork, device: torch.device) -> Tensor:
    """Float32 [N, D] on the CPU: the planner's features of all samples, by the weights of ``method``.

    Raises:
        DataError: a damaged shard, or one without a readable sample.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in method.state_dict().items()}
    shards = range(len(work.snapshot.shards))
    if work.plan.run.most_workers and (free := _free_cpus()):
        parts = dict(_by_ray(work, weights, min(free, len(shards))))
    else:
        maker = MakeSampleFeatures(work, weights, device)
        parts = {number: maker.features(number) for number in shards}
    return torch.from_numpy(np.concatenate([parts[number] for number in shards]))


class MakeSampleFeatures:
    """Holds a copy of the model; gives the features of the samples of a shard."""

    def __init__(self, work: FeatureWork, weights: Any, device: torch.device | None = None) -> None:
        """``weights`` are tensors by name, or a reference to them in Ray's object store."""
        self._work, self._device = work, device or torch.device("cpu")
        if not isinstance(weights, Mapping):
            import ray

            weights = ray.get(weights)
        config = work.plan.method
        self._method = method_class(method_name(config)).restored(config, work.description)
        self._method.load_state_dict(weights)
        self._method.to(self._device).eval()

    def features(self, number: int) -> NDArray[np.float32]:
        """Float32 [n, D] of shard ``number``."""
        work, run = self._work, self._work.plan.run
        order = SamplesInTurn(work.epoch, *work.bounds()[number : number + 2])
        settings = self._method.reader_settings(run)
        readers = self._method.readers(train=True, seed=run.seed, settings=settings)
        loader = replace(run.loader, loader_workers=0, image_decoder="cpu")
        batches = training_batches(work.snapshot, readers, order, steps=range(order.steps()), config=loader)
        with closing(batches), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            parts = [self._of_batch(batch) for batch in batches]
        return np.concatenate(parts)

    def _of_batch(self, batch: Mapping[str, Tensor]) -> NDArray[np.float32]:
        on_device = {key: value.to(self._device) for key, value in batch.items()}
        found: NDArray[np.float32] = self._work.planner.features(self._method, on_device).float().cpu().numpy()
        return found

    def __call__(self, batch: Any) -> Any:
        """The actor's step: ``number`` of shards to their ``features`` as bytes, or an error."""
        contents, widths, errors = [], [], []
        for number in batch["number"]:
            try:
                found = self.features(int(number))
                contents.append(found.tobytes())
                widths.append(found.shape[1])
                errors.append(b"")
            except ClipmillError as error:
                # Ray passes on only the text of an actor's exception.
                contents.append(b"")
                widths.append(0)
                errors.append(pickle.dumps(error))
        columns = {"features": np.array(contents, object), "error": np.array(errors, object)}
        return {"number": batch["number"], "width": np.array(widths), **columns}


def _free_cpus() -> int:
    """CPUs of the cluster that neither the training nor others hold."""
    import ray

    return int(ray.available_resources().get("CPU", 0)) if ray.is_initialized() else 0


def _by_ray(work: FeatureWork, weights: Mapping[str, Tensor], actors: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The features of each shard by a pool of actors with one CPU each."""
    import ray

    rows = [{"number": number} for number in range(len(work.snapshot.shards))]
    stored = ray.put(weights)  # kept here, for actors that are started again
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        MakeSampleFeatures,
        fn_constructor_args=(work, stored),
        batch_size=1,
        batch_format="numpy",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        resources=data_resource(dict(ray.cluster_resources())),
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        columns = (batch[name] for name in ("number", "width", "features", "error"))
        for number, width, content, error in zip(*columns, strict=True):
            if error:
                raise pickle.loads(error)
            yield int(number), np.frombuffer(content, np.float32).reshape(-1, int(width))
