"""Tags against git itself in a repository made here, and against the environment of a Ray job."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking import provenance


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "a.py").write_text("A = 1\n")
    git(tmp_path, "init", "-q", "-b", "trunk")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@example.org/x.git")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.source_digest.cache_clear()
    return tmp_path


def test_commit_branch_and_dirt_are_gits(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(repository / "jobs" / "x.py"), "demo", "--store.password", "hunter2"])
    tags = provenance.provenance_tags()
    assert tags["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD")
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.repoURL"] == "https://***@example.org/x.git"
    assert tags["mlflow.source.name"] == "jobs/x.py"
    assert tags["git.dirty"] == "false"
    assert "hunter2" not in str(tags)
    (repository / "pipeline" / "a.py").write_text("A = 2\n")
    assert provenance.provenance_tags()["git.dirty"] == "true"


def test_a_copy_without_git_finds_its_commit(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path_factory.mktemp("copy")
    (copy / "pipeline").mkdir()
    (copy / "pipeline" / "a.py").write_text("A = 1\n")
    monkeypatch.setattr(provenance, "ROOT", copy)
    monkeypatch.setattr(provenance, "_editable_root", lambda: repository)
    assert provenance.provenance_tags()["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD")


def test_a_copy_of_other_code_does_not_claim_a_commit(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path_factory.mktemp("other")
    (copy / "pipeline").mkdir()
    (copy / "pipeline" / "a.py").write_text("A = 3\n")
    monkeypatch.setattr(provenance, "ROOT", copy)
    monkeypatch.setattr(provenance, "_editable_root", lambda: repository)
    monkeypatch.delenv("CLIPMILL_COMMIT", raising=False)
    assert "mlflow.source.git.commit" not in provenance.provenance_tags()
    monkeypatch.setenv("CLIPMILL_COMMIT", "abc")
    assert provenance.provenance_tags()["mlflow.source.git.commit"] == "abc"


def test_the_ray_job_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert provenance.provenance_tags()["ray.job_id"] == "raysubmit_1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "not json")
    assert "ray.job_id" not in provenance.provenance_tags()
