"""Checkpoints written beside the training: a step only copies, a thread of rank 0 writes and uploads.

The copy goes to CPU memory that is pinned where the weights are on a GPU, and is kept for the next checkpoint. There it
runs in the order of the GPU's work, so not even the step waits for it; the thread does. At most one checkpoint is
under way: the next one waits for it, and how long is measured.

A store that is away is tried again, with pauses of one second to a minute, until ``checkpoint_patience_minutes`` are
over; training goes on meanwhile, up to its next checkpoint. What waiting does not mend (a full disk, a refused key) and
an outage that lasts longer end the training: at the next checkpoint, or at the end.
"""

import errno
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import require
from pipeline.errors import StorageError
from pipeline.models.method import Method
from pipeline.shards.storage import storage_errors
from pipeline.training import distributed
from pipeline.training.checkpoint import Checkpoints, Content, Meta, text_files

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
_LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Which checkpoints are kept besides the newest ones, and how long a store may be away."""

    keep_best: int = 0
    """Checkpoints with the best evaluations that are kept, by --keep-best-metric."""
    keep_best_metric: str = ""
    """Such as zeroshot/imagenet/top1; with a minus before it, lower is better."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of so many steps are kept for good."""
    checkpoint_patience_minutes: float = 15.0
    """How long a store that is away is tried again before the run stops; training goes on up to its next checkpoint."""

    def __post_init__(self) -> None:
        require(self.keep_best >= 0, "keep_best", self.keep_best, "0 or more")
        require(
            bool(self.keep_best) == bool(self.keep_best_metric.removeprefix("-")),
            "keep_best_metric",
            self.keep_best_metric,
            "a metric where --keep-best is 1 or more, and only there",
        )
        every = self.keep_every_steps
        require(every is None or every >= 1, "keep_every_steps", every, "1 or more, or none")
        minutes = self.checkpoint_patience_minutes
        require(minutes >= 0, "checkpoint_patience_minutes", minutes, "0 or more")


class CheckpointWriter:
    """Writes the checkpoints of a run from a thread, one at a time; rank 0 has one.

    ``keep`` and ``keep_waiting`` are those of :meth:`Checkpoints.prune`, which runs after each checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, saving: Saving, keep: int, keep_waiting: int) -> None:
        self.checkpoints, self.saving = checkpoints, saving
        self.keep, self.keep_waiting = keep, keep_waiting
        self._measures: dict[str, float] = {}
        self._staging = Staging()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def save(
        self,
        method: Method,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Any] | None,
        meta: Meta,
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy what a checkpoint holds and begin to write it, once the one before is written.

        Raises:
            StorageError: the one before could not be written.
        """
        began = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - began
        described, texts = text_files(method)
        copied, ready = self._staging.copy(_tree(weights, optimizer, ema))
        content = Content(meta=replace(meta, description=described), texts=texts, **copied)
        self._thread = threading.Thread(target=self._write, args=(content, ready), name="clipmill-checkpoint")
        self._thread.daemon = True  # an exit that does not come by close() must not wait for a store
        self._thread.start()
        copying = time.perf_counter() - began - waited
        self._measures = {"perf/checkpoint_wait": waited, "perf/checkpoint_copy": copying}

    def finish(self) -> None:
        """Wait for the checkpoint under way. Raises as :meth:`save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def measures(self) -> dict[str, float]:
        """Seconds that the training waited for the checkpoint before, and copied; once for each checkpoint."""
        measures, self._measures = self._measures, {}
        return measures

    def close(self) -> None:
        """End, whether all is well or not: the checkpoint under way is tried once more at most, nothing is raised."""
        self._closing.set()
        try:
            self.finish()
        except Exception as error:  # the error that ends the training is on its way already
            logger.error("the checkpoint under way was not written: %s", error)

    def _write(self, content: Content, ready: "torch.cuda.Event | None") -> None:
        try:
            if ready is not None:
                ready.synchronize()
            self._write_through_outages(content)
            logger.info("checkpoint %s", self.checkpoints.at(content.meta.step).uri)
            self._prune()
        except Exception as error:  # raised in the training's thread, see finish()
            self._error = error

    def _write_through_outages(self, content: Content) -> None:
        until = time.monotonic() + 60 * self.saving.checkpoint_patience_minutes
        pause = FIRST_PAUSE
        while True:
            try:
                self.checkpoints.write(content)
                return
            except StorageError as error:
                if not may_pass(error) or self._closing.is_set() or time.monotonic() + pause > until:
                    raise
                logger.warning("%s; training goes on, and this is tried again in %.0f s", error, pause)
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _prune(self) -> None:
        saving = self.saving
        try:
            with storage_errors(self.checkpoints.folder.uri):
                self.checkpoints.prune(
                    self.keep,
                    self.keep_waiting,
                    best=saving.keep_best,
                    metric=saving.keep_best_metric,
                    every_steps=saving.keep_every_steps,
                )
        except StorageError as error:
            logger.warning("older checkpoints stay until the next one is written: %s", error)


def assist(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, ema: Mapping[str, Tensor] | None = None
) -> None:
    """What the other ranks do while rank 0 saves: they give their parts of sharded tensors."""
    _give(_tree(weights, optimizer, ema))


def _tree(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, ema: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What is copied, in the order in which all ranks go through it."""
    return {"weights": weights, "ema": ema, "optimizer": optimizer}


def _give(value: Any) -> None:
    if isinstance(value, Tensor):
        distributed.whole(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _give(item)


class Staging:
    """CPU memory for a checkpoint's tensors, used again for each checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tree: Mapping[str, Any]) -> tuple[dict[str, Any], "torch.cuda.Event | None"]:
        """``tree`` with its tensors copied, and what to wait for before they are read, where they come from a GPU."""
        copied: dict[str, Any] = self._copy(tree, "")
        if not any(buffer.is_pinned() for buffer in self._buffers.values() if torch.cuda.is_available()):
            return copied, None
        ready = torch.cuda.Event()
        ready.record()
        return copied, ready

    def _copy(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            value = distributed.whole(value.detach())
            return self._buffer(value, place).copy_(value, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(item, f"{place}/{number}") for number, item in enumerate(value)]
        return value

    def _buffer(self, tensor: Tensor, place: str) -> Tensor:
        known = self._buffers.get(place)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            # The same order in memory (channels last), since fused optimisers step through state and weights alike.
            known = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers[place] = known
        return known


def may_pass(error: StorageError) -> bool:
    """Whether waiting may mend it: a store that is away or overloaded, not a full disk or a refused key."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not isinstance(cause, _LASTING) and cause.errno not in _FULL
    return cause is not None and type(cause).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
