"""Teacher, pseudo boxes, student: the sequence of docs/grounding.md, and its schedule."""

import re
import shlex
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import config
from pipeline.config import from_yaml
from pipeline.shards.snapshot import read_snapshot
from pipeline.stages.scheduling.timetable import Timetable
from tests.conftest import ROOT
from tests.jobs.conftest import Type, load_job


def test_the_schedule_types_commands_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPMILL_BUCKET", "s3://bucket")
    timetable = from_yaml(Timetable, ROOT / "docs" / "self_training.yaml")
    assert [job.name for job in timetable.jobs] == [
        "train-teacher",
        "refresh-captions",
        "annotate-captions",
        "train-student",
    ]
    parsed = {}
    for job in timetable.jobs:
        plain = re.sub(r"\$\([^)]*\)", "now", job.command).replace("$CLIPMILL_BUCKET", "s3://bucket")
        program, script, *words = shlex.split(plain)
        assert program == "python"
        parsed[job.name] = config._parse(load_job(Path(script).stem, f"scheduled_{len(parsed)}")["PRESETS"], words)
    student, boxes = parsed["train-student"], parsed["annotate-captions"].options
    assert student.method.grounding.pseudo_boxes == boxes.name
    assert student.method.grounding.least_box_score >= boxes.least_score


@pytest.mark.slow
def test_a_student_is_trained_on_its_teachers_boxes(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student's run names the teacher's run and the snapshot with its boxes; gold and pseudo boxes mix."""
    drawn = ("refresh_dataset", "drawn", "--samples", "32", "--size", "64", "--processes-count", "0")
    assert job(*drawn, "--output-folder", "gold") == 0
    assert job(*drawn, "--first", "32", "--truth", "none", "--output-folder", "captions") == 0
    train = ("--base", "drawn_base", "--tracking-uri", own_store, "--steps", "2", "--batch-size", "8")
    small = ("--image-size", "64", "--draw", "0")
    assert job("pretrain_glip", "smoke", *train, *small, "--data", "gold", "--output-folder", "teacher") == 0
    client = MlflowClient(own_store)
    experiments = [one.experiment_id for one in client.search_experiments()]
    (teacher,) = client.search_runs(experiments)
    annotate = ("annotate_pseudo_boxes", "checkpoint", "--data", "captions", "--teacher", "teacher", "--no-track")
    assert job(*annotate, "--least-score", "0", "--processes-count", "0") == 0
    pseudo = read_snapshot("captions")
    assert all("boxes" in shard.sidecars for shard in pseudo.shards) and "boxes.json" not in pseudo.fields
    mixed = ("--data", "gold=0.5,captions=0.5", "--pseudo-boxes", "boxes", "--least-box-score", "0")
    assert job("pretrain_glip", "smoke", *train, *small, *mixed, "--output-folder", "student") == 0
    (student,) = [run for run in client.search_runs(experiments) if run.info.run_id != teacher.info.run_id]
    tags = student.data.tags
    assert tags["boxes.teacher_run"] == teacher.info.run_id and "teacher" in tags["boxes.teacher_name"]
    assert {tags["training.snapshot"], tags["training_2.snapshot"]} == {read_snapshot("gold").uri, pseudo.uri}
    assert student.data.metrics["train/loss"] > 0
    capsys.readouterr()
    wrong = ("--data", "gold", "--pseudo-boxes", "others", "--output-folder", "other")
    assert job("pretrain_glip", "smoke", *train, *small, *wrong) == 1
    assert "has no others; make them with jobs/annotate_pseudo_boxes.py" in capsys.readouterr().err
