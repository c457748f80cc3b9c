"""A job's MLflow run with a child run for each of its parts, whose ids the output folder remembers.

A job that is started again adds to its runs, and a part has one child also if the job was killed before it knew its id.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import DataError
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import MlflowTracker, NoTracker, Tracking, start
from pipeline.training.run import is_plain_id

RUNS = "mlflow_runs.json"
PARENT = "parent"
TOKEN = "token"
"""Entry of a random word, stored before any run is made; see :func:`pipeline.tracking.runs.start`."""


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The ids of runs, by part."""

    ids: Mapping[str, str]

    def __post_init__(self) -> None:
        for key, value in self.ids.items():
            require(is_plain_id(value), key, value, "the id of a run")


class ChildRuns:
    """The MLflow runs of one job; a context manager that ends the parent."""

    def __init__(self, settings: Tracking, job: Any, folder: Folder, track: bool) -> None:
        """Continue the job's runs, or create them.

        Raises:
            SettingError: the tracking server does not answer.
            DataError: the list of runs in ``folder`` is damaged.
        """
        self._settings, self._folder = settings, folder
        self._known = _read(folder) if track else {}
        self._parent: MlflowTracker | NoTracker = NoTracker()
        if track:
            if TOKEN not in self._known:
                self._remember(TOKEN, uuid.uuid4().hex)
            self._parent = start(settings, job, run_id=self._known.get(PARENT, ""), token=self._token(PARENT))
            self._remember(PARENT, self._parent.run_id)

    def __enter__(self) -> Self:
        self._parent.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._parent.__exit__(*error)

    def _child(self, key: str, name: str, parameters: Any) -> MlflowTracker | None:
        """A new child run, to be used as a context and remembered afterwards; ``None`` if it exists or none is kept."""
        if isinstance(self._parent, NoTracker) or key in self._known:
            return None
        settings = replace(self._settings, run_name=name, system_metrics=False)
        tags = {"mlflow.parentRunId": self._parent.run_id}
        return start(settings, parameters, tags=tags, token=self._token(key), once=True)

    def _token(self, key: str) -> str:
        return hashlib.sha256(f"{self._known[TOKEN]} {key}".encode()).hexdigest()[:32]

    def _remember(self, key: str, run_id: str) -> None:
        self._known[key] = run_id
        self._folder.write_atomic(RUNS, json.dumps(self._known, indent=1).encode())


def _read(folder: Folder) -> dict[str, str]:
    try:
        return dict(from_plain(_Runs, {"ids": parse_json(folder.read_bytes(RUNS))}, folder.join(RUNS)).ids)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{folder.join(RUNS)} is no list of MLflow runs ({error}); delete it for new runs") from error
