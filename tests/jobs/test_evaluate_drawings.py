"""The job that evaluates drawings, as typed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from tests.jobs.conftest import Type


def test_smoke_draws_evaluates_and_records(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_store: str
) -> None:
    (tmp_path / "texts.txt").write_text("a green house\na red star\n")
    words = ("--drawings", "out", "--distractors", "texts.txt", "--track", "--tracking-uri", own_store)
    assert job("evaluate_drawings", "smoke", *words) == 0
    table = capsys.readouterr().out
    assert "R-precision among 3 texts" in table and "Recognition among 24 classes" in table
    assert (tmp_path / "out/evaluation.md").read_text() in table
    rows = pq.read_table(tmp_path / "out/evaluation.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["star", "disc"]
    store = MlflowClient(own_store)
    (experiment,) = [one.experiment_id for one in store.search_experiments() if one.name == "clipmill"]
    (run,) = store.search_runs([experiment])
    (name,) = [name for name in run.data.metrics if name.endswith("/r_precision")]
    assert run.data.metrics[name] == sum(row["texts_before"] == 0 for row in rows) / 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prompts", "--drawings", "none"], "the output folder of a finished jobs/draw_prompts.py"),
        (["prompts", "--drawings", "none", "--distractors", "none.txt"], "distractors: "),
        (["prompts", "--drawings", "none", "--labels", "a.csv"], "none, or --classes with their names"),
        (["sketches", "--drawings", "none", "--classes", "none.txt"], "classes: "),
    ],
)
def test_wrong_options_are_one_sentence(
    job: Type, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert job("evaluate_drawings", *arguments, "--judge", "clipmill-tiny:untrained", "--no-track") == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
