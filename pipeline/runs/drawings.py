"""Many optimised images: methods x prompts or images x seeds, a few together in each task, each finished once.

A task loads its CLIPs once for its process, goes on from its last checkpoint, and writes a PNG, an SVG, a film and a
JSON file of each of its images; the JSON is written last and marks the image as finished. The same command skips
finished images and continues the others.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import product
from math import nan
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import from_plain, near, parse_json, require, to_json
from pipeline.errors import DataError, ImagesFailed, SettingError, unreadable
from pipeline.evaluation.image_codes import load_image_codes
from pipeline.evaluation.models import load_model
from pipeline.generation.guides import Guide
from pipeline.generation.loop import LoopProgress, Optimization
from pipeline.generation.method import (
    GenerationMethod,
    Subject,
    generation_class,
    generation_config,
)
from pipeline.generation.prompts import parse_prompts
from pipeline.generation.views import as_float
from pipeline.models.towers.image_codes import ImageCodes
from pipeline.models.towers.weights import digest_of
from pipeline.runs.drawing_checks import check_subject
from pipeline.runs.films import Film, FilmKind
from pipeline.shards.privacy import masked
from pipeline.shards.storage import Folder, split_file
from pipeline.stages.ray_session import log_as_job
from pipeline.stages.shard_tasks import Workers, run_tasks

logger = logging.getLogger(__name__)

IMAGES, RESULTS, CHECKPOINTS = "images", "results", "checkpoints"
MOST_NAMES = 5
"""Failed images that an error names."""


@dataclass(frozen=True)
class DrawingSpec:
    """A method with overrides of its paper's values: ``clipasso`` or ``clipasso:strokes=8,loop.steps=500``."""

    text: str
    method: str
    config: Any

    def build(self) -> GenerationMethod:
        """The method."""
        return generation_class(self.method)(self.config)


@dataclass(frozen=True)
class SubjectSource:
    """A subject, as it travels to a task: the text of its prompts, or pixels uint8 [H, W, 3] on white."""

    text: str
    """Prompts, or the address of the image."""
    pixels: NDArray[np.uint8] | None = None

    def read(self) -> Subject:
        """The subject of a method; raises ``SettingError`` for prompts that are none."""
        if self.pixels is None:
            return Subject(prompts=parse_prompts(self.text))
        return Subject(image=as_float(self.pixels))

    def files(self) -> tuple[str, ...]:
        """Paths or URIs of image prompts."""
        return () if self.pixels is not None else tuple(one.image for one in parse_prompts(self.text) if one.image)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text and the pixels."""
        pixels = b"" if self.pixels is None else repr(self.pixels.shape).encode() + self.pixels.tobytes()
        return hashlib.sha256(self.text.encode() + pixels).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DrawingUnit:
    """One image: a method's text, a subject's and a seed."""

    method: str
    subject: str
    seed: int

    @property
    def name(self) -> str:
        """``clipdraw-a-red-star-1f0c2a5b77-seed-1``, valid as a file name and different for each image."""
        words = (re.sub(r"[^\w.]+", "-", masked(text)).strip("-") for text in (self.method, self.subject))
        short = (word.encode()[:40].decode(errors="ignore") for word in words)  # names are limited in bytes
        digest = hashlib.sha256(f"{self.method}\n{self.subject}".encode()).hexdigest()[:10]
        return f"{'-'.join(short)}-{digest}-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class DrawingResult:
    """A finished image: its numbers at each evaluation, and its last ones."""

    unit: DrawingUnit
    settings: str
    steps: int
    loss: float
    """Without augmentation; not a number if the image failed before its first evaluation, like ``judge``."""
    judge: float
    """Cosine with its prompts, or its image, of the CLIP that gave no gradients."""
    retries: int
    """How often the image went back because its loss was not finite."""
    seconds: float
    """Of the steps of its batch, from the first to the last, divided by the images of the batch."""
    history: tuple[Mapping[str, float], ...]
    files: tuple[str, ...]
    """Below ``images``: PNG, SVG, film, and images of some steps."""
    status: Literal["finished", "failed"] = "finished"
    """Failed: its loss was not finite again and again, and it stays as it was before."""
    guides: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the CLIPs that guided, by address; older results have none."""


def parse_drawing_spec(text: str, steps: int | None = None) -> DrawingSpec:
    """Parse a method with its overrides; ``steps`` replaces the length of its loop, also in its text.

    Raises:
        SettingError: an unknown method or option, or an invalid value.
    """
    method, _, settings = text.partition(":")
    kind = generation_config(method)
    plain = json.loads(to_json(kind()))
    parts = list(filter(None, re.split(r",(?=[\w.]+=)", settings)))
    for part in parts:
        name, given, value = part.partition("=")
        *parents, last = name.split(".")
        owner = plain
        for parent in parents:
            owner = inner if isinstance(inner := owner.get(parent), dict) else {}
        known = [key for key, value in owner.items() if not isinstance(value, dict)]
        require(bool(given) and last in known, text, part, f"{', '.join(known)}, each with =VALUE{near(last, known)}")
        try:
            owner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingError(text, part, f"{name}= and a value of YAML") from error
    if steps is not None:
        plain["loop"]["steps"] = steps
        others = [part for part in parts if not part.startswith("loop.steps=")]
        text = f"{method}:{','.join([*others, f'loop.steps={steps}'])}"
    return DrawingSpec(text, method, from_plain(kind, plain, text))


def plan_drawings(
    specs: Sequence[DrawingSpec], subjects: Sequence[SubjectSource], seeds: Sequence[int]
) -> list[DrawingUnit]:
    """All images; a method gets the subjects that it reads.

    Raises:
        SettingError: a method without a subject.
    """
    units = []
    for spec in specs:
        reads = generation_class(spec.method).reads
        some = [one for one in subjects if (one.pixels is not None) == (reads == "image")]
        field = "images" if reads == "image" else "prompts"
        require(bool(some), field, (), f"one or more, for {spec.text}")
        units += [DrawingUnit(method=spec.text, subject=one.text, seed=seed) for one, seed in product(some, seeds)]
    return units


@cache
def load_guide(address: str, device: str) -> Guide:
    """The frozen CLIP at ``address``, cached for this process; raises as :func:`load_model` and :class:`Guide`."""
    return Guide(load_model(address, device), address)


@cache
def load_codes(address: str, device: str) -> ImageCodes:
    """The frozen image codes at ``address``, cached for this process; raises as :func:`load_image_codes`."""
    return load_image_codes(address, device)


@dataclass(frozen=True, kw_only=True)
class DrawingRunner:
    """Makes images in any process; it pickles."""

    specs: Mapping[str, DrawingSpec]
    subjects: Mapping[str, SubjectSource]
    judge: str
    """Address of the CLIP that compares images with their subjects, without gradients."""
    output: str
    device: str = "auto"
    film: FilmKind = "gif"
    frames: int = 30
    """Images of the film."""
    shown: int = 4
    """Images of chosen steps that are kept."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the models and files at their addresses, see :meth:`with_contents`."""

    def check(self, units: Sequence[DrawingUnit], device: str) -> None:
        """Start one image of each method on ``device``, and check all its subjects, before anything is drawn.

        Units that are finished need no check.

        Raises:
            SettingError: a model, an option or a subject that does not fit; the field begins with the method.
        """
        here, started, readable = replace(self, device=device), set[str](), set[str]()
        unfinished = {(one.method, one.subject): one for one in units if self.finished(one) is None}
        for unit in unfinished.values():
            try:
                here._check_subject(unit, readable)
                if unit.method not in started:
                    here._start([unit])
                    started.add(unit.method)
            except SettingError as error:
                is_image = self.subjects[unit.subject].pixels is not None
                raise error.within(masked(f"{unit.method}: {f'{unit.subject}: ' if is_image else ''}")) from error

    def _check_subject(self, unit: DrawingUnit, readable: set[str]) -> None:
        method = self.specs[unit.method].build()
        guides = [load_guide(name, self.device) for name in method.models]
        judge, subject = load_guide(self.judge, self.device), self.subjects[unit.subject].read()
        check_subject(method, subject, guides, judge, readable)

    def with_contents(self, units: Sequence[DrawingUnit], device: str) -> "DrawingRunner":
        """The same runner, for which an image is unfinished if a model or a file that it depends on has changed.

        Raises:
            SettingError: a judge with the weights of a CLIP that guides, under whatever address.
        """
        methods = [spec.build() for spec in self.specs.values()]
        guides = {name for method in methods for name in method.models}
        found = {name: digest_of(load_guide(name, device).model) for name in {self.judge, *guides}}
        same = [name for name in guides if found[name] == found[self.judge]]
        require(not same, "judge", self.judge, f"another CLIP than {', '.join(same)}, which has the same weights")
        found |= {name: digest_of(load_codes(name, device)) for method in methods for name in method.codes}
        files = {file for method in methods for file in method.files}
        files |= {file for name in {unit.subject for unit in units} for file in self.subjects[name].files()}
        return replace(self, contents=found | {file: _digest(file) for file in files})

    def __call__(self, units: Sequence[DrawingUnit]) -> str:
        """Make the images of one method, unless all are finished; returns their names."""
        if any(self.finished(unit) is None for unit in units):
            self._make(units)
        return " ".join(unit.name for unit in units)

    def finished(self, unit: DrawingUnit) -> DrawingResult | None:
        """The result of ``unit``, if it and its PNG exist, with the same settings."""
        folder, file = Folder(self.output).folder(RESULTS), f"{unit.name}.json"
        try:
            result = from_plain(DrawingResult, parse_json(folder.read_bytes(file)), folder.join(file))
        except (FileNotFoundError, ValueError):
            return None
        whole = result.settings == self.settings(unit) and Folder(self.output).folder(IMAGES).exists(f"{unit.name}.png")
        if not whole:
            return None
        # Equal settings mean equal guides, which results of older versions do not have.
        return result if result.guides else replace(result, guides=self._guides(unit))

    def _guides(self, unit: DrawingUnit) -> dict[str, str]:
        """SHA-256 of the CLIPs that guide, by address, as far as they are known."""
        models = self.specs[unit.method].build().models
        return {model: self.contents[model] for model in models if model in self.contents}

    def settings(self, unit: DrawingUnit) -> str:
        """SHA-256 of all that determines the image and its files."""
        spec, subject = self.specs[unit.method], self.subjects[unit.subject]
        said = [to_json(spec.config), subject.digest, str(unit.seed)]
        said += [self.judge, self.film, str(self.frames), str(self.shown)]
        method = spec.build()
        read = (self.judge, *method.models, *method.codes, *method.files, *subject.files())
        said += [self.contents.get(name, "") for name in read]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def _start(self, units: Sequence[DrawingUnit]) -> Optimization:
        method = self.specs[units[0].method].build()
        guides = {name: load_guide(name, self.device) for name in method.models}
        codes = {name: load_codes(name, self.device) for name in method.codes}
        seeds = [unit.seed for unit in units]
        subjects = [self.subjects[unit.subject].read() for unit in units]
        picture, objective = method.start(subjects, seeds, guides, codes)
        judge, names = load_guide(self.judge, self.device), [unit.name for unit in units]
        return Optimization(picture, objective, method.loop, seeds, judge, names)

    def _make(self, units: Sequence[DrawingUnit]) -> None:
        folder = Folder(self.output)
        run, film = self._start(units), Film(self.frames, self.shown)
        key = hashlib.sha256("\n".join(self.settings(unit) for unit in units).encode()).hexdigest()[:24]
        kept, who = folder.folder(CHECKPOINTS), units[0].name + (f" and {len(units) - 1} more" if units[1:] else "")
        loop, shots = f"{key}.pt", f"{key}-film.npz"
        if _resume(run, film, kept, loop, shots):
            logger.info("%s: goes on from step %d", who, run.progress.step)
        elif 0 in film.steps(run.config.steps, run.config.evaluate_every):
            film.add(0, run.images())

        def save(content: bytes) -> None:
            kept.write_atomic(shots, film.content())
            kept.write_atomic(loop, content)
            logger.info("%s: step %d of %d", who, run.progress.step, run.config.steps)

        def watch(progress: LoopProgress, images: Tensor) -> None:
            if progress.step in film.steps(run.config.steps, run.config.evaluate_every):
                film.add(progress.step, images)

        run.run(save, watch)
        if film.last != run.progress.step:
            film.add(run.progress.step, run.images())
        drawings, seconds = run.picture.drawings(), run.progress.seconds / len(units)
        for number, unit in enumerate(units):
            self._write(unit, number, run, film, drawings[number] if drawings else "", seconds)
        kept.delete(loop)
        kept.delete(shots)

    def _write(
        self, unit: DrawingUnit, number: int, run: Optimization, film: Film, drawing: str, seconds: float
    ) -> None:
        folder, name = Folder(self.output), unit.name
        images, files = folder.folder(IMAGES), dict[str, bytes]()
        progress, end = run.progress, run.progress.steps(number)
        files[f"{name}.png"] = png_of(film.frames[-1][number])
        if drawing:
            files[f"{name}.svg"] = drawing.encode()
        if self.film != "none":
            files[f"{name}.{self.film}"] = film.encoded(number, end, self.film)
        for step, frame in film.chosen(number, end):
            files[f"{name}-step-{step:06d}.png"] = png_of(frame)
        for file, content in files.items():
            images.write_atomic(file, content)
        history = tuple(progress.numbers(number))
        last = history[-1] if history else {"loss": nan, "judge": nan}
        result = DrawingResult(
            unit=unit,
            settings=self.settings(unit),
            steps=end,
            loss=last["loss"],
            judge=last["judge"],
            retries=progress.retries[number],
            seconds=seconds,
            history=history,
            files=tuple(files),
            status="failed" if progress.failed[number] else "finished",
            guides=self._guides(unit),
        )
        folder.folder(RESULTS).write_atomic(f"{name}.json", json.dumps(asdict(result), indent=1).encode())


def _resume(run: Optimization, film: Film, folder: Folder, loop: str, shots: str) -> bool:
    """Go on from the files ``loop`` and ``shots`` of ``folder``; returns whether both exist.

    Raises:
        DataError: one of them cannot be read; the message names it.
    """
    try:
        state, frames = folder.read_bytes(loop), folder.read_bytes(shots)
    except FileNotFoundError:
        return False
    try:
        run.resume(state)
        film.read(frames, run.progress.step)
    except DataError as error:
        files = f"{folder.join(loop)} and {shots}"
        raise DataError(f"{files} cannot be used ({error}); delete them to draw from the beginning") from error
    return True


def _digest(place: str) -> str:
    folder, name = split_file(place)
    try:
        return folder.digest(name)
    except (OSError, ValueError) as error:
        raise unreadable("image", place, "an image", error) from error


def png_of(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def run_drawings(
    runner: DrawingRunner,
    units: Sequence[DrawingUnit],
    workers: Workers,
    together: int = 1,
    gpus: float = 0.0,
    done: Callable[[DrawingResult], None] | None = None,
) -> list[DrawingResult]:
    """The results of all ``units`` in order; ``together`` images of a method share a task, and steps.

    ``done`` is called with each result when it is available.
    """
    batches = list(_batches(runner, units, together))
    in_turn = workers.processes_count == 0
    task = runner if in_turn else partial(_in_a_worker, runner)
    results: dict[str, DrawingResult] = {}
    for number, _ in run_tasks(task, batches, workers, gpus):
        for unit in batches[number]:
            result = runner.finished(unit)
            if result is None:
                file = f"{runner.output}/{RESULTS}/{unit.name}.json"
                raise DataError(f"{file} is missing, or was written by another run in the same folder")
            results[unit.name] = result
            outcome = "failed" if result.status == "failed" else f"judge {result.judge:.3f}"
            logger.info("%d of %d images: %s, %s", len(results), len(units), unit.name, outcome)
            if done is not None:
                done(result)
    return [results[unit.name] for unit in units]


def refuse_failed(results: Sequence[DrawingResult]) -> None:
    """Raises ``ImagesFailed`` if there are failed images; the others are finished."""
    failed = [one.unit.name for one in results if one.status == "failed"]
    if failed:
        more = f" and {len(failed) - MOST_NAMES} more" if failed[MOST_NAMES:] else ""
        count = f"{len(failed)} of {len(results)} images failed"
        why = "losses are not finite, also with smaller rates"
        raise ImagesFailed(f"{count} ({why}), the others are finished: {', '.join(failed[:MOST_NAMES])}{more}")


def _batches(runner: DrawingRunner, units: Sequence[DrawingUnit], together: int) -> Iterator[tuple[DrawingUnit, ...]]:
    """Images of one method, ``together`` at most. Which ones belong together does not depend on what is finished, so
    that an interrupted batch finds its checkpoint."""
    for method in runner.specs:
        some = [unit for unit in units if unit.method == method]
        yield from (tuple(some[start : start + together]) for start in range(0, len(some), together))


def _in_a_worker(runner: DrawingRunner, units: Sequence[DrawingUnit]) -> str:
    """A batch as a task of Ray: its progress appears in the job's log."""
    log_as_job()
    return runner(units)
