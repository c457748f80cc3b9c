"""The records of a run in MLflow besides its metrics: training data, and checkpoints as model versions."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pipeline.shards.privacy import masked
from pipeline.shards.snapshot import Snapshot
from pipeline.tracking.writer import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SYSTEM = "system/"  # prefix of MLflow's names of system metrics
LONGEST_DIGEST = 36  # MLflow's limit; the whole digest is in the run's tags


class LoggedSteps:
    """The steps at which a run has a metric already, read from the store when the metric is first sent."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._names: set[str] | None = None
        self._steps: dict[str, set[int]] = {}

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """The ``points`` that the run did not have before; all of system metrics, whose steps are seconds."""
        names = {point.name for point in points if not point.name.startswith(SYSTEM)}
        for name in names - self._steps.keys():
            self._steps[name] = self._stored(name)
        return [point for point in points if point.step not in self._steps.get(point.name, ())]

    def _stored(self, name: str) -> set[int]:
        if self._names is None:
            self._names = set(self._client.get_run(self._run_id).data.metrics)
        if name not in self._names:
            return set()
        return {point.step for point in self._client.get_metric_history(self._run_id, name)}


def charted(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation without the sizes of its sets, which would be constant charts."""
    return {name: value for name, value in metrics.items() if not name.endswith("/samples")}


def log_snapshot(client: "MlflowClient", run_id: str, snapshot: Snapshot, context: str) -> None:
    """Record ``snapshot`` as an input of the run; a repeated call changes nothing.

    Equals MLflow's ``MetaDataset``, without its guess of the source's type, which warns about ambiguous types.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=snapshot.card or PurePosixPath(snapshot.folder).name,
        digest=snapshot.digest[:LONGEST_DIGEST],
        source_type=urlparse(snapshot.folder).scheme or "local",
        source=json.dumps({"uri": masked(snapshot.uri)}),
        profile=json.dumps({"samples": snapshot.samples, "shards": len(snapshot.shards), "rows": snapshot.rows}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def register(
    client: "MlflowClient",
    run_id: str,
    uri: str,
    metrics: dict[str, float],
    step: int,
    name: str,
    tags: dict[str, str],
) -> None:
    """Make the checkpoint at ``uri`` a version of the registered model ``name``; its files are not moved.

    Does nothing for a checkpoint that this run has registered before.
    """
    uri, metrics = masked(uri), charted(metrics)
    _create_registered_model(client, name)
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if any(version.tags.get("checkpoint") == uri for version in versions):
        return
    model_id = _logged_model(client, run_id, uri, step) or _log_model(client, run_id, uri, metrics, step)
    tags = {"checkpoint": uri, "step": str(step), **tags}
    version = _create_version(client, run_id, name, uri, model_id, tags, _description(uri, metrics, step))
    logger.info("registered %s as version %s of the model %s", uri, version, name)


def _create_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        by_others = "; open_clip reads their weights" if name == "clip" else ""
        client.create_registered_model(name, description=f"Checkpoints of clipmill{by_others}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _logged_model(client: "MlflowClient", run_id: str, uri: str, step: int) -> str | None:
    """The model that a killed job logged for this checkpoint before it made a version of it."""
    experiment = client.get_run(run_id).info.experiment_id
    same = f"source_run_id = '{run_id}' AND name = '{_model_name(step)}'"
    found = client.search_logged_models([experiment], same)
    return next((str(one.model_id) for one in found if one.params.get("checkpoint") == uri), None)


def _model_name(step: int) -> str:
    return f"step-{step:08d}"


def _log_model(client: "MlflowClient", run_id: str, uri: str, metrics: dict[str, float], step: int) -> str:
    """A logged model with files outside of MLflow, the row of the UI's model table; returns its id."""
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=_model_name(step),
        source_run_id=run_id,
        tags={"mlflow.model.isExternal": "true", "checkpoint": uri},
        params={"checkpoint": uri, "step": str(step)},
        model_type="clip",
    )
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    if metrics:
        points = [
            Metric(key, value, _time_of(client, run_id, key, step, value), step, model_id=model.model_id)
            for key, value in metrics.items()
        ]
        client.log_batch(run_id, metrics=points)
    return str(model.model_id)


def _time_of(client: "MlflowClient", run_id: str, key: str, step: int, value: float) -> int:
    """When the run logged this value, in ms since 1970, so that the model's point is the same and not a second one."""
    points = client.get_metric_history(run_id, key)
    same = (point.timestamp for point in points if point.step == step and point.value == value)
    return int(next(same, time.time_ns() // 1_000_000))


def _description(uri: str, metrics: dict[str, float], step: int) -> str:
    """Markdown for the version's page: its address, how to load it, its metrics."""
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    load = "`open_clip.create_model(ARCHITECTURE, pretrained=CHECKPOINT/model.safetensors)`"
    table = ["", "| metric | value |", "|---|---|", *rows] if rows else []
    return "\n".join([f"Step {step:,}, checkpoint `{uri}`.", "", f"To load it: {load}", *table])


def _create_version(
    client: "MlflowClient",
    run_id: str,
    name: str,
    uri: str,
    model_id: str,
    tags: dict[str, str],
    description: str,
) -> str:
    from mlflow.exceptions import MlflowException

    settings: dict[str, Any] = {
        "run_id": run_id,
        "model_id": model_id,
        "tags": tags,
        "description": description,
        "await_creation_for": 0,
    }
    try:
        version = client.create_model_version(name, uri, **settings)
    except MlflowException as error:
        # A server does not let a version refer to its own disk; the version then refers to the logged model, whose
        # parameter holds the address of the files.
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        version = client.create_model_version(name, f"models:/{model_id}", **settings)
    return str(version.version)
