"""Few-shot trials in MLflow: one parent run for a job, with a table and a plot, and a child run for every trial.

The output folder stores the child run of each trial, so a resumed job adds to the existing runs.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import DataError
from pipeline.runs.few_shot import Result
from pipeline.runs.few_shot_report import comma_separated, figure, scores, table
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import MlflowTracker, NoTracker, Tracking, start
from pipeline.training.adapt_artifact import WORDS
from pipeline.training.run import is_plain_id

RUNS = "mlflow_runs.json"
PARENT = "parent"
TOKEN = "token"
"""Entry of a random word, stored before any run is made; see :func:`pipeline.tracking.runs.start`."""


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The parameters of a child run, for comparison."""

    protocol: str
    method: str
    data: str
    shots: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The ids of runs, by trial."""

    ids: Mapping[str, str]

    def __post_init__(self) -> None:
        for key, value in self.ids.items():
            require(is_plain_id(value), key, value, "the id of a run")


class FewShotRecord:
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

    def __enter__(self) -> "FewShotRecord":
        self._parent.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._parent.__exit__(*error)

    def add(self, result: Result) -> None:
        """Create a child run for ``result``, unless it exists."""
        key = f"{result.trial.name} {result.settings}"
        if isinstance(self._parent, NoTracker) or key in self._known:
            return
        trial = result.trial
        parameters = TrialSettings(
            protocol=trial.protocol, method=trial.method, data=trial.data, shots=trial.shots, seed=trial.seed
        )
        settings = replace(self._settings, run_name=trial.name, system_metrics=False)
        tags = {"mlflow.parentRunId": self._parent.run_id}
        with start(settings, parameters, tags=tags, token=self._token(key), once=True) as child:
            for numbers in result.history:
                child.log({name: value for name, value in numbers.items() if name != "epoch"}, int(numbers["epoch"]))
            child.log(_final(result), len(result.history))
            words = _words(self._folder, trial.name)
            if words:
                child.log_text(WORDS, words)
        self._remember(key, child.run_id)

    def conclude(self, results: Sequence[Result], title: str) -> str:
        """Store table, csv and plot in the folder and in the parent run; returns the table."""
        text, plot = table(results), figure(results, title)
        self._folder.write_atomic("table.md", text.encode())
        self._folder.write_atomic("table.csv", comma_separated(results).encode())
        with self._folder.scratch_file(".png") as path:
            plot.savefig(path)
            self._folder.write_atomic("accuracy.png", path)
        self._parent.log_text("table.md", text)
        self._parent.log_text("table.csv", comma_separated(results))
        self._parent.log_figure("accuracy", plot)
        for score in scores(results):
            where = "" if score.measured == score.data else f"/{score.measured}"
            name = f"{results[0].trial.protocol}/{score.data}{where}/{_plain(score.method)}/top1"
            self._parent.log({name: score.mean}, score.shots)
        return text

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


def _final(result: Result) -> dict[str, float]:
    measured = {f"test/{name}/{key}": value for name, one in result.scores.items() for key, value in one.items()}
    chosen = {f"chosen/{name}": value for name, value in result.chosen.items()}
    return {**measured, **chosen, "parameters": float(result.parameters), "perf/seconds": result.seconds}


def _words(folder: Folder, name: str) -> str:
    try:
        return folder.folder("adapters").folder(name).read_text(WORDS)
    except FileNotFoundError:
        return ""


def _plain(method: str) -> str:
    """MLflow allows letters, digits and ``_-. /`` in names of metrics."""
    return "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in method)
