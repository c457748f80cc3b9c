"""The plans of a run's batches, for methods whose batches follow from the weights: one file for each epoch.

    {run}/plans/epoch-00003.parquet   column ``sample``, int64, batch after batch; its metadata say from what it follows

At the start of an epoch rank 0 makes the plan by the weights of that moment, and writes it before the first step.
Checkpoints record its digest. A run that resumes in the middle of the epoch reads the same plan, so it sees the same
batches. One that resumes at an earlier epoch makes the plan again, unless its weights turn out to be the same.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import ClipmillError, DataError
from pipeline.loaders.order import Integers
from pipeline.loaders.planned_order import PlannedOrder
from pipeline.models.method import BatchPlanner, Method
from pipeline.models.towers.weights import weights_digest
from pipeline.shards.snapshot import Snapshot
from pipeline.training import distributed
from pipeline.training.run import RunPlan
from pipeline.training.sample_features import FeatureWork, sample_features

logger = logging.getLogger(__name__)

FOLDER, COLUMN, FACTS = "plans", "sample", b"clipmill.plan"
PAUSE = 0.2  # seconds between two looks of the other ranks at rank 0's work

Made = tuple[Integers, str]
"""A plan's sample numbers, batch after batch, and its digest."""


class BatchPlans:
    """Makes or reads the plan of each epoch that ``order`` follows."""

    def __init__(self, plan: RunPlan, order: PlannedOrder, planner: BatchPlanner, device: torch.device) -> None:
        assert isinstance(plan.snapshot, Snapshot)
        self._plan, self._order, self._planner, self._device = plan, order, planner, device
        self._snapshot = plan.snapshot
        self._folder = plan.folder.folder(FOLDER)

    def follow(self, step: int, method: Method, digest: str) -> tuple[range, str]:
        """Set the order to the epoch of ``step``; the steps up to its end, and the digest of its plan.

        ``digest`` is that of the checkpoint from which a run starts in the middle of an epoch. All ranks must call.

        Raises:
            DataError: that plan is missing or changed, or the data cannot be read.
        """
        epoch, inside = divmod(step, self._order.epoch_steps)
        make = (lambda: self._stored(epoch, digest)) if inside else (lambda: self._made(epoch, method))
        numbers, digest = _by_first(make)
        self._order.follow(epoch, numbers.reshape(self._order.epoch_steps, self._order.batch_size))
        return range(step, min((epoch + 1) * self._order.epoch_steps, self._plan.steps)), digest

    def _made(self, epoch: int, method: Method) -> Made:
        """The plan of an epoch by the weights of ``method``; the file's, if it follows from the same."""
        facts = {
            "seed": self._plan.run.seed,
            "epoch": epoch,
            "snapshot": self._snapshot.digest,
            "weights": weights_digest(method.state_dict()),
            "batch_size": self._order.batch_size,
        }
        known = self._read(epoch)
        if known is not None and known[1] == facts:
            return known[0], _digest(*known)
        began = time.perf_counter()
        work = FeatureWork(self._plan, self._planner, self._snapshot, epoch, dict(method.description()))
        features = sample_features(method, work, self._device)
        steps, size = self._order.epoch_steps, self._order.batch_size
        numbers = self._planner.plan(features.to(self._device), steps, size, seed=self._plan.run.seed, epoch=epoch)
        self._write(epoch, numbers.ravel(), facts)
        seconds = time.perf_counter() - began
        logger.info("planned the %d batches of epoch %d in %.1f s: %s", steps, epoch, seconds, self._name(epoch))
        return numbers.ravel(), _digest(numbers.ravel(), facts)

    def _stored(self, epoch: int, digest: str) -> Made:
        """The plan of an epoch that has begun."""
        known = self._read(epoch)
        if known is None or _digest(*known) != digest:
            problem = "is missing" if known is None else "is not the one of the latest checkpoint"
            raise DataError(
                f"{self._folder.join(self._name(epoch))} {problem}: its epoch cannot go on; start another run"
            )
        return known[0], digest

    def _read(self, epoch: int) -> tuple[Integers, dict[str, Any]] | None:
        """Numbers and facts of a plan; ``None`` if there is none, or a broken one."""
        try:
            table = pq.read_table(io.BytesIO(self._folder.read_bytes(self._name(epoch))))
            facts = json.loads((table.schema.metadata or {})[FACTS])
            numbers: Integers = table[COLUMN].to_numpy()
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read (%s)", self._folder.join(self._name(epoch)), error)
            return None
        whole = len(numbers) == self._order.epoch_steps * self._order.batch_size and numbers.dtype == np.int64
        inside = whole and 0 <= int(numbers.min()) and int(numbers.max()) < self._order.samples
        return (numbers, facts) if inside and isinstance(facts, dict) else None

    def _write(self, epoch: int, numbers: Integers, facts: dict[str, Any]) -> None:
        table = pa.table({COLUMN: pa.array(numbers, pa.int64())})
        content = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts).encode()}), content)
        self._folder.write_atomic(self._name(epoch), content.getvalue())

    def _name(self, epoch: int) -> str:
        return f"epoch-{epoch:05d}.parquet"


def _digest(numbers: Integers, facts: dict[str, Any]) -> str:
    """SHA-256 hex of a plan and of what it follows from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + numbers.tobytes()).hexdigest()


def _by_first(work: Callable[[], Made]) -> Made:
    """The result of ``work`` in rank 0, or its error, on every rank.

    A broadcast that waits for minutes would exceed the process group's time limit, so ranks ask again and again.
    """
    if distributed.world() == 1:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        future = pool.submit(work) if distributed.rank() == 0 else None
        while not distributed.from_first(future is not None and future.done()):
            time.sleep(PAUSE)
        found = distributed.from_first(_outcome(future))
    if isinstance(found, ClipmillError):
        raise found
    assert found is not None, "rank 0 sends a result"
    return found


def _outcome(future: Future[Made] | None) -> Made | ClipmillError | None:
    """What rank 0 sends; other ranks have nothing."""
    try:
        return None if future is None else future.result()
    except ClipmillError as error:
        return error
