"""The loop that optimises images: render, compare, step; restartable, and deterministic by seed.

N images of one method are optimised together. Every parameter has the images as its first dimension, and every random
number is a function of an image's seed and the step. So an image is the same alone and in any batch, up to rounding,
and an interrupted optimisation goes on as if it had not been. Losses of images are summed, and Adam acts on each number
by itself, so images do not disturb each other.

A loss or a gradient that is not finite sends the batch back to its last checkpoint. The images that had it go on from
there with half the rate; the others repeat their steps. An image that has it more than five times has failed: it stays
as it was at the checkpoint, and the others go on.
"""

import copy
import io
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import require
from pipeline.errors import DataError
from pipeline.generation.guides import Guide
from pipeline.generation.streams import Draw, generators

logger = logging.getLogger(__name__)

MOST_RETRIES = 5
"""Of one image; the next loss that is not finite is its end."""


class Picture(nn.Module, ABC):
    """N images as parameters, and buffers, whose first dimension is N."""

    @abstractmethod
    def render(self) -> Tensor:
        """The images float [N, 3, H, W], 0 to 1, with gradients."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of torch's Adam: ``params`` and ``lr``."""

    def shown(self) -> Tensor:
        """The images that are evaluated and kept, like :meth:`render`; a moving average may replace the last state."""
        return self.render()

    def penalties(self, step: int) -> dict[str, Tensor]:
        """Named losses float [N] of the parameters themselves in this step, from 0."""
        return {}

    def rates(self, progress: float) -> Sequence[float]:
        """The factor of each group's rate at this part of the steps, 0 to 1."""
        return [1.0] * len(self.parameter_groups())

    def after_step(self) -> None:  # noqa: B027  # some have no limits
        """Called after every step: limits of the parameters."""

    def drawings(self) -> list[str]:
        """The images as SVG; empty for images that are none."""
        return []


class Objective(Protocol):
    """What makes an image better."""

    def losses(self, images: Tensor, random: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Named losses float [N] of images [N, 3, H, W]; ``random`` has a generator for each image."""
        ...

    def evaluation(self, images: Tensor) -> Tensor:
        """The loss without random augmentation, float [N]."""
        ...

    def references(self, guide: Guide) -> Tensor:
        """What a judge compares the images with: unit vectors float32 [N, D]."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of the optimisation."""

    steps: int = 1000
    """Steps of each image."""
    evaluate_every: int = 10
    """Steps between evaluations without augmentation, and scores of the judge."""
    checkpoint_every: int = 50
    """Steps between checkpoints, to which an interrupted image returns."""
    patience: int = 0
    """Stop an image after this many evaluations in a row that change by at most `least_change`; 0 never stops."""
    least_change: float = 1e-5
    """See `patience`."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(self.least_change >= 0, "least_change", self.least_change, "0 or more")


@dataclass
class LoopProgress:
    """What is known of N images after some steps; it is stored with a checkpoint."""

    step: int = 0
    scale: list[float] = field(default_factory=list)
    """Factor of each image's rate: halved after losses that are not finite, 0 once it has stopped."""
    retries: list[int] = field(default_factory=list)
    """How often each image went back because its loss was not finite."""
    failed: list[bool] = field(default_factory=list)
    """Whether each image was given up, after too many of them."""
    ended: list[int | None] = field(default_factory=list)
    """The last step of each image that has stopped before the others; none for all steps."""
    seconds: float = 0.0
    """Time of all steps, also before an interruption."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """For each evaluation: ``step``, and by name a list of N numbers."""

    @classmethod
    def of(cls, count: int) -> "LoopProgress":
        """The progress of ``count`` images before the first step."""
        return cls(scale=[1.0] * count, retries=[0] * count, failed=[False] * count, ended=[None] * count)

    def steps(self, image: int) -> int:
        """The steps that one image has taken."""
        ended = self.ended[image]
        return self.step if ended is None else ended

    def numbers(self, image: int) -> list[dict[str, float]]:
        """The entries of the history about one image, up to its last step."""
        found = []
        for entry in self.history:
            if entry["step"] <= self.steps(image):
                values = {name: float(some[image]) for name, some in entry.items() if name != "step"}
                found.append({"step": float(entry["step"]), **values})
        return found


Watch = Callable[[LoopProgress, Tensor], None]
Save = Callable[[bytes], None]


class Optimization:
    """N images, what makes them better, and how far they are."""

    def __init__(
        self,
        picture: Picture,
        objective: Objective,
        config: LoopConfig,
        seeds: Sequence[int],
        judge: Guide | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """``names`` are those of the images in the log; none for their seeds."""
        self.names = list(names) or [f"seed {seed}" for seed in seeds]
        self.picture, self.objective, self.config, self.seeds = picture, objective, config, list(seeds)
        self.optimizer = torch.optim.Adam(picture.parameter_groups())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = LoopProgress.of(len(self.seeds))
        self.judge = judge
        self.references = None if judge is None else objective.references(judge)
        for name, parameter in (*picture.named_parameters(), *picture.named_buffers()):
            assert len(parameter) == len(self.seeds), f"{name} has {len(parameter)} images of {len(self.seeds)}"

    def run(self, save: Save | None = None, watch: Watch | None = None) -> LoopProgress:
        """All steps that are left.

        ``save`` gets the bytes of each checkpoint; ``watch`` the progress and the images float [N, 3, H, W] after each
        evaluation.
        """
        began = time.monotonic() - self.progress.seconds
        kept = self._state()
        while self.progress.step < self.config.steps and any(self.progress.scale):
            broken = self.step()
            if broken:
                self._go_back(kept, broken)
                continue
            step = self.progress.step
            last = step == self.config.steps
            if step % self.config.evaluate_every == 0 or last:
                images = self.evaluate()
                if watch is not None:
                    watch(self.progress, images)
            if step % self.config.checkpoint_every == 0 or last:
                self.progress.seconds = time.monotonic() - began
                kept = self._state()
                if save is not None:
                    save(self.checkpoint())
        self.progress.seconds = time.monotonic() - began
        return self.progress

    def step(self) -> list[int]:
        """One step of all images that have not stopped; the numbers of those whose loss or gradient is not finite, and
        then no step."""
        progress = self.progress
        factors = self.picture.rates(progress.step / self.config.steps)
        for group, rate, factor in zip(self.optimizer.param_groups, self.rates, factors, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        random = generators(self.seeds, progress.step, Draw.VIEWS)
        losses = self.objective.losses(self.picture.render(), random)
        loss = sum([*losses.values(), *self.picture.penalties(progress.step).values()], torch.zeros(()))
        loss.sum().backward()
        finite = loss.isfinite()
        for parameter in self.picture.parameters():
            if parameter.grad is not None:
                finite = finite & parameter.grad.flatten(1).isfinite().all(1)
        broken = [image for image in (~finite).nonzero()[:, 0].tolist() if progress.scale[image]]
        if not broken:
            self._update()
            progress.step += 1
        return broken

    @torch.no_grad()
    def _update(self) -> None:
        """Adam's step, times each image's factor; a stopped image keeps its parameters and buffers."""
        scales, picture = torch.tensor(self.progress.scale), self.picture
        slowed = bool((scales != 1).any())
        state = [*picture.parameters(), *picture.buffers()]
        before = [one.clone() for one in state] if slowed else []
        self.optimizer.step()
        for old, parameter in zip(before, picture.parameters(), strict=False):
            new = parameter.data
            scale = scales.to(new).view(-1, *[1] * (new.ndim - 1))
            new.copy_(old + scale * (new - old))
        picture.after_step()
        for old, new in zip(before, state, strict=False):
            new[scales == 0] = old[scales == 0]

    @torch.no_grad()
    def images(self) -> Tensor:
        """The images as they are shown: float [N, 3, H, W]."""
        return self.picture.shown()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Add an entry to the history, and stop images that do not change any more; returns the images."""
        images = self.images()
        entry: dict[str, Any] = {"step": self.progress.step, "loss": self.objective.evaluation(images).tolist()}
        if self.judge is not None and self.references is not None:
            entry["judge"] = (self.judge.images(images) * self.references).sum(1).tolist()
        self.progress.history.append(entry)
        self._stop()
        return images

    def _stop(self) -> None:
        patience, history = self.config.patience, self.progress.history
        if not patience or len(history) <= patience:
            return
        for image in range(len(self.seeds)):
            last = [entry["loss"][image] for entry in history[-patience - 1 :]]
            changes = (abs(one - other) for one, other in zip(last, last[1:], strict=False))
            if self.progress.scale[image] and max(changes) <= self.config.least_change:
                self.progress.scale[image], self.progress.ended[image] = 0.0, self.progress.step

    def _go_back(self, kept: dict[str, Any], broken: Sequence[int]) -> None:
        """To the checkpoint ``kept``, which from now on has the smaller rates and the failed images, too."""
        at, progress = self.progress.step, LoopProgress(**kept["progress"])
        for image in broken:
            if progress.retries[image] == MOST_RETRIES:
                progress.scale[image], progress.failed[image], progress.ended[image] = 0.0, True, progress.step
                text = "the loss of %s is not finite at step %d, also with smaller rates: failed, stays at step %d"
                logger.error(text, self.names[image], at, progress.step)
            else:
                progress.retries[image] += 1
                progress.scale[image] /= 2
                text = "the loss of %s is not finite at step %d: it goes on from step %d with half the rate"
                logger.warning(text, self.names[image], at, progress.step)
        kept["progress"] = vars(progress)
        self._restore(kept)

    def _state(self) -> dict[str, Any]:
        state = {
            "picture": self.picture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
            "seeds": self.seeds,
        }
        return copy.deepcopy(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.picture.load_state_dict(state["picture"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.progress = LoopProgress(**copy.deepcopy(state["progress"]))

    def checkpoint(self) -> bytes:
        """Everything that changes, as bytes of torch."""
        stream = io.BytesIO()
        torch.save(self._state(), stream)
        return stream.getvalue()

    def resume(self, content: bytes) -> None:
        """Go on from a :meth:`checkpoint` of the same images.

        Raises:
            DataError: no such checkpoint, or one of other images.
        """
        try:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            if state["seeds"] != self.seeds:
                raise ValueError(f"its seeds are {state['seeds']}")
            if len(state["progress"]["failed"]) != len(self.seeds):
                raise ValueError("it is of other images")
            self._restore(state)
        except (RuntimeError, ValueError, LookupError, TypeError, UnpicklingError, EOFError, OSError) as error:
            raise DataError(f"this is no checkpoint of these images ({str(error).strip()[:200]})") from error
