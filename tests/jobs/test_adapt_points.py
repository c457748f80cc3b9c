"""Few-shot adaptation on point clouds as users type it, with an ensemble, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.evaluation.embedder import LoadEmbedder
from pipeline.evaluation.ensemble import read_scores, scores_file
from pipeline.runs import few_shot_ensemble
from pipeline.runs.few_shot_ensemble import digest_of_scores
from pipeline.sources.drawn.solids import SOLIDS
from tests.jobs.conftest import Type

TINY = ("--model", "clipmill-tiny:untrained", "--data", "drawn_solids", "--samples", "32", "--seeds", "1")
QUICK = ("--output", "out", "--no-track", "--processes-count", "0", "--validation", "whole")


def adapt(job: Type, *words: str) -> int:
    return job("adapt", "few-shot", *TINY, *QUICK, *words)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "out/trials").glob("*.json"))]
    return {one["trial"]["method"]: one for one in found}


def test_methods_on_clouds_and_their_ensembles(job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("--methods", "zero_shot", "pointclip:epochs=2", "tip_adapter:search=false", "--shots", "2")
    assert adapt(job, *methods, "--keep-scores") == 0
    before = results(tmp_path)
    assert set(before) == {"zero_shot", "pointclip:epochs=2", "tip_adapter:search=false"}
    assert all(set(one["scores"]) == {"drawn_solids"} for one in before.values())
    scores = read_scores(str(tmp_path / "out/scores/pointclip-epochs-2-drawn_solids-2-shots-seed-1-test.parquet"))
    assert scores.classes == SOLIDS and scores.keys[5] == "drawn://solids/0/5"
    labels = torch.arange(32) % 16
    assert (
        float((scores.values.argmax(dim=1) == labels).float().mean())
        == before["pointclip:epochs=2"]["scores"]["drawn_solids"]["top1"]
    )
    # A perfect classifier, under the keys of both parts; its weight is found on the validation part.
    validation = [f"drawn://solids_train/0/{1_000_000 + number}" for number in range(32)]
    keys, perfect = [*scores.keys, *validation], 100 * torch.eye(16)[torch.cat([labels, labels])]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    names = [SOLIDS[number] for number in order.tolist()]
    (tmp_path / "network.parquet").write_bytes(scores_file(keys, names, perfect[:, order]))
    capsys.readouterr()
    assert (
        adapt(
            job, *methods[:2], *methods[2:3], "--shots", "2", "--ensemble", "network.parquet", "--ensemble-weight", "1"
        )
        == 0
    )
    assert adapt(job, "--methods", "pointclip:epochs=2", "--shots", "2", "--ensemble", "network.parquet") == 0
    found = results(tmp_path)["pointclip:epochs=2"]
    assert found["scores"]["ensemble"]["top1"] == 1 and found["chosen"]["ensemble_weight"] > 0
    assert found["scores"]["drawn_solids"] == before["pointclip:epochs=2"]["scores"]["drawn_solids"]
    with (tmp_path / "out/table.csv").open() as lines:
        rows = {row["method"]: float(row["top1_mean"]) for row in csv.DictReader(lines)}
    assert rows["pointclip:epochs=2 + ensemble"] == 1
    assert "pointclip:epochs=2 + ensemble" in capsys.readouterr().out


def test_a_changed_file_of_scores_and_scores_that_are_missing_make_a_trial_run_again(job: Type, tmp_path: Path) -> None:
    words = ("--methods", "zero_shot", "--ensemble", "network.parquet", "--ensemble-weight", "1")
    keys, labels = [f"drawn://solids/0/{number}" for number in range(32)], torch.arange(32) % 16
    for right in (1.0, 0.0):
        scores = (2 * right - 1) * torch.eye(16)[labels]
        (tmp_path / "network.parquet").write_bytes(scores_file(keys, SOLIDS, scores))
        digest_of_scores.cache_clear()  # as in another process
        assert adapt(job, *words) == 0
        assert results(tmp_path)["zero_shot"]["scores"]["ensemble"]["top1"] == right
    assert not (tmp_path / "out/scores").exists()
    assert adapt(job, *words, "--keep-scores") == 0
    assert len(list((tmp_path / "out/scores").iterdir())) == 1


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("not reached")


def test_a_file_of_scores_that_does_not_fit_is_refused_before_any_work(
    job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a class before data are read; without a sample before they are embedded."""
    monkeypatch.setattr(LoadEmbedder, "__call__", refuse)
    words = ("--methods", "pointclip", "--shots", "1", "--ensemble", "network.parquet")
    (tmp_path / "network.parquet").write_bytes(scores_file(["a"], SOLIDS[1:], torch.zeros(1, 15)))
    assert adapt(job, *words) != 0
    assert f"it lacks {SOLIDS[0]}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out/data").exists()
    tested = [f"drawn://solids/0/{number}" for number in range(32)]
    validation = [f"drawn://solids_train/0/{1_000_000 + number}" for number in range(31)]
    for keys, lacking in ((tested[:-1] + validation, "solids/0/31"), (tested + validation, "solids_train/0/1000031")):
        (tmp_path / "network.parquet").write_bytes(scores_file(keys, SOLIDS, torch.zeros(len(keys), 16)))
        digest_of_scores.cache_clear()  # as in another process
        assert adapt(job, *words) != 0
        assert f"such as drawn://{lacking}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out/trials").exists()


def test_the_test_set_is_classified_once_and_scores_are_read_once(
    job: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    monkeypatch.setattr("pipeline.runs.few_shot.accuracy", refuse)
    digest_of_scores.cache_clear()  # as in another process
    read = few_shot_ensemble.read_scores
    monkeypatch.setattr(few_shot_ensemble, "read_scores", lambda place: (reads.append(place), read(place))[1])
    keys = [f"drawn://solids/0/{number}" for number in range(32)]
    (tmp_path / "network.parquet").write_bytes(scores_file(keys, SOLIDS, 7 * torch.eye(16).repeat(2, 1)))
    words = ("--ensemble", "network.parquet", "--ensemble-weight", "0.5", "--keep-scores", "--precision", "bf16")
    assert adapt(job, "--methods", "zero_shot", "tip_adapter:search=false", "--shots", "1", *words) == 0
    assert len(results(tmp_path)) == 2 and len(reads) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "vpt", "--shots", "2"), "vpt"),
        (("--methods", "pointclip:views=6", "--shots", "2"), "pointclip:views=6: views: got 6, expected 10"),
        (("--methods", "pointclip", "--ensemble", "missing.parquet"), "ensemble: "),
        (("--methods", "zero_shot", "--ensemble", "x.parquet"), "ensemble_weight: "),
        (("--methods", "pointclip", "--ensemble-weight", "0.5"), "--ensemble-weight: got 0.5"),
        (("--methods", "pointclip", "--ensemble", "x", "--ensemble-weight", "2"), "--ensemble-weight: got 2.0"),
    ],
)
def test_what_is_refused(job: Type, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    assert adapt(job, *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_inter_view_adapter_is_for_clouds(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "clipmill-tiny:untrained", "--data", "drawn_shapes", "--samples", "48", "--shots", "1")
    assert job("adapt", "few-shot", *words, "--methods", "pointclip", *QUICK[:5]) == 2
    assert "another one for drawn_shapes, which has an image each" in " ".join(capsys.readouterr().err.split())
