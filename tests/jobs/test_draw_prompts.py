"""The drawing job as users type it: smoke with MLflow, again, on Ray, and wrong options."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import Tensor

from pipeline.generation.text_objective import TextObjective
from tests.conftest import ROOT, RayCluster
from tests.jobs.conftest import Type

TINY = "clipdraw:clips=[clipmill-tiny:untrained],strokes=4,side=48,views=1,loop.steps=6,loop.evaluate_every=2"
JUDGE = ("--judge", "clipmill-small:untrained")


def test_smoke_draws_and_records_children_and_goes_on(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ("draw_prompts", "smoke", "--output-folder", "out", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert job(*typed) == 0
    table = capsys.readouterr().out.splitlines()
    methods = ("clipdraw", "clipasso", "vqgan_clip")
    assert [line.partition(":")[0] for line in table[2:]] == [f"| {name}" for name in methods]
    rows = pq.read_table(tmp_path / "out/scores.parquet").to_pylist()
    assert len(rows) == 6 and sum(row["best"] for row in rows) == 3
    for row in rows:
        with Image.open(tmp_path / "out" / row["png"]) as image:
            assert image.size == ((64, 48) if row["method"].startswith("vqgan") else (64, 64))
    assert (tmp_path / "out/gallery.html").read_text().count("<figure") == 6
    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [one.experiment_id for one in store.search_experiments() if one.name == "clipmill"]
    runs = store.search_runs([experiment])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 7 and len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    for run in children:
        assert run.info.status == "FINISHED"
        assert [one.step for one in store.get_metric_history(run.info.run_id, "drawing/judge")] == [2, 4]
        assert len(store.list_artifacts(run.info.run_id, "steps")) == 3
        drawing = not run.data.params["method"].startswith("vqgan")  # those have no SVG
        assert len(store.list_artifacts(run.info.run_id, "image")) == 2 + drawing
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").iterdir()}
    assert job(*typed) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").iterdir()} == before
    assert len(store.search_runs([experiment])) == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["clipdraw"], "prompts: nothing given, expected one or more, for clipdraw"),
        (["clipdraw", "--prompts", " "], "prompt: "),
        (["clipdraw", "--prompts", "red:0"], "a weight other than 0"),
        (["clipdraw", "--prompts", "red", "--seeds", "1", "1"], "seeds: got (1, 1)"),
        (["clipdraw", "--prompts", "red", "--methods", "clipdrow"], "did you mean clipdraw"),
        (["clipdraw", "--prompts", "red", "--methods", "clipdraw:strokes=0"], "strokes: got 0"),
        (["clipdraw", "--prompts", "none.txt"], "no such file"),
        (["clipasso", "--images", "none.png"], "no such file"),
        (["clipasso", "--images", "drawn://val/0/0", "--judge", "RN101-quickgelu:openai"], "judge: "),
        (["clipdraw", "--prompts", "red", "--per-gpu", "0"], "--per-gpu: got 0"),
        (["clipdraw", "--prompts", "red", "--steps", "0"], "steps: got 0"),
        (
            ["clipdraw", "--prompts", "red", "--steps", "9", "--methods", "clipdraw", "clipdraw:loop.steps=3"],
            "more than loop.steps",
        ),
        (["clipdraw", "--prompts", "red " * 90, "--methods", TINY, *JUDGE], "at most 77 tokens"),
        (["clipdraw", "--prompts", "red", "--methods", TINY, "--judge", "none:untrained"], "architecture: "),
        (["clipdraw", "--prompts", "red", "--methods", TINY, *JUDGE, "--device", "cuda"], "device: got 'cuda'"),
    ],
)
def test_wrong_options_are_one_sentence(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    more = ["--processes-count", "0", "--no-track", "--output-folder", "out"]
    assert job("draw_prompts", *arguments, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_a_failed_image_is_an_exit_code_after_all_others(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = TextObjective.losses

    def poisoned(self: TextObjective, images: Tensor, random: Any) -> dict[str, Tensor]:
        bad = torch.tensor([some[0].text == "a disc" for some in self.prompts])
        return {name: loss.masked_fill(bad, torch.nan) for name, loss in losses(self, images, random).items()}

    monkeypatch.setattr(TextObjective, "losses", poisoned)
    typed = ("clipdraw", "--methods", TINY, "--prompts", "a disc", "a star", *JUDGE, "--film", "none")
    assert job("draw_prompts", *typed, "--processes-count", "0", "--no-track", "--output-folder", "out") == 1
    said = capsys.readouterr()
    assert "error: 1 of 2 images failed" in said.err.splitlines()[-1] and "-a-disc-" in said.err.splitlines()[-1]
    assert said.out.splitlines()[-1].endswith("| 1 |") and (tmp_path / "out/gallery.html").is_file()
    rows = pq.read_table(tmp_path / "out/scores.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["failed", "finished"]


def typed(folder: Path, *more: str) -> list[str]:
    words = ["clipdraw", "--methods", TINY, "--prompts", "a red star", "a disc", "--seeds", "1", "2", *JUDGE]
    words += ["--no-track", "--output-folder", str(folder), "--film", "none", *more]
    return [sys.executable, str(ROOT / "jobs/draw_prompts.py"), *words]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_job_goes_on_and_tasks_of_ray_give_the_same_images(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Killed without a word once the first image is finished; then four images of two tasks at a time."""
    steps = ("--steps", "100")
    here = typed(tmp_path / "here", *steps, "--processes-count", "0")
    started = subprocess.Popen(here, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while time.monotonic() < until and not list((tmp_path / "here").glob("results/*.json")):
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "here/results").iterdir()}
    assert 1 <= len(first) < 4
    environment = {**ray_cluster.environment, "PYTHONPATH": str(ROOT)}
    subprocess.run(here, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "here/results").iterdir()}
    assert len(after) == 4 and all(after[name] == at for name, at in first.items())
    on_ray = typed(tmp_path / "ray", *steps, "--processes-count", "2")
    subprocess.run(on_ray, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert images(tmp_path / "ray") == images(tmp_path / "here")
