"""The report job as users type it: a file, an artifact of an MLflow run, wrong options in one sentence."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.config import run_job

JOB = Path(__file__).resolve().parents[2] / "jobs" / "report_dataset.py"
Report = Callable[..., int]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The script as a module; tyro wants to find its source."""
    spec = importlib.util.spec_from_file_location("report_job", JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return vars(module)


@pytest.fixture
def report(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """``report(*words)`` types the job's command line in an empty folder and gives the exit code."""

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(JOB), *words])
        try:
            run_job(job["PRESETS"], job["main"])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return run


def test_smoke_shows_drawn_samples_with_their_boxes(report: Report, tmp_path: Path) -> None:
    assert report("smoke", "--data", str(tmp_path / "drawn"), "--output", "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/jpeg") >= 24
    assert 'class="box"' in page and 'class="outline"' in page


def test_the_page_is_kept_in_mlflow(report: Report, make_snapshot: Callable[..., Any], tmp_path: Path) -> None:
    snapshot = make_snapshot((4, 3))
    store = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["--data", snapshot.folder, "--output", "", "--processes-count", "0", "--tracking-uri", store]
    assert report("snapshot", *words) == 0
    client = MlflowClient(store)
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
        (["snapshot", "--data", "x", "--samples", "-1"], "samples: -1"),
        (["snapshot"], "--data"),
    ],
)
def test_wrong_options_are_one_sentence(
    words: list[str], sentence: str, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(*words) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
