"""The region job as its users start it."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import Type


def test_smoke_says_what_it_found_and_logs_it(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("extract_region_features", "smoke", "--data", "drawn", "--track", "--tracking-uri", own_store) == 0
    assert "regions of 64 images" in capsys.readouterr().out
    assert all("regions" in shard.sidecars for shard in read_snapshot("drawn").shards)
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])
    assert run.data.metrics["regions/count"] > run.data.metrics["regions/matched"] > 20
    assert len(client.get_metric_history(run.info.run_id, "regions/shard_accuracy")) == 4


def test_all_shards_are_judged_together_after_they_were_logged(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shard has less regions than make a judgement; all of them have enough."""
    tracked = ("--data", "drawn", "--track", "--tracking-uri", own_store)
    assert job("extract_region_features", "smoke", *tracked) == 0
    client = MlflowClient(own_store)

    def runs() -> list[Any]:
        return client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])

    total = int(runs()[0].data.metrics["regions/matched"])
    strict = ("--floor", "1", "--least-matched", str(total), "--name", "other")
    assert job("extract_region_features", "smoke", *tracked, *strict) == 1
    assert f"of {total} regions that cover an object" in capsys.readouterr().err
    last = runs()[0]
    assert last.info.status == "FAILED" and last.data.metrics["regions/matched"] == total
    assert 0 < last.data.metrics["regions/covered"] <= last.data.metrics["regions/objects"]


def test_data_that_tell_no_classes_ask_for_a_word(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    """A check is left out by saying so."""
    assert job("extract_region_features", "smoke", "--data", "drawn") == 0
    plain = ("boxes", "--data", "drawn", "--teacher", "clipmill-tiny:untrained", "--no-track", "--processes-count", "0")
    assert job("extract_region_features", *plain, "--name", "other") == 2
    assert "classes: got 'data'" in capsys.readouterr().err
    assert job("extract_region_features", *plain, "--name", "other", "--classes", "none") == 0
    assert "are nearest" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["boxes", "--data", "none", "--teacher", "clipmill-tiny:untrained", "--no-track"], "has no snapshot", 1),
        (["boxes", "--data", "x", "--teacher", "y", "--floor", "2"], "--floor: got 2", 2),
        (["smoke", "--classes", "drwan"], "card: got 'drwan'", 2),
        (["smoke", "--classes", ""], "--classes: nothing given", 2),
    ],
)
def test_wrong_settings_are_one_sentence(
    words: list[str], said: str, code: int, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("extract_region_features", *words) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
