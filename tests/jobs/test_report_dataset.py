"""The report job as users type it: a file, an artifact of an MLflow run, wrong options in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.jobs.conftest import Type


def test_smoke_shows_drawn_samples_with_their_boxes(job: Type, tmp_path: Path) -> None:
    assert job("report_dataset", "smoke", "--data", str(tmp_path / "drawn"), "--output", "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/jpeg") >= 24
    assert 'class="box"' in page and 'class="outline"' in page


def test_the_page_is_kept_in_mlflow(
    job: Type, make_snapshot: Callable[..., Any], tmp_path: Path, own_store: str
) -> None:
    snapshot = make_snapshot((4, 3))
    words = ["--data", snapshot.folder, "--output", "", "--processes-count", "0", "--tracking-uri", own_store]
    assert job("report_dataset", "snapshot", *words) == 0
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["data/samples"] == 7
    assert run.data.tags["report.digest"] == snapshot.digest
    page = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    assert "visible to readers" in Path(page).read_text()
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob("*.htm"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["snapshot", "--data", "nowhere", "--no-track"], "nowhere has no snapshot"),
        (["snapshot", "--data", "x", "--output", "page.pdf"], "ends in .html"),
        (["snapshot", "--data", "x", "--output", "", "--no-track"], "output"),
        (["snapshot", "--data", "x", "--samples", "-1"], "--samples: got -1"),
        (["snapshot"], "--data"),
    ],
)
def test_wrong_options_are_one_sentence(
    words: list[str], sentence: str, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("report_dataset", *words) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
