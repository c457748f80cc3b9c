"""The job of pseudo boxes as its users start it."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.runs.train import teacher_tags
from pipeline.shards.sidecar import Wanted
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.pseudo_boxes import PseudoBoxCounts, read_counts, read_pseudo_boxes
from tests.jobs.conftest import Type


def rows(snapshot: Snapshot, name: str = "boxes") -> list[dict[str, Any]]:
    folder = Folder(snapshot.folder)
    return [row for shard in snapshot.shards for row in read_pseudo_boxes(folder, shard, name)]


def test_smoke_stores_boxes_and_logs_their_statistics(
    job: Type, tmp_path: Path, own_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("annotate_pseudo_boxes", "smoke", "--data", "drawn", "--track", "--tracking-uri", own_store) == 0
    snapshot = read_snapshot("drawn")
    found = rows(snapshot)
    counts = sum((read_counts(Folder(snapshot.folder), one) for one in snapshot.shards), PseudoBoxCounts())
    assert f"{counts.boxes} boxes" in capsys.readouterr().out
    assert len(found) == 16 and counts.boxes == sum(len(row["scores"]) for row in found) > 100
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])
    assert run.data.metrics["pseudo_boxes/boxes"] == counts.boxes
    assert run.data.metrics["pseudo_boxes/phrases_found"] == pytest.approx(counts.found / counts.phrases)
    assert len(client.get_metric_history(run.info.run_id, "pseudo_boxes/shard_boxes")) == 2
    figures = {one.path for one in client.list_artifacts(run.info.run_id, "figures")}
    assert figures == {"figures/samples.png", "figures/scores.png"}
    tags = teacher_tags(snapshot, [Wanted(name="boxes", job="job"), Wanted(name="others", job="job", optional=True)])
    assert tags["boxes.teacher_name"] == "untrained" and len(tags["boxes.teacher"]) == 64


def test_phrases_of_every_source(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    """The same phrases from a sidecar as from its extractor; those of the data are others, and need no text."""
    assert job("annotate_pseudo_boxes", "smoke", "--data", "drawn") == 0
    assert job("extract_phrases", "snapshot", "--data", "drawn", "--processes-count", "0", "--no-track") == 0
    again = ("annotate_pseudo_boxes", "smoke", "--data", "drawn")
    assert job(*again, "--phrases", "sidecar:phrases", "--name", "stored") == 0
    assert job(*again, "--phrases", "boxes.json", "--name", "annotated") == 0
    snapshot = read_snapshot("drawn")
    extracted, stored, annotated = (rows(snapshot, name) for name in ("boxes", "stored", "annotated"))
    assert extracted == stored != annotated
    assert [row["captions"] for row in annotated] == [row["captions"] for row in stored]
    capsys.readouterr()
    assert job(*again, "--phrases", "sidecar:none") == 1
    assert "none.parquet is missing; make it with jobs/extract_phrases.py" in capsys.readouterr().err
    assert job(*again, "--phrases", "sidecar:phrases", "--caption", "auto") == 1
    assert "has phrases of txt, not auto" in capsys.readouterr().err
    assert job(*again, "--phrases", "boxes.json") == 1
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["checkpoint", "--data", "none", "--teacher", "x", "--no-track"], "has no snapshot", 1),
        (["smoke", "--least-score", "2"], "least_score: got 2", 2),
        (["smoke", "--phrases", "sidecar:"], "phrases: got 'sidecar:'", 2),
        (["smoke", "--phrases", "rulse"], "extractor: got 'rulse'", 2),
        (["smoke", "--caption", "title"], "caption: got 'title'", 2),
        (["owlv2", "--data", "", "--no-track"], "data: nothing given", 2),
    ],
)
def test_wrong_settings(job: Type, capsys: pytest.CaptureFixture[str], words: list[str], said: str, code: int) -> None:
    assert job("annotate_pseudo_boxes", *words) == code
    assert said in capsys.readouterr().err.replace("--least-score", "least_score")
