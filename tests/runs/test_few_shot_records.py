"""The MLflow runs of few-shot trials, of jobs that are killed before they store the id of a run."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.runs.few_shot import Result, Trial
from pipeline.runs.few_shot_records import FewShotRecord
from pipeline.shards.storage import Folder
from pipeline.tracking.runs import Tracking


class Killed(BaseException):
    """Ends the job."""


def test_each_trial_is_one_run(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at every storing of an id: of the parent, and of the trial's run."""
    settings = Tracking(tracking_uri=store, experiment="few-shot-records", system_metrics=False)
    trial = Trial(protocol="few_shot", method="coop", data="drawn_shapes", shots=1, seed=1)
    history: Any = ({"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0})
    scores = {"drawn_shapes": {"top1": 0.5}}
    result = Result(trial=trial, settings="s", scores=scores, chosen={}, history=history, parameters=3, seconds=1.0)
    remember = FewShotRecord._remember

    def start(dies_at: int) -> None:
        left = [dies_at]

        def dying(record: FewShotRecord, key: str, run_id: str) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed
            remember(record, key, run_id)

        monkeypatch.setattr(FewShotRecord, "_remember", dying)
        with FewShotRecord(settings, trial, Folder(tmp_path), track=True) as record:
            record.add(result)
            record.add(result)

    for dies_at in (1, 2, 1):  # before the token is stored, and twice before the parent's id is
        with pytest.raises(Killed):
            start(dies_at)
    for _ in range(2):  # before the child's id is stored
        with pytest.raises(Killed):
            start(2)
    start(0)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("few-shot-records")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (child,) = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if run is not child]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {parent.info.status, child.info.status} == {"FINISHED"}
    losses = client.get_metric_history(child.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in losses) == [(1, 2.0), (2, 1.0)]
