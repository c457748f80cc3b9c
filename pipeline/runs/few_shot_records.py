"""Few-shot trials in MLflow: one parent run for a job, with a table and a plot, and a child run for every trial.

The output folder stores the child run of each trial, so a resumed job adds to the existing runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.runs.child_runs import ChildRuns
from pipeline.runs.few_shot import Result
from pipeline.runs.few_shot_report import comma_separated, figure, scores, table
from pipeline.shards.storage import Folder
from pipeline.training.adapt_artifact import WORDS


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """The parameters of a child run, for comparison."""

    protocol: str
    method: str
    data: str
    shots: int
    seed: int


class FewShotRecord(ChildRuns):
    """The MLflow runs of one job; a context manager that ends the parent."""

    def add(self, result: Result) -> None:
        """Create a child run for ``result``, unless it exists."""
        key = f"{result.trial.name} {result.settings}"
        trial = result.trial
        parameters = TrialSettings(
            protocol=trial.protocol, method=trial.method, data=trial.data, shots=trial.shots, seed=trial.seed
        )
        run = self._child(key, trial.name, parameters)
        if run is None:
            return
        with run as child:
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
        self._parent.describe(text)
        self._parent.log_text("table.md", text)
        self._parent.log_text("table.csv", comma_separated(results))
        self._parent.log_figure("accuracy", plot)
        for score in scores(results):
            where = "" if score.measured == score.data else f"/{score.measured}"
            name = f"{results[0].trial.protocol}/{score.data}{where}/{_plain(score.method)}/top1"
            self._parent.log({name: score.mean}, score.shots)
        return text


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
