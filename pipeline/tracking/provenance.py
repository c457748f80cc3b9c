"""The provenance of a run: the commit, the command, the machine and the job, as MLflow tags.

``ray job submit --working-dir .`` does not copy ``.git``, so a job often runs in a copy that does not know its commit.
Then the commit comes from ``CLIPMILL_COMMIT`` (submit with ``--runtime-env-json '{"env_vars": {"CLIPMILL_COMMIT":
...}}'``), or from the repository of an editable installation of this package, if its files are the same.
"""

import getpass
import hashlib
import json
import os
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipeline.shards.privacy import masked

ROOT = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "CLIPMILL_COMMIT"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def provenance_tags() -> dict[str, str]:
    """MLflow tags: commit, branch and dirty flag if known; command, user, host, Ray job id, source hash."""
    tags = {
        "mlflow.source.name": _program(),
        "mlflow.source.type": "JOB",
        "mlflow.user": _user(),
        "command": masked(shlex.join([_program(), *sys.argv[1:]])),
        "host": socket.gethostname(),
        "source.sha256": source_digest(ROOT),
        "ray.job_id": _ray_job_id(),
        **_git_tags(),
    }
    return {name: value for name, value in tags.items() if value}


@cache
def source_digest(root: Path) -> str:
    """SHA-256 hex (first 16 digits) of the Python files of ``pipeline/`` and ``jobs/`` below ``root``."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("pipeline/**/*.py"), *root.glob("jobs/*.py")]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git_tags() -> dict[str, str]:
    for root in (ROOT, _editable_root()):
        if root and (root / ".git").exists() and source_digest(root) == source_digest(ROOT):
            commit = _git(root, "rev-parse", "HEAD")
            if commit:
                return {
                    "mlflow.source.git.commit": commit,
                    "mlflow.source.git.branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
                    "mlflow.source.git.repoURL": masked(_git(root, "config", "--get", "remote.origin.url")),
                    "git.dirty": str(bool(_git(root, "status", "--porcelain"))).lower(),
                }
    return {"mlflow.source.git.commit": os.environ.get(COMMIT_VARIABLE, "")}


def _git(root: Path, *command: str) -> str:
    """The output of git in ``root``; empty without git, a repository or an answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _editable_root() -> Path | None:
    try:
        text = distribution("clipmill").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    url = urlparse(json.loads(text or "{}").get("url", ""))
    return Path(unquote(url.path)) if url.scheme == "file" else None


def _program() -> str:
    """The script's path relative to the repository's root: ``jobs/pretrain_clip.py``."""
    path = Path(sys.argv[0] or "python").absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def _ray_job_id() -> str:
    """The submission id of ``ray job submit``."""
    try:
        metadata = json.loads(os.environ.get(RAY_JOB_VARIABLE, "{}")).get("metadata", {})
    except ValueError:
        return ""
    return str(metadata.get("job_submission_id", ""))
