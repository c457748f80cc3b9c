"""Trials of few-shot adaptation: one method, data set, number of shots and seed each, each run once, in parallel.

A data set is prepared once for all trials. The images, or point clouds, that any seed samples, and those of the test
become two small snapshots below the output folder, with their raw features as sidecars if a method reads these. A trial
reads them, trains, tests, and writes one JSON file at the end. A trial with a file of the same settings is not run
again.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from importlib import import_module
from itertools import product
from typing import Any, Literal, cast, overload

import torch
import yaml

from pipeline.config import fingerprint, from_plain, near, parse_json, require
from pipeline.errors import DataError, SettingError
from pipeline.evaluation.classes import read_templates
from pipeline.evaluation.embedder import LoadEmbedder, ViewEmbedder, Views
from pipeline.evaluation.few_shot import DataSet, Drawing, Validation, draw, halves, harmonic_mean
from pipeline.evaluation.models import load_model, usable_device
from pipeline.evaluation.point_clip import CloudEmbedder
from pipeline.evaluation.zero_shot import classifier
from pipeline.loaders.samples import Samples
from pipeline.models.adapters.adapter import Adapter, FrozenClip, adapter_class, unit
from pipeline.models.clip import Clip
from pipeline.runs.few_shot_ensemble import (
    ENSEMBLE,
    PartLogits,
    digest_of_scores,
    ensemble_accuracy,
    part_logits,
    scores_at,
    urls_of,
    write_scores,
)
from pipeline.shards.media import MEDIA, POINTS
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.sources import open_source
from pipeline.sources.picked import Picked
from pipeline.sources.source import Source
from pipeline.stages.annotate.embeddings import EmbedOptions, embed
from pipeline.stages.annotate.view_features import read_views
from pipeline.stages.ray_session import connect, log_as_job
from pipeline.stages.refresh.make_shard import AS_IT_IS
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers, run_tasks
from pipeline.training import distributed
from pipeline.training.adapt import Accuracy, Adapted, Labelled, accuracy, adapt
from pipeline.training.adapt_artifact import save
from pipeline.training.adapt_recipes import AdaptRecipe, paper_config, paper_recipe, paper_templates
from pipeline.training.adapt_recipes import Protocol as RecipeProtocol
from pipeline.training.adapt_workers import on_workers

logger = logging.getLogger(__name__)

Protocol = Literal["few_shot", "base_to_new", "cross", "generalise"]
RECIPES: Mapping[Protocol, RecipeProtocol] = {
    "few_shot": "few_shot",
    "base_to_new": "base_to_new",
    "cross": "cross",
    "generalise": "cross",
}
ZERO_SHOT = "zero_shot"
ROWS_PER_SHARD = 512
VIEW_BATCH = 32


@dataclass(frozen=True)
class Spec:
    """A method with overrides of its paper's values: ``coop``, or ``coop:class_specific=true,epochs=50``.

    ``templates`` replace those of its paper and of the data sets.
    """

    text: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    templates: tuple[str, ...] = ()

    def prompts(self, data: DataSet) -> tuple[str, ...]:
        """The templates for ``data``: those given, else those of the method's paper, else the data set's."""
        theirs = paper_templates(self.method, data.name)
        return self.templates or (data.templates if theirs == "auto" else read_templates(theirs, None, data.name))

    def build(self, protocol: Protocol, shots: int, data_set: str) -> tuple[Any, AdaptRecipe | None]:
        """The ``Config`` and the recipe; raises ``SettingError`` for invalid values."""
        kind = RECIPES[protocol]
        config = paper_config(self.method, kind)
        plain = {one.name: getattr(config, one.name) for one in fields(config)} | dict(self.config)
        recipe = paper_recipe(self.method, max(shots, 1), kind, data_set)
        if recipe is not None:
            recipe = from_plain(AdaptRecipe, asdict(recipe) | dict(self.recipe), self.text)
            recipe.check_for(adapter_class(self.method))
        return from_plain(type(config), plain, self.text), recipe


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of one method. ``shots`` is 0 for zero-shot, which uses none."""

    protocol: Protocol
    method: str
    data: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """``coop-drawn_shapes-16-shots-seed-1``, valid as a file name."""
        words = re.sub(r"[^\w.]+", "-", self.method).strip("-")
        return f"{words}-{self.data}-{self.shots}-shots-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a trial.

    ``scores`` holds, for each set of images and classes, ``top1`` and ``mean_per_class`` (0 to 1), ``right`` and
    ``seen`` (images); base-to-new has ``base``, ``new`` and the ``top1`` of their harmonic mean under ``harmonic``.
    """

    trial: Trial
    settings: str
    scores: Mapping[str, Mapping[str, float]]
    chosen: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A data set with local images: snapshots of the sampled images, if any, and of the test images."""

    data: DataSet
    drawn: str
    rows: Mapping[tuple[str, int], int]
    """Row in the snapshot ``drawn`` of each sampled image, by part and number."""
    tested: str


def parse_spec(text: str) -> Spec:
    """Parse a method with its overrides.

    Raises:
        SettingError: an unknown method, an unknown option of its config and recipe, or an invalid value.
    """
    method, _, settings = text.partition(":")
    kind = adapter_class(method)
    config = {one.name for one in fields(import_module(kind.__module__).Config)} - {"seed"}
    recipe = {one.name for one in fields(AdaptRecipe)} if kind.learns else set()
    chosen: dict[str, dict[str, Any]] = {"config": {}, "recipe": {}}
    templates: tuple[str, ...] = ()
    for part in filter(None, re.split(r",(?=\w+=)", settings)):
        name, given, value = part.partition("=")
        known = config | recipe | {"templates"}
        allowed = f"{', '.join(sorted(known))}, each with =VALUE{near(name, known)}"
        require(bool(given) and name in known, text, part, allowed)
        if name == "templates":
            templates = () if value == "auto" else read_templates(value, None, method)
            continue
        chosen["config" if name in config else "recipe"][name] = yaml.safe_load(value)
    return Spec(text, method, templates=templates, **chosen)


def plan_trials(
    protocol: Protocol, specs: Sequence[Spec], data: Sequence[str], shots: Sequence[int], seeds: Sequence[int]
) -> list[Trial]:
    """All trials; zero-shot has one for each data set, because it samples nothing."""
    trials = []
    for name, spec in product(data, specs):
        grid = [(0, seeds[0])] if spec.method == ZERO_SHOT else product(shots, seeds)
        trials += [
            Trial(protocol=protocol, method=spec.text, data=name, shots=count, seed=seed) for count, seed in grid
        ]
    return trials


@cache
def frozen_clip(checkpoint: str, device: str) -> FrozenClip:
    """The CLIP at ``checkpoint``, cached for this process's trials.

    Raises:
        SettingError: no such checkpoint, or not a CLIP.
    """
    model = load_model(checkpoint, device)
    require(isinstance(model, Clip), "model", checkpoint, "a CLIP")
    return FrozenClip(cast(Clip, model), classifier)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The resources of a trial: a task's share of the cluster, or workers of Ray Train that share its classes."""

    device: str = "auto"
    gpus: float = 0.0
    """Part of a GPU for each trial's task."""
    workers: int = 1
    """If more than 1, trials run one after the other, each on this many workers, with a GPU each on GPU devices."""


def find_place(device: str, gpus: float, per_trial: int, workers: Workers) -> Place:
    """The device and resources of the trials: GPUs if ``device`` is ``auto`` and the cluster has some.

    Raises:
        SettingError: ``device`` is ``cuda`` and there is no GPU.
    """
    if workers.processes_count == 0 and per_trial == 1:
        usable_device(device)
        return Place(device=device)
    connect(max(workers.processes_count, per_trial) if workers.processes_count else None)
    import ray

    some = ray.cluster_resources().get("GPU", 0) > 0
    require(some or device != "cuda", "device", device, "cpu or auto: the cluster has no GPU")
    if device == "cpu" or not some:
        return Place(device="cpu", workers=per_trial)
    return Place(device="cuda", gpus=gpus, workers=per_trial)


def check(
    trial: Trial,
    spec: Spec,
    clip: FrozenClip,
    data: DataSet,
    targets: Mapping[str, DataSet],
    workers: int = 1,
    views: int | None = None,
) -> None:
    """Build the method once, before anything is embedded or trained.

    Raises:
        SettingError: invalid class names, a too long prompt, classes that the method cannot be bound to, fewer
            classes than ``workers`` that share them, another medium than the method reads, or another number of views
            of a point cloud than ``views``.
    """
    config, _ = spec.build(trial.protocol, trial.shots, trial.data)
    reads = adapter_class(spec.method).reads
    for one in (data, *targets.values()):
        able = one.medium == POINTS.name if reads == "views" else one.medium != POINTS.name or reads == "features"
        require(able, "methods", spec.text, f"another one for {one.name}, which has {MEDIA[one.medium].noun} each")
    if reads == "views" and views is not None:
        allowed = f"{views}, the views of a cloud by --projection"
        require(config.views == views, f"{spec.text}: views", config.views, allowed)
    classes = data.classes
    new: tuple[str, ...] = ()
    if trial.protocol == "base_to_new":
        parts = halves(len(classes))
        classes, new = tuple(data.classes[one] for one in parts.base), tuple(data.classes[one] for one in parts.new)
    count = len(classes)
    require(workers <= count, "workers_per_trial", workers, f"at most {count}, the classes that {data.name} learns")
    try:
        adapter = adapter_class(spec.method)(config, clip, classes, spec.prompts(data))
    except SettingError as error:
        raise error.within(f"{spec.text}: ") from error
    others = [(trial.data, new)] if new else [(name, target.classes) for name, target in targets.items()]
    for name, names in others:
        fits = adapter.rebinds or names == classes
        allowed = f"one that classifies other classes than those it learned, for those of {name}"
        require(fits, "methods", spec.text, allowed)


def prepare(
    data: DataSet,
    drawings: Sequence[Drawing],
    folder: Folder,
    embedder: LoadEmbedder | None,
    workers: Workers,
    use_gpu: bool | None = None,
    check_data: Callable[[Ready], None] | None = None,
) -> Ready:
    """Read the images of all ``drawings`` and of the test, and embed them; existing results are kept.

    ``embedder`` computes the views of sampled images; ``None`` if no method reads features. ``check_data`` may raise
    before they are embedded.

    Raises:
        DataError: an image of the split cannot be read; other shots would differ from the papers'.
    """
    embedder = embedder and embedder_of(data, embedder)
    wanted = sorted({one for drawing in drawings for one in (*drawing.train, *drawing.validation)})
    parts = [part for part in data.sources if part != "test"]
    drawn = ""
    if wanted:
        numbers = [(parts.index(part), number) for part, number in wanted]
        source = Picked(sources=[data.sources[part] for part in parts], numbers=numbers)
        drawn = _snapshot(source, folder, "drawn", len(wanted), workers)
    tested = _snapshot(open_source(data.sources["test"]), folder, "tested", len(data.labels["test"]), workers)
    ready = Ready(data=data, drawn=drawn, rows={one: row for row, one in enumerate(wanted)}, tested=tested)
    if check_data is not None:
        check_data(ready)
    if drawn:
        _embed(drawn, embedder, workers, use_gpu)
    _embed(tested, None if embedder is None else test_embedder(embedder), workers, use_gpu)
    return ready


def check_scores(place: str, weight: float | None, drawings: Sequence[Drawing], ready: Ready) -> None:
    """Raise ``DataError`` unless the file of scores at ``place`` has the test samples and, where no ``weight`` is
    given, the validation samples of all ``drawings``."""
    keys = list(urls_of(ready.tested))
    if weight is None:
        validation = {one for drawing in drawings for one in drawing.validation}
        keys += [urls_of(ready.drawn)[ready.rows[one]] for one in sorted(validation)]
    scores_at(place).check_keys(keys)


def embedder_of(data: DataSet, embedder: LoadEmbedder) -> LoadEmbedder:
    """The same model for the medium of ``data``: views of point clouds, or crops of images."""
    return replace(embedder, views=None) if data.medium == POINTS.name else replace(embedder, clouds=None)


def test_embedder(embedder: LoadEmbedder) -> LoadEmbedder:
    """The same model for test images, with the plain view only; of clouds with all views."""
    return embedder if embedder.clouds else replace(embedder, views=Views(views=0))


@dataclass(frozen=True, kw_only=True)
class TrialRunner:
    """Runs trials in any process; it pickles."""

    embedder: LoadEmbedder
    ready: Mapping[str, Ready]
    """By name: the training data sets, and those for testing only."""
    specs: Mapping[str, Spec]
    targets: tuple[str, ...]
    """Test data sets besides the training one, if the protocol has any."""
    output: str
    clip: str
    """SHA-256 of the weights of CLIP."""
    validation: Validation = "few"
    """Validation images of each trial."""
    keep_adapters: bool = True
    """Save the trained tensors of each trial."""
    keep_scores: bool = False
    """Save the logits of each trial's test and validation samples."""
    ensemble: str = ""
    """File of another classifier's scores, see :mod:`pipeline.evaluation.ensemble`."""
    ensemble_weight: float | None = None
    """Weight of these scores; none to search it on the validation samples."""

    def __call__(self, trial: Trial) -> str:
        """Run ``trial`` unless its result exists; returns the name of the result's file.

        In a process group all ranks must call; they share the learned classes, and the first one writes.
        """
        file = f"{trial.name}.json"
        if self.finished(trial) is None:
            result = self.run(trial, self.settings(trial))
            if distributed.rank() == 0:
                self._results.write_atomic(file, json.dumps(asdict(result), indent=1).encode())
        return file

    def at(self, device: str) -> "TrialRunner":
        """The same runner on ``device``."""
        return replace(self, embedder=replace(self.embedder, device=device))

    def finished(self, trial: Trial) -> Result | None:
        """The result of ``trial``, if it exists with the same settings."""
        file = f"{trial.name}.json"
        try:
            result = from_plain(Result, parse_json(self._results.read_bytes(file)), self._results.join(file))
        except (FileNotFoundError, ValueError):
            return None
        return result if result.settings == self.settings(trial) else None

    @property
    def _results(self) -> Folder:
        return Folder(self.output).folder("trials")

    def settings(self, trial: Trial) -> str:
        """SHA-256 of everything that determines the result and the files beside it."""
        config, recipe = self.specs[trial.method].build(trial.protocol, trial.shots, trial.data)
        listed = [_digest(self.ready[name]) for name in (trial.data, *self.targets)]
        anywhere = replace(self.embedder, device="auto")
        prompts = [self.specs[trial.method].prompts(self.ready[name].data) for name in (trial.data, *self.targets)]
        said = [fingerprint(trial), repr(config), repr(recipe), repr(anywhere), self.clip, repr(listed)]
        said += [repr(prompts), self.validation]
        said += [repr((digest_of_scores(self.ensemble), self.ensemble_weight))] if self.ensemble else []
        said += ["scores"] if self.keep_scores else []  # a trial that has not written them is not finished
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def run(self, trial: Trial, settings: str = "") -> Result:
        """Train and test."""
        began = time.monotonic()
        spec, ready = self.specs[trial.method], self.ready[trial.data]
        clip = frozen_clip(self.embedder.checkpoint, self.embedder.device)
        adapted = self._learn(trial, spec, ready, clip)
        if self.keep_adapters and trial.shots and distributed.rank() == 0:
            about = {"checkpoint": self.embedder.checkpoint, "data": trial.data, "settings": settings}
            save(adapted, Folder(self.output).folder("adapters").folder(trial.name), about)
        chosen = dict(adapted.chosen)
        if self.keep_scores or self.ensemble:
            assert trial.protocol == "few_shot", "other protocols have several sets of classes or of samples"
            logits = self._logits(trial, adapted.adapter, ready)
            scores = {trial.data: _counts(logits["test"].accuracy())}
            if self.keep_scores and distributed.rank() == 0:
                write_scores(Folder(self.output).folder("scores"), trial.name, adapted.adapter.classes, logits)
            if self.ensemble:
                found, weight = ensemble_accuracy(self.ensemble, self.ensemble_weight, adapted.adapter.classes, logits)
                scores[ENSEMBLE], chosen["ensemble_weight"] = _counts(found), weight
        else:
            scores = self._scores(trial, adapted.adapter, ready)
        return Result(
            trial=trial,
            settings=settings,
            scores=scores,
            chosen=chosen,
            history=adapted.history,
            parameters=sum(one.numel() for one in adapted.adapter.parameters()),
            seconds=time.monotonic() - began,
        )

    def _learn(self, trial: Trial, spec: Spec, ready: Ready, clip: FrozenClip) -> Adapted:
        data = ready.data
        config, recipe = spec.build(trial.protocol, trial.shots, trial.data)
        kept = halves(len(data.classes)).base if trial.protocol == "base_to_new" else range(len(data.classes))
        classes = [data.classes[number] for number in kept]
        if not trial.shots:
            adapter = adapter_class(spec.method)(config, clip, classes, spec.prompts(data))
            return Adapted(spec.method, config, recipe, trial.seed, adapter.eval(), {}, ())
        drawing = draw(data, trial.shots, trial.seed, self.validation)
        kind = adapter_class(spec.method)
        train, validation = (
            self._drawn(ready, [one for one in part if data.labels[one[0]][one[1]] in kept], kind, views)
            for part, views in ((drawing.train, kind.random_views), (drawing.validation, False))
        )
        prompts = spec.prompts(data)
        return adapt(spec.method, config, recipe, clip, classes, prompts, train, validation, seed=trial.seed)

    def _scores(self, trial: Trial, adapter: Adapter, ready: Ready) -> dict[str, dict[str, float]]:
        data, spec = ready.data, self.specs[trial.method]
        if trial.protocol == "base_to_new":
            parts = halves(len(data.classes))
            found = {"base": accuracy(adapter, self._tested(ready, adapter, parts.base))}
            adapter.bind([data.classes[number] for number in parts.new], spec.prompts(data))
            found["new"] = accuracy(adapter, self._tested(ready, adapter, parts.new))
            scores = {name: _counts(one) for name, one in found.items()}
            return scores | {"harmonic": {"top1": harmonic_mean(scores["base"]["top1"], scores["new"]["top1"])}}
        found = {trial.data: accuracy(adapter, self._tested(ready, adapter))}
        for name in self.targets:
            target = self.ready[name]
            prompts = spec.prompts(target.data)
            if adapter.classes != target.data.classes or adapter.templates != prompts:
                adapter.bind(target.data.classes, prompts)
            found[name] = accuracy(adapter, self._tested(target, adapter))
        return {name: _counts(one) for name, one in found.items()}

    def _drawn(self, ready: Ready, wanted: Sequence[tuple[str, int]], kind: type[Adapter], views: bool) -> Labelled:
        """The images ``wanted``; of their features the random crops if available, or the plain view. Or clouds."""
        labels = torch.tensor([ready.data.labels[part][number] for part, number in wanted])
        rows = [ready.rows[one] for one in wanted]
        if kind.reads == "pixels":
            return Labelled(labels=labels, images=_StoredImages(Samples(read_snapshot(ready.drawn)), rows))
        embedder = embedder_of(ready.data, self.embedder)
        few = _features(ready.drawn, embedder)[rows]
        if embedder.clouds:
            return Labelled(labels=labels, features=_of_clouds(few, kind))
        return Labelled(labels=labels, features=few[:, 1:] if views and few.shape[1] > 1 else few[:, :1])

    def _tested(self, ready: Ready, adapter: Adapter, classes: Sequence[int] | None = None) -> Labelled:
        """The test images of ``classes``, renumbered from 0; all of them if none are given."""
        labels = torch.tensor(ready.data.labels["test"])
        kept = range(len(ready.data.classes)) if classes is None else classes
        rows = ((labels >= kept[0]) & (labels <= kept[-1])).nonzero().flatten()
        require(len(rows) > 0, "data", ready.data.name, "test images of each class")
        labels = labels[rows] - kept[0]
        if adapter.reads == "pixels":
            images = _StoredImages(Samples(read_snapshot(ready.tested)), rows.tolist())
            return Labelled(labels=labels, images=images)
        embedder = embedder_of(ready.data, self.embedder)
        features = _features(ready.tested, test_embedder(embedder))[rows]
        return Labelled(labels=labels, features=_of_clouds(features, type(adapter)) if embedder.clouds else features)

    def _logits(self, trial: Trial, adapter: Adapter, ready: Ready) -> dict[str, PartLogits]:
        """Of the test samples, and of the validation samples where there are some."""
        found = {"test": part_logits(adapter, self._tested(ready, adapter), urls_of(ready.tested))}
        if trial.shots:
            wanted = draw(ready.data, trial.shots, trial.seed, self.validation).validation
            urls = urls_of(ready.drawn)
            keys = [urls[ready.rows[one]] for one in wanted]
            found["validation"] = part_logits(adapter, self._drawn(ready, wanted, type(adapter), False), keys)
        return found


def run_trials(
    runner: TrialRunner,
    trials: Sequence[Trial],
    workers: Workers,
    place: Place,
    done: Callable[[Result], None] | None = None,
) -> list[Result]:
    """The results of all ``trials`` in order; calls ``done`` with each when it is available."""
    runner = runner.at(place.device)
    results: dict[int, Result] = {}
    for number in _run(runner, trials, workers, place):
        result = runner.finished(trials[number])
        if result is None:
            file = f"{runner.output}/trials/{trials[number].name}.json"
            raise DataError(f"{file} is missing, or was written by another run in the same folder")
        results[number] = result
        logger.info("%d of %d trials: %s, %s", len(results), len(trials), trials[number].name, _short(result))
        if done is not None:
            done(result)
    return [results[number] for number in range(len(trials))]


def _run(runner: TrialRunner, trials: Sequence[Trial], workers: Workers, place: Place) -> Iterator[int]:
    """The numbers of trials, each when its result is available."""
    if place.workers == 1:
        in_turn = workers.processes_count == 0
        task = runner if in_turn else partial(_in_a_worker, runner)
        yield from (number for number, _ in run_tasks(task, trials, workers, place.gpus))
        return
    for number, trial in enumerate(trials):
        if runner.finished(trial) is None:
            on_workers(partial(_one_of_many, runner, trial), workers=place.workers, use_gpu=place.device == "cuda")
        yield number


def _in_a_worker(runner: TrialRunner, trial: Trial) -> str:
    """A trial as a task of Ray: its progress appears in the job's log."""
    log_as_job()
    return runner(trial)


def _one_of_many(runner: TrialRunner, trial: Trial, device: torch.device) -> None:
    """The function of each worker of one trial."""
    runner.at(device.type)(trial)


def _of_clouds(features: torch.Tensor, kind: type[Adapter]) -> torch.Tensor:
    """Raw features of the views of clouds, float [N, V, D]; for methods that read one feature, of their mean direction,
    float [N, 1, D], which classifies as the mean of the views' cosines."""
    return features if kind.reads == "views" else unit(features).mean(dim=1, keepdim=True)


class _StoredImages(Sequence[bytes]):
    """Encoded images of some rows of a snapshot, read on demand."""

    def __init__(self, samples: Samples, rows: Sequence[int]) -> None:
        self._samples, self._rows = samples, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return _StoredImages(self._samples, self._rows[index])
        return self._samples[self._rows[index]].image() or b""


def _snapshot(source: Source, folder: Folder, name: str, rows: int, workers: Workers) -> str:
    """The rows of ``source`` as a snapshot below ``folder``, at a path derived from their content."""
    digest = hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    place = folder.folder(f"{name}-{digest}")
    options = replace(AS_IT_IS, number_sample_per_shard=ROWS_PER_SHARD)
    made = refresh(source, place, options, workers)
    if made.samples != rows:
        raise DataError(f"{place.uri} has {made.samples} of {rows} images, {made.dropped}: the split needs all of them")
    return place.uri


def _embed(uri: str, embedder: LoadEmbedder | None, workers: Workers, use_gpu: bool | None) -> None:
    if embedder is not None:
        options = EmbedOptions(name=_sidecar(embedder), batch_size=VIEW_BATCH, overwrite=True)
        embed(read_snapshot(uri), embedder, options, workers, use_gpu)


def _sidecar(embedder: LoadEmbedder) -> str:
    """The sidecar name for the features of one model and its views; it differs between models."""
    said = repr((embedder.checkpoint, embedder.precision, embedder.clouds or embedder.views))
    return f"views_{hashlib.sha256(said.encode()).hexdigest()[:12]}"


@cache
def _features(uri: str, embedder: LoadEmbedder) -> torch.Tensor:
    """Raw features float32 [N, V, D] of all samples of a snapshot, in order."""
    snapshot: Snapshot = read_snapshot(uri)
    model = frozen_clip(embedder.checkpoint, embedder.device).method
    if embedder.clouds is not None:
        maker = CloudEmbedder(model, embedder.clouds, embedder.precision).maker
    else:
        assert embedder.views is not None
        maker = ViewEmbedder(cast(Any, model), embedder.views, embedder.precision).maker
    found = read_views(snapshot, maker=maker, name=_sidecar(embedder))
    return torch.from_numpy(found.of(found.keys))


def _digest(ready: Ready) -> str:
    said = repr((ready.data, sorted(ready.rows)))
    return hashlib.sha256(said.encode()).hexdigest()


def _counts(found: Accuracy) -> dict[str, float]:
    right, seen = int(found.right.sum()), int(found.seen.sum())
    return {"top1": found.top1, "mean_per_class": found.mean_per_class, "right": float(right), "seen": float(seen)}


def _short(result: Result) -> str:
    parts: Iterator[str] = (f"{name} {100 * score['top1']:.1f} %" for name, score in result.scores.items())
    return ", ".join(parts)
