"""The life cycle of an MLflow run: the driver creates or continues it; any process that knows its id writes to it.

    with runs.start(config.tracking, config, run_id=remembered) as tracker:
        tracker.log_dataset(snapshot)
        tracker.log({"train/loss": 2.3}, step=10)
        tracker.register_checkpoint(uri, {"zeroshot/imagenet/top1": 0.63}, step=100)

A tracker pickles: a copy in a worker writes into the same run without owning it, so only the driver ends the run.
Logging never waits for the server and never raises because of it. :func:`start` does both, so that a wrong address is
detected before a cluster is used.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import flatten, require, to_json
from pipeline.errors import SettingError
from pipeline.shards.privacy import masked, masked_value
from pipeline.shards.snapshot import Snapshot
from pipeline.tracking.description import NOTE, description, preset_tags, result, run_title
from pipeline.tracking.provenance import provenance_tags
from pipeline.tracking.records import LoggedSteps, log_snapshot, register
from pipeline.tracking.store import (
    answers,
    artifact_errors,
    artifact_location,
    checked_uri,
    client,
    is_refusal,
    needs_a_server,
    store_errors,
)
from pipeline.tracking.system import SystemMetrics
from pipeline.tracking.writer import MetricWriter, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
CONFIG = "config.json"
TOKEN = "start_token"  # tag of a run
PARAMS_AT_ONCE = 100
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
FLUSH_SECONDS = 60.0
THROUGH_A_SERVER = "as --tracking-uri the address of the server that created it, which also stores its files"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where and how a run is recorded."""

    tracking_uri: str = ""
    """MLflow server or sqlite:///FILE; empty: $MLFLOW_TRACKING_URI, else a file in ~/.local/share/clipmill/mlflow."""
    experiment: str = "clipmill"
    """Experiment of the run; compare runs within one experiment."""
    run_name: str = ""
    """Name of the run in the UI; empty for method, preset, architecture and data."""
    primary_metric: str = "zeroshot/drawn_shapes/top1"
    """Metric that ranks the experiment's runs; higher is better."""
    system_metrics: bool = True
    """Record CPU, memory, disk, network and GPUs of the driver's machine every ten seconds."""

    def __post_init__(self) -> None:
        require(bool(self.experiment.strip()), "experiment", self.experiment, "a name")
        require(len(self.experiment) <= 500, "experiment", self.experiment, "at most 500 characters")


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Everything that a process needs to write into a run. May hold a password of the server: never log it.

    With ``once``, a metric that the run already has at a step is not logged at this step again: a killed job repeats
    the steps since its last checkpoint.
    """

    uri: str
    run_id: str
    once: bool = False

    def __repr__(self) -> str:
        return f"RunHandle(uri={masked(self.uri)!r}, run_id={self.run_id!r})"

    def open(self) -> "MlflowTracker":
        """A tracker that writes into the run without owning it."""
        return MlflowTracker(self)


class MlflowTracker:
    """Writes into one run. Created by :func:`start`, which owns the run, or by :meth:`RunHandle.open`."""

    def __init__(self, handle: RunHandle, owns: bool = False) -> None:
        self.handle, self.owns = handle, owns
        self._client: MlflowClient = client(handle.uri)
        self._logged = LoggedSteps(self._client, handle.run_id) if handle.once else None
        self._writer = MetricWriter(self._send, is_refusal, lambda: answers(handle.uri))
        self._system: SystemMetrics | None = None
        self.about = ""

    def __reduce__(self) -> tuple[Callable[[RunHandle], "MlflowTracker"], tuple[RunHandle]]:
        return MlflowTracker, (self.handle,)

    def __enter__(self) -> "MlflowTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.finish("KILLED" if interrupted else "FAILED" if kind else "FINISHED")

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; store it to continue the run."""
        return self.handle.run_id

    @property
    def where(self) -> str:
        """The address of the run's page on a server, or the command that serves a sqlite store."""
        if self.handle.uri.startswith("http"):
            experiment = self._client.get_run(self.run_id).info.experiment_id
            page = f"{masked(self.handle.uri).rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"
            return f"{page}?workflowType=machine_learning"  # else a new browser shows the pages for agents
        return f"mlflow server --backend-store-uri {masked(self.handle.uri)}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step; returns at once."""
        self._writer.put(dict(metrics), step)

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Keep a figure as the artifact ``figures/{name}.png``."""
        self._later(lambda: self._client.log_figure(self.run_id, figure, f"figures/{name}.png"), f"figure {name}")

    def log_text(self, name: str, text: str) -> None:
        """Keep ``text`` as the artifact ``name``."""
        self._later(lambda: self._client.log_text(self.run_id, text, name), name)

    def log_dataset(self, snapshot: Snapshot, context: str = "training") -> None:
        """Record a snapshot as input of the run: name, digest, address and size; repeated calls change nothing."""
        tags = {f"{context}.snapshot": snapshot.uri, f"{context}.digest": snapshot.digest}
        self._later(lambda: log_snapshot(self._client, self.run_id, snapshot, context), f"dataset {snapshot.uri}")
        self.set_tags(tags)

    def log_file(self, name: str, content: bytes) -> None:
        """Keep ``content`` as the artifact ``name``."""
        self._later(lambda: self._log_file(PurePosixPath(name), content), name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; secrets in them are masked and long ones are cut."""
        self._later(lambda: self._set_tags(tags), "tags")

    def describe(self, table: str = "", checkpoint: str = "") -> None:
        """Add the final table and the links to figures and checkpoint to the description, if this tracker owns the run.

        The description begins with what is trained, on what, and by which command.
        """
        if self.owns:
            self._later(lambda: self._describe(table, checkpoint), "description")

    def register_checkpoint(
        self,
        uri: str,
        metrics: Mapping[str, float],
        step: int,
        name: str = "clip",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Make the checkpoint at ``uri`` a version of the registered model ``name``, with its metrics.

        The files are not moved. A checkpoint that this run has registered before is not registered again.
        """
        self._later(
            lambda: register(self._client, self.run_id, uri, dict(metrics), step, name, dict(tags or {})),
            f"model version for {masked(uri)}",
        )

    def watch_node(self, node: str = "") -> None:
        """Record this machine's system metrics until :meth:`finish`; ``node`` distinguishes several machines."""
        if self._system is None:
            began = self._client.get_run(self.run_id).info.start_time / 1000
            self._system = SystemMetrics(self.run_id, self.handle.uri, began, self._writer.put, node)

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until everything is sent; ``False`` on a timeout."""
        return self._writer.flush(seconds)

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Send the rest, for at most ``seconds``; does not end the run."""
        self._stop_watching()
        self._writer.close(seconds)

    def finish(self, status: Status = "FINISHED", seconds: float = FLUSH_SECONDS) -> None:
        """:meth:`close`, and end the run if this tracker owns it."""
        self._stop_watching()
        if self.owns:
            self._later(lambda: self._client.set_terminated(self.run_id, status), f"end of run {self.run_id}")
        self.close(seconds)

    def _stop_watching(self) -> None:
        if self._system is not None:
            self._system.stop()
            self._system = None

    def _later(self, task: Callable[[], Any], what: str) -> None:
        self._writer.do(task, what)

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        new = points if self._logged is None else self._logged.missing(points)
        metrics = [Metric(point.name, point.value, point.time, point.step) for point in new]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)

    def _log_file(self, name: PurePosixPath, content: bytes) -> None:
        with TemporaryDirectory(prefix="clipmill-artifact-") as folder:
            path = Path(folder) / name.name
            path.write_bytes(content)
            self._client.log_artifact(self.run_id, str(path), str(name.parent) if name.parent.name else None)

    def _describe(self, table: str, checkpoint: str) -> None:
        experiment = self._client.get_run(self.run_id).info.experiment_id
        artifacts = f"#/experiments/{experiment}/runs/{self.run_id}/artifacts"
        self._set_tags({NOTE: f"{self.about}\n\n{result(table, artifacts, checkpoint)}"})

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        safe = [RunTag(name, masked_value(name, value)[:LONGEST_TAG]) for name, value in tags.items()]
        for start in range(0, len(safe), PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, tags=safe[start : start + PARAMS_AT_ONCE])


class NoTracker:
    """A tracker that keeps its records in memory, for tests and runs without MLflow."""

    run_id = ""
    handle = None
    where = "not tracked"

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.figures: list[str] = []
        self.checkpoints: list[str] = []
        self.status = "RUNNING"

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FAILED" if kind else "FINISHED")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Remember metrics at a step."""
        self.history.append((step, dict(metrics)))

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Remember the figure's name."""
        self.figures.append(name)

    def log_text(self, name: str, text: str) -> None:
        """Do nothing."""

    def log_file(self, name: str, content: bytes) -> None:
        """Do nothing."""

    def log_dataset(self, snapshot: Snapshot, context: str = "training") -> None:
        """Do nothing."""

    def describe(self, table: str = "", checkpoint: str = "") -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def register_checkpoint(
        self,
        uri: str,
        metrics: Mapping[str, float],
        step: int,
        name: str = "clip",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Remember the checkpoint."""
        self.checkpoints.append(uri)

    def watch_node(self, node: str = "") -> None:
        """Do nothing."""

    def flush(self, seconds: float = 0.0) -> bool:
        """True: nothing is queued."""
        return True

    def close(self, seconds: float = 0.0) -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED", seconds: float = 0.0) -> None:
        """Store the run's final status."""
        self.status = status


def start(
    settings: Tracking,
    config: Any,
    run_id: str = "",
    tags: Mapping[str, str] | None = None,
    *,
    token: str = "",
    once: bool = False,
) -> MlflowTracker:
    """Create a run, or continue the run ``run_id``, and record its provenance.

    ``token`` is a word that the caller stored before: a new run gets it as a tag, and a run of the experiment that has
    this tag is continued. So a job that was killed before it stored the run's id makes no second run. ``once`` is that
    of :class:`RunHandle`.

    ``config`` is the whole resolved config of the job. It is logged flattened as parameters, for comparison, and as the
    artifact ``config.json``, for a repetition with ``--from``. A continued run keeps its parameters; the tag
    ``changed_on_resume`` lists those with new values. If the store no longer has the run, a new one is created, with
    the old id in the tag ``continues``.

    Raises:
        SettingError: the tracking server does not answer or refuses, MLflow does not support the kind of URI, or this
            machine cannot write the experiment's files. A run that was created before is ended as failed.
    """
    uri = checked_uri(settings.tracking_uri)
    with store_errors(uri):
        return _start(uri, settings, config, run_id, tags or {}, token, once)


def _start(
    uri: str, settings: Tracking, config: Any, run_id: str, tags: Mapping[str, str], token: str, once: bool
) -> MlflowTracker:
    store = client(uri)
    old = _existing(store, run_id) or _begun(store, settings, token)
    if run_id and not old:
        logger.warning("run %s is no longer in the store: creating a new one", run_id)
    if old:
        _check_reached(uri, old)
    run = _revive(store, old) if old else _create(store, uri, settings, token, run_title(config))
    tracker = MlflowTracker(RunHandle(uri=uri, run_id=run.info.run_id, once=once), owns=True)
    try:
        changed = _log_params(store, run, config)
        lost = {"continues": run_id} if run_id and not old else {}
        known = {**provenance_tags(), **preset_tags(config), **changed, **lost, **tags}
        tracker.about = description(config, known["mlflow.source.name"], known)
        tracker._set_tags({**known, NOTE: tracker.about})
        with artifact_errors(settings.experiment, run.info.artifact_uri):
            store.log_text(run.info.run_id, masked(to_json(config)), CONFIG)
        if settings.system_metrics:
            tracker.watch_node()
        logger.info("%s run %s; to look at it: %s", "continuing" if old else "new", tracker.run_id, tracker.where)
    except BaseException:
        tracker.__exit__(*sys.exc_info())  # no run is left as running
        raise
    return tracker


def attach(settings: Tracking, run_id: str) -> MlflowTracker:
    """A tracker that adds to the run ``run_id`` without changing its status.

    Raises:
        SettingError: the store has no such run, does not answer, or cannot write the run's files.
    """
    uri = checked_uri(settings.tracking_uri)
    with store_errors(uri):
        found = _existing(client(uri), run_id)
    if found is None:
        raise SettingError("run_id", run_id, f"a run of {masked(uri)}")
    _check_reached(uri, found)
    return RunHandle(uri=uri, run_id=run_id).open()


def open_tracker(
    settings: Tracking, config: Any, *, run_id: str = "", new: bool = False
) -> "MlflowTracker | NoTracker":
    """A tracker that adds to the run ``run_id``, else to a ``new`` one; else a tracker that records nothing."""
    if run_id:
        return attach(settings, run_id)
    return start(settings, config) if new else NoTracker()


def _existing(store: "MlflowClient", run_id: str) -> "Run | None":
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = store.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _begun(store: "MlflowClient", settings: Tracking, token: str) -> "Run | None":
    """The run that an earlier start with this token made."""
    experiment = store.get_experiment_by_name(settings.experiment) if token else None
    if experiment is None:
        return None
    found = store.search_runs([experiment.experiment_id], f"tags.{TOKEN} = '{token}'", max_results=1)
    return found[0] if found else None


def _check_reached(uri: str, run: "Run") -> None:
    reached = not needs_a_server(uri, run.info.artifact_uri)
    require(reached, "run_id", run.info.run_id, f"a run with files in this store, or {THROUGH_A_SERVER}")


def _revive(store: "MlflowClient", run: "Run") -> "Run":
    store.update_run(run.info.run_id, status="RUNNING")
    return store.get_run(run.info.run_id)


def _create(store: "MlflowClient", uri: str, settings: Tracking, token: str, title: str) -> "Run":
    experiment = _experiment(store, uri, settings)
    return store.create_run(experiment, run_name=settings.run_name or title, tags={TOKEN: token} if token else None)


def _experiment(store: "MlflowClient", uri: str, settings: Tracking) -> str:
    """The id of the experiment, created if missing; its tags select the UI's default columns."""
    from mlflow.exceptions import MlflowException

    tags = {
        "mlflow.experiment.primaryMetric.name": settings.primary_metric,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        "mlflow.experimentKind": "custom_model_development",
    }
    found = store.get_experiment_by_name(settings.experiment)
    if found is None:
        try:
            store.create_experiment(settings.experiment, artifact_location(uri, settings.experiment), tags)
        except MlflowException as error:  # another driver created it first
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = store.get_experiment_by_name(settings.experiment)
    if found is None or not found.experiment_id:  # a program that answers everything with nothing
        raise SettingError("tracking_uri", masked(uri), "an MLflow store (this one: knows no experiment it made)")
    if found.lifecycle_stage != "active":
        allowed = "an experiment that is not deleted (`mlflow experiments restore` brings it back)"
        raise SettingError("experiment", settings.experiment, allowed)
    reached = not needs_a_server(uri, found.artifact_location)
    require(reached, "experiment", settings.experiment, f"another name, or {THROUGH_A_SERVER}")
    for key, value in tags.items():
        if found.tags.get(key) != value:
            try:
                store.set_experiment_tag(found.experiment_id, key, value)
            except MlflowException:  # MLflow inserts a tag that another driver inserted since it looked
                if store.get_experiment(found.experiment_id).tags.get(key) != value:
                    raise
    return str(found.experiment_id)


def _log_params(store: "MlflowClient", run: "Run", config: Any) -> dict[str, str]:
    """Log the parameters that the run does not have yet; returns a tag that lists changed values."""
    from mlflow.entities import Param

    # The tracking settings do not describe the run, and would appear as differences in every comparison.
    logged = {name: value for name, value in flatten(config).items() if "tracking" not in name.split(".")[:-1]}
    wanted = {name: masked_value(name, value)[:LONGEST_PARAM] for name, value in logged.items()}
    known = run.data.params
    missing = [Param(name, value) for name, value in wanted.items() if name not in known]
    for start_at in range(0, len(missing), PARAMS_AT_ONCE):
        store.log_batch(run.info.run_id, params=missing[start_at : start_at + PARAMS_AT_ONCE])
    changed = {name: f"{known[name]} -> {value}" for name, value in wanted.items() if known.get(name, value) != value}
    if changed:
        logger.warning("the run is continued with other settings: %s", changed)
    return {"changed_on_resume": json.dumps(changed)} if changed else {}
