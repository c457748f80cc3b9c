"""The probing job as users type it: a table, a JSON file, an MLflow run; wrong options in one sentence."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.jobs.conftest import Type, load_job


def test_smoke_prints_a_table_and_writes_json(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("linear_probe", "smoke", "--output", "result.json") == 0
    table = capsys.readouterr().out
    assert "linear probe" in table and "drawn_colours" in table and "trained on" in table
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["linear_probe/drawn_colours/chance"] == pytest.approx(1 / 10)
    assert metrics["linear_probe/drawn_colours/samples"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]


def test_slips_protocol_in_a_run_of_its_own(job: Type, tmp_path: Path, own_store: str) -> None:
    words = ["--protocol", "slip", "--epochs", "3", "--views", "2", "--step", "7"]
    assert job("linear_probe", "smoke", *words, "--track", "--tracking-uri", own_store, "--experiment", "tried") == 0
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("tried").experiment_id])
    assert run.data.params["probe.protocol"] == "slip"
    (point,) = client.get_metric_history(run.info.run_id, "linear_probe/drawn_colours/top1")
    assert point.step == 7


def test_presets_name_sets_with_pools() -> None:
    for _, preset in load_job("linear_probe")["PRESETS"].values():
        assert all(one.test is not None for one in preset.sets.prepare())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sets", "--checkpoint", "x"], "at least one set"),
        (["smoke", "--data", "drawn_shpaes"], "drawn_shpaes"),
        (["smoke", "--held-out", "2"], "--held-out: got 2"),
        (["smoke", "--track", "--run-id", "a"], "either --run-id or --track"),
        (["smoke", "--checkpoint", "nowhere"], "--checkpoint: got 'nowhere'"),
        (["smoke", "--test", "drawn_shapes", "drawn_colours"], "one for each of the 1"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("linear_probe", *arguments) in (1, 2)
    out, error = capsys.readouterr()
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
    assert out == ""
