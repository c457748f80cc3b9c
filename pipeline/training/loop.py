"""The training loop: one for all methods, the same in one process and in many.

Every step is a function of its number: its samples, their augmentation, its learning rate, and its random numbers
(dropout), because the generators are seeded in every step. So a checkpoint holds weights, the optimiser's state and one
number, and on CPUs a resumed run equals an uninterrupted one bit for bit.
"""

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.errors import ClipmillError, LeaseLost, StorageError
from pipeline.loaders.batches import Batch, training_batches
from pipeline.loaders.order import RandomStream, random_bits
from pipeline.loaders.planned_order import PlannedOrder
from pipeline.models.method import EmbeddingMethod, Method, build_method, method_class, method_name
from pipeline.training import distributed, fp8
from pipeline.training.batch_plans import BatchPlans
from pipeline.training.blocks import compile_each, recompute_each
from pipeline.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Meta,
    check_position,
    load_method,
    load_optimizer,
    read_weights,
)
from pipeline.training.devices import GpuMemoryError, computes_in_bf16, out_of_memory
from pipeline.training.gradient_cache import backward_in_parts, normalises_batches
from pipeline.training.measure import Profile, make_clock, memory, sizes, tower_norms, towers
from pipeline.training.moving_average import MovingAverage
from pipeline.training.optimizer import make_optimizer, set_rates, take_step
from pipeline.training.preemption import Notice, never
from pipeline.training.run import RunPlan
from pipeline.training.skipping import Skipping
from pipeline.training.tracker import Tracker
from pipeline.training.writer import CheckpointWriter, assist

logger = logging.getLogger(__name__)

TRACKER_SECONDS = 30.0  # that a checkpoint waits for the tracking server; the training goes on

NUMBERS = {(False, False): "float32", (False, True): "bfloat16", (True, True): "float8 and bfloat16"}


class TrainingError(ClipmillError):
    """Training cannot continue, and a restart would fail in the same way."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """The result of a run: its steps, its last checkpoint, and the samples per second of this start."""

    steps: int
    checkpoint: str
    samples_per_second: float = 0.0
    problem: str = ""
    """Why it stopped early; the same on all ranks."""


def run_training(plan: RunPlan, device: torch.device, tracker: Tracker, notice: Notice = never) -> TrainingOutcome:
    """Train ``plan`` to its end, from its latest checkpoint if it has one; all ranks must call.

    Rank 0 uses ``tracker`` and closes it at the end, and calls ``notice`` when it logs. An early end that all ranks
    share (a non-finite loss) is returned: if a worker raised it, Ray Train would only replace the worker and repeat
    the same steps.

    Raises:
        SettingError: the checkpoint was made with other settings.
        DataError, StorageError: data cannot be read, a checkpoint cannot be written.
        GpuMemoryError: a step needs more memory than the GPU has.
    """
    try:
        training = _TrainingState(plan, device, tracker, notice)
    except torch.OutOfMemoryError as error:
        raise _memory_error(plan, device) from error
    try:
        return training.run()
    except TrainingError as error:
        return TrainingOutcome(steps=training.done, checkpoint=training.last_checkpoint, problem=str(error))
    except torch.OutOfMemoryError as error:
        raise _memory_error(plan, device) from error
    finally:
        training.writer.close()
        tracker.close()


class _TrainingState:
    """The state of a run in one process, after ``done`` steps."""

    def __init__(self, plan: RunPlan, device: torch.device, tracker: Tracker, notice: Notice) -> None:
        self.plan, self.config, self.device, self.tracker, self.notice = plan, plan.run, device, tracker, notice
        self.rank, self.world = distributed.rank(), distributed.world()
        self.order = plan.order()
        self.checkpoints = Checkpoints(plan.folder)
        run = plan.run
        # A start after a kill repeats no step before its checkpoint: the points of those steps must be sent by then.
        sent = partial(tracker.flush, TRACKER_SECONDS)
        self.writer = CheckpointWriter(self.checkpoints, run.saving, run.keep_checkpoints, run.keep_waiting, sent)
        latest = self._latest()
        self.done = latest.meta.step if latest else 0
        self.batch_plan = latest.meta.plan if latest else ""
        self.last_checkpoint = latest.folder.uri if latest else ""
        # With channels last, convolutions are 1.4 times as fast on a CPU, and tensor cores need it.
        self.shards = self.config.sharding == "full" and self.world > 1
        form = torch.contiguous_format if self.shards else torch.channels_last  # sharding splits rows
        precision = self.config.precision
        self.bf16 = computes_in_bf16(precision, device)
        self.method = self._method(latest).to(device).to(memory_format=form).train()
        settings, counts = (self.config.batch_size, self.config.measuring), self.rank == 0
        self.clock = make_clock(*settings, self.method, device, bf16=self.bf16, counts=counts)
        self.profile = Profile(self.config.measuring.profiled() if self.rank == 0 else range(0), self.clock, tracker)
        self.towers = towers(self.method)
        self.method.gather = distributed.gather
        self.method.exchange = distributed.exchange(self.config.exchange)
        if precision == "fp8":
            fp8.check_device(device)
            fp8.convert(self.method.blocks())
        if self.config.checkpoint_activations:
            recompute_each(self.method.blocks())
        if self.config.compile_blocks:
            compile_each(self.method.compiled_blocks())
            self.method.compiled = True
        rows = self.config.batch_size // self.world
        self.part = self.config.micro_batch if (self.config.micro_batch or rows) < rows else None
        self.module = self._shared()
        self.optimizer = make_optimizer(self.config.optimizer, self.method)
        if latest:
            load_optimizer(self.optimizer, latest.folder)
        self.average = self._moving_average(latest)
        before = (latest.meta.skipped_steps, latest.meta.skipped_in_row) if latest else (0, 0)
        self.skipping = Skipping(self.method, self.config.max_skipped_steps, device, *before)
        self.warned = before[0]

    def run(self) -> TrainingOutcome:
        if self.rank == 0:
            self._announce()
        for steps in self._known_steps():
            with closing(self._batches(steps)) as batches:
                while self.done < steps.stop:
                    self.profile.before_step(self.done + 1)
                    batch = self.clock.waited(batches)
                    self._step(batch)
                    self.profile.after_step(self.done)
        self.profile.close(self.done)
        self.writer.finish()
        distributed.barrier()
        speed = self.clock.overall()
        return TrainingOutcome(steps=self.done, checkpoint=self.last_checkpoint, samples_per_second=speed)

    def _step(self, batch: Batch) -> None:
        """Train on one batch; log and save at the configured intervals."""
        torch.manual_seed(step_seed(self.config.seed, self.done, self.rank))
        rate = self._set_learning_rate()
        self.clock.unreadable += int(batch.pop("replaced"))
        self.clock.worked(batch)
        with self.clock.phase("copy"):
            on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        self.done += 1
        logs, saves = self._logs(), self._saves()
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        skipped = torch.zeros((), device=self.device)
        for turn in self.method.turns:
            found, skips = self._turn(on_device, turn, norms)
            losses |= found
            skipped = torch.maximum(skipped, skips)
        with self.clock.phase("optimizer"):
            self.method.after_step()
            if self.average is not None:
                self.average.update(self.done, skipped)
        if logs or saves:
            self._stop_if_overtaken()
            self._stop_if_too_many_skipped()
        if logs:
            saves |= self._log(losses, norms, rate)
        if saves:
            with self.clock.phase("save"):
                self._save()

    def _turn(self, batch: Batch, turn: str, norms: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """One update of the weights; adds the norms of its gradients, by tower and of all, to ``norms``.

        Returns:
            the losses, and float [], 1 if the update was skipped.
        """
        self.skipping.before_step()
        losses = self._backward(batch, turn)
        if not losses:
            return {}, torch.zeros((), device=self.device)
        total = torch.stack(list(losses.values())).sum()
        with self.clock.phase("exchange"):
            distributed.average_gradients(self.module)
        if self._logs():
            norms |= tower_norms(self.method, self.towers)
        with self.clock.phase("optimizer"):
            norms[turn] = norm = self._clipped_norm()
            skipped = self.skipping.after_backward(self.done, total, norm)
            take_step(self.optimizer, skipped)
        return losses, skipped

    def _backward(self, batch: Batch, turn: str) -> dict[str, Tensor]:
        """The losses, with their gradients added to the parameters; processes the batch at once or in parts."""
        if self.part is not None:
            assert isinstance(self.method, EmbeddingMethod)
            return backward_in_parts(self.method, batch, self.part, self._precision, self.clock.phase)
        with self.clock.phase("forward"), self._precision():
            losses: dict[str, Tensor] = self.module(batch, turn)
        with self.clock.phase("backward"):
            total = torch.stack(list(losses.values())).sum() if losses else torch.zeros(())
            if total.requires_grad:  # a method may have no trainable parameters
                total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _latest(self) -> Checkpoint | None:
        """The checkpoint to resume from; the same on all ranks."""
        if self.rank == 0:
            self.checkpoints.remove_broken()
        latest = distributed.from_first(self.checkpoints.latest() if self.rank == 0 else None)
        if latest:
            check_position(
                latest,
                batch_size=self.config.batch_size,
                lanes=self.order.lanes,
                seed=self.config.seed,
                snapshot=self.plan.snapshot.digest,
            )
        return latest

    def _method(self, latest: Checkpoint | None) -> Method:
        torch.manual_seed(self.config.seed)  # the same initial weights on all ranks
        method = load_method(latest.folder.uri) if latest else build_method(self.plan.method)
        method.prepare_training()
        return method

    def _shared(self) -> nn.Module:
        """The method as the ranks share it: replicated or sharded."""
        if self.shards:
            return distributed.shard(self.method)
        once = self.part is None and len(self.method.turns) == 1  # a step has one backward pass
        return distributed.parallel(self.method, self.device, whole=once)

    def _moving_average(self, latest: Checkpoint | None) -> MovingAverage | None:
        if self.config.ema_decay is None:
            return None
        average = MovingAverage(self.method, self.config.ema_decay)
        if latest:
            average.restore(read_weights(latest.folder, ema=True))
        return average

    def _known_steps(self) -> Iterator[range]:
        """Steps whose batches are known: all, or those of one epoch after another where the method plans them."""
        if not isinstance(self.order, PlannedOrder):
            yield range(self.done, self.plan.steps)
            return
        planner = type(self.method).batch_planner(self.plan.method)
        assert planner is not None
        plans = BatchPlans(self.plan, self.order, planner, self.device)
        while self.done < self.plan.steps:
            steps, self.batch_plan = plans.follow(self.done, self.method, self.batch_plan)
            yield steps

    def _batches(self, steps: range) -> Generator[Batch, None, None]:
        settings = self.method.reader_settings(self.config)
        return training_batches(
            self.plan.snapshot,
            self.method.readers(train=True, seed=self.config.seed, settings=settings),
            self.order,
            steps=steps,
            rank=self.rank,
            world=self.world,
            config=self.config.loader,
        )

    def _set_learning_rate(self) -> float:
        config = self.config
        return set_rates(self.optimizer, config.optimizer, self.done, config.warmup_steps, self.plan.steps)

    def _clipped_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping; clips it if configured."""
        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        norm = distributed.whole(torch.nn.utils.get_total_norm(gradients))
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.method.parameters(), self.config.clip_grad_norm, norm)
        return norm

    def _stop_if_overtaken(self) -> None:
        """Raise on all ranks if another training took the folder while this one was suspended: it owns the run now."""
        problem = distributed.from_first(self._lost_lease() if self.rank == 0 else "")
        if problem:
            raise TrainingError(problem)

    def _lost_lease(self) -> str:
        try:
            self.checkpoints.folder.check()
        except LeaseLost as error:
            return str(error)
        except StorageError as error:  # a store that does not answer stops no training; writes ask again
            logger.warning("%s", error)
        return ""

    def _stop_if_too_many_skipped(self) -> None:
        """Raise on all ranks if more consecutive steps than allowed had a non-finite loss or gradient on any rank."""
        bad = self.skipping.too_many_since()
        if bad is not None:
            kept = self.last_checkpoint or "there is none"
            raise TrainingError(
                f"the loss or its gradient is not finite at step {bad}; the last checkpoint ({kept}) is from before. "
                "A lower learning_rate, a longer warm-up or clip_grad_norm can help, in another output_folder"
            )

    def _logs(self) -> bool:
        return self.done % self.config.log_every_steps == 0 or self.done in (1, self.plan.steps)

    def _saves(self) -> bool:
        every = self.config.checkpoint_every_steps
        return self._evaluates() or self.done == self.plan.steps or bool(every and self.done % every == 0)

    def _evaluates(self) -> bool:
        every = self.config.evaluate_every_steps
        due = self.done == self.plan.steps or bool(every and self.done % every == 0)
        return self.plan.evaluates and due

    def _log(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], rate: float) -> bool:
        """Log this step; returns whether rank 0 requests a checkpoint: by its clock, or before a preemption."""
        unreadable = torch.tensor(float(self.clock.unreadable), device=self.device)
        gathered = torch.stack([*losses.values(), unreadable]).float()
        *means, unreadable_each = distributed.mean_over_ranks(gathered).tolist()
        measures = {
            "loss": sum(means),
            **dict(zip(losses, means, strict=True)),
            "lr": rate,
            **{f"grad_norm/{place}".rstrip("/"): norm for place, norm in _numbers(norms).items()},
            "skipped_steps": self.skipping.counts()[0],
            **self.method.measures(),
        }
        metrics = {f"train/{name}": value for name, value in measures.items()} | self.clock.interval()
        metrics |= {"data/unreadable": unreadable_each * self.world, **memory(self.device), **self.writer.measures()}
        if self.rank == 0:
            logger.info(
                "step %d of %d: loss %.4f, %.0f samples/s",
                self.done,
                self.plan.steps,
                metrics["train/loss"],
                metrics.get("perf/samples_per_second", 0.0),
            )
            self.tracker.log(metrics, self.done)
            self._warn_of_skipped()
        minutes = self.config.checkpoint_every_minutes
        due = minutes is not None and self.clock.minutes_since_save() >= minutes
        return distributed.from_first(self.rank == 0 and (self.notice() or due))

    def _warn_of_skipped(self) -> None:
        total, row = self.skipping.counts()
        if total > self.warned:
            message = "%d steps were skipped, the last %d of them in a row: their loss or gradient was not finite"
            logger.warning(message, total, row)
        self.warned = total

    def _save(self) -> None:
        """Copy the content of a checkpoint; a thread of rank 0 writes it while training continues."""
        self.clock.saved()
        self.last_checkpoint = self.checkpoints.at(self.done).uri
        averages = self.average.state_dict() if self.average is not None else None
        weights, state = self.method.state_dict(), self.optimizer.state_dict()
        if self.rank != 0:
            assist(weights, state, averages)
            return
        total, row = self.skipping.counts()
        meta = Meta(
            skipped_steps=total,
            skipped_in_row=row,
            step=self.done,
            samples_seen=self.done * self.config.batch_size,
            batch_size=self.config.batch_size,
            lanes=self.order.lanes,
            seed=self.config.seed,
            snapshot=self.plan.snapshot.digest,
            plan=self.batch_plan,
            evaluate=self._evaluates(),
        )
        self.writer.save(self.method, weights, state, meta, averages)

    def _announce(self) -> None:
        config, plan = self.config, self.plan
        logger.info(
            "%s, %s, on %s: %d samples in %d shards; steps %d to %d of %d samples, %d in each of "
            "%d processes on %s, each with %d threads and %d loader processes, in %s",
            method_class(method_name(plan.method)).__name__,
            sizes(self.method, self.towers),
            plan.snapshot.uri,
            plan.snapshot.samples,
            len(plan.snapshot.shards),
            self.done + 1,
            plan.steps,
            config.batch_size,
            config.batch_size // self.world,
            self.world,
            self.device,
            torch.get_num_threads(),
            config.loader.processes(),
            NUMBERS[config.precision == "fp8", self.bf16],
        )
        if config.warmup_steps >= plan.steps:
            logger.warning("the warm-up takes %d steps, the run only %d", config.warmup_steps, plan.steps)
        if self.part is not None and normalises_batches(self.method):
            logger.warning("batch normalisation uses %d rows at a time, not a worker's whole share", self.part)


def _memory_error(plan: RunPlan, device: torch.device) -> GpuMemoryError:
    run, kind = plan.run, method_class(method_name(plan.method))
    saving = {
        "micro_batch": run.micro_batch is not None or not issubclass(kind, EmbeddingMethod),
        "checkpoint_activations": run.checkpoint_activations,
        "bf16": run.precision != "fp32",
        "sharding": run.sharding == "full",
    }
    used = frozenset(name for name, in_use in saving.items() if in_use)
    return out_of_memory(device, run.batch_size // distributed.world(), used)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generators for a step on a rank."""
    return int(random_bits(seed, RandomStream.STEPS, step, rank, 1)[0] >> 1)


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars by name; waits for the device once."""
    return dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
