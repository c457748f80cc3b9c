"""The region job as its users start it."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import Type


def test_smoke_says_what_it_found_and_logs_it(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert job("extract_region_features", "smoke", "--data", "drawn", "--track", "--tracking-uri", store) == 0
    assert "regions of 64 pictures" in capsys.readouterr().out
    assert all("regions" in shard.sidecars for shard in read_snapshot("drawn").shards)
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])
    assert run.data.metrics["regions/count"] > run.data.metrics["regions/matched"] > 20
    assert len(client.get_metric_history(run.info.run_id, "regions/shard_accuracy")) == 4


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["boxes", "--data", "none", "--teacher", "clipmill-tiny:untrained", "--no-track"], "has no snapshot", 1),
        (["boxes", "--data", "x", "--teacher", "y", "--floor", "2"], "floor: 2", 2),
        (["smoke", "--classes", "drwan"], "card: 'drwan'", 2),
    ],
)
def test_wrong_settings_are_one_sentence(
    words: list[str], said: str, code: int, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("extract_region_features", *words) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
