"""Asynchronous checkpoints: a step only copies the content, and a thread of rank 0 writes and uploads it.

The copy goes to CPU memory, pinned if the weights are on a GPU, which is reused by the next checkpoint. The copy is
queued in the GPU's stream, so the thread waits for it and not the step. At most one checkpoint is in progress: the next
one waits for it, and the waiting time is measured.

An unreachable store is retried, with pauses of one second to a minute, for ``checkpoint_patience_minutes``; meanwhile
training continues up to its next checkpoint. Errors that waiting does not fix (a full disk, a refused key) and longer
outages end the training at the next checkpoint, or at the end.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping
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
    """Which checkpoints to keep besides the newest ones, and how long to retry an unreachable store."""

    keep_best: int = 0
    """Number of checkpoints with the best evaluations to keep, ranked by --keep-best-metric."""
    keep_best_metric: str = ""
    """Metric such as zeroshot/imagenet/top1; a minus before the name means that lower is better."""
    keep_every_steps: int | None = None
    """Keep checkpoints at multiples of this number of steps permanently; none disables it."""
    checkpoint_patience_minutes: float = 15.0
    """Minutes to retry an unreachable store before the run stops; training continues up to its next checkpoint."""

    def __post_init__(self) -> None:
        require(self.keep_best >= 0, "keep_best", self.keep_best, "0 or more")
        require(
            bool(self.keep_best) == bool(self.keep_best_metric.removeprefix("-")),
            "keep_best_metric",
            self.keep_best_metric,
            "a metric if --keep-best is 1 or more, else empty",
        )
        every = self.keep_every_steps
        require(every is None or every >= 1, "keep_every_steps", every, "1 or more, or none")
        minutes = self.checkpoint_patience_minutes
        require(minutes >= 0, "checkpoint_patience_minutes", minutes, "0 or more")


class CheckpointWriter:
    """Writes the checkpoints of a run from a thread, one at a time; rank 0 has one.

    ``keep`` and ``keep_waiting`` are arguments of :meth:`Checkpoints.prune`, which runs after each checkpoint.
    ``before_write`` is called in the thread before each checkpoint is written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        saving: Saving,
        keep: int,
        keep_waiting: int,
        before_write: Callable[[], object] = lambda: None,
    ) -> None:
        self.checkpoints, self.saving, self._before_write = checkpoints, saving, before_write
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
        """Copy the content of a checkpoint and start to write it, after the previous one is written.

        Raises:
            StorageError: the previous one could not be written.
        """
        began = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - began
        described, texts = text_files(method)
        copied, ready = self._staging.copy(_tree(weights, optimizer, ema))
        content = Content(meta=replace(meta, description=described), texts=texts, **copied)
        self._thread = threading.Thread(target=self._write, args=(content, ready), name="clipmill-checkpoint")
        self._thread.daemon = True  # an exit without close() must not wait for a store
        self._thread.start()
        copying = time.perf_counter() - began - waited
        self._measures = {"perf/checkpoint_wait": waited, "perf/checkpoint_copy": copying}

    def finish(self) -> None:
        """Wait for the checkpoint in progress. Raises as :meth:`save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def measures(self) -> dict[str, float]:
        """Seconds that the training waited for the previous checkpoint, and for the copy; once per checkpoint."""
        measures, self._measures = self._measures, {}
        return measures

    def close(self) -> None:
        """End in any case: the checkpoint in progress gets at most one more attempt; raises nothing."""
        self._closing.set()
        try:
            self.finish()
        except Exception as error:  # the error that ends the training is already raised
            logger.error("the checkpoint in progress was not written: %s", error)

    def _write(self, content: Content, ready: "torch.cuda.Event | None") -> None:
        try:
            if ready is not None:
                ready.synchronize()
            self._before_write()
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
                logger.warning("%s; training continues, and the write is repeated in %.0f s", error, pause)
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
    """Called by the other ranks while rank 0 saves: they send their parts of sharded tensors."""
    _give(_tree(weights, optimizer, ema))


def _tree(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, ema: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The tensors to copy, in the same order on all ranks."""
    return {"weights": weights, "ema": ema, "optimizer": optimizer}


def _give(value: Any) -> None:
    if isinstance(value, Tensor):
        distributed.whole(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _give(item)


class Staging:
    """CPU memory for a checkpoint's tensors, reused by each checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tree: Mapping[str, Any]) -> tuple[dict[str, Any], "torch.cuda.Event | None"]:
        """``tree`` with its tensors copied, and the event to wait for before reading them, if they come from a GPU."""
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
            # The same memory format (channels last), because fused optimisers step through state and weights alike.
            known = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers[place] = known
        return known


def may_pass(error: StorageError) -> bool:
    """Whether waiting may fix it: an unreachable or overloaded store, not a full disk or a refused key."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return not isinstance(cause, _LASTING) and cause.errno not in _FULL
    return cause is not None and type(cause).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
