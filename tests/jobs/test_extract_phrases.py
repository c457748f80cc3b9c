"""The job of phrases as its users start it, and the other data jobs on its sidecar."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.shards.snapshot import read_snapshot
from tests.jobs.conftest import Type


def test_smoke_says_what_it_found_and_logs_it(job: Type, own_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("extract_phrases", "smoke", "--data", "drawn", "--track", "--tracking-uri", own_store)
    assert job(*words) == 0
    said = capsys.readouterr().out
    assert "of 64 captions" in said and "most common nouns: " in said
    snapshot = read_snapshot("drawn")
    assert all("phrases" in shard.sidecars for shard in snapshot.shards)
    client = MlflowClient(own_store)
    (run,) = client.search_runs([client.get_experiment_by_name("clipmill-data").experiment_id])
    assert 1 < run.data.metrics["phrases/phrases_per_caption"] < 10 and run.data.metrics["phrases/samples"] == 64
    assert len(client.get_metric_history(run.info.run_id, "phrases/shard_phrases_per_caption")) == 4
    assert [file.path for file in client.list_artifacts(run.info.run_id, "phrases")] == ["phrases/nouns.txt"]
    assert job(*words) == 0 and read_snapshot("drawn") == snapshot


@pytest.mark.slow
def test_verify_filter_and_report_work_with_the_sidecar(
    job: Type, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("extract_phrases", "smoke", "--data", "drawn") == 0
    assert job("verify_dataset", "snapshot", "drawn") == 0
    assert job("filter_dataset", "custom", "--data", "drawn", "--steps", "length", "--min-words", "6") == 0
    assert 0 < read_snapshot("drawn").samples < 64
    assert all("phrases" in shard.sidecars for shard in read_snapshot("drawn").shards)
    assert job("report_dataset", "snapshot", "--data", "drawn", "--output", "report.html", "--no-track") == 0
    assert "phrases" in Path("report.html").read_text(encoding="utf-8")
    shutil.copytree("drawn", "elsewhere", ignore=shutil.ignore_patterns("_*", "*.parquet", "*.json"))
    assert job("adopt_dataset", "folder", "elsewhere") == 0
    assert job("extract_phrases", "snapshot", "--data", "elsewhere", "--processes-count", "0", "--no-track") == 0
    assert job("adopt_dataset", "folder", "elsewhere") == 0
    assert all("phrases" in shard.sidecars for shard in read_snapshot("elsewhere").shards)
    file = next(Path("drawn").glob("*.phrases.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert job("verify_dataset", "snapshot", "drawn") == 1
    assert file.name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extractor", "rule"], "--extractor: got 'rule', expected one of nltk, rules, spacy (did you mean rules?)"),
        (["--name", "a/b"], "--name: got 'a/b'"),
        (["--caption", "jpg"], "--caption: got 'jpg', expected txt, json:KEY"),
        (["--data", ""], "--data: nothing given"),
    ],
)
def test_wrong_settings_are_one_sentence(
    words: list[str], said: str, job: Type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("extract_phrases", "smoke", *words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("drawn").exists()
