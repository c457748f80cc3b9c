"""The schedule job as users type it; once with a Ray of its own and its job server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.jobs.conftest import Type

# Fires this very minute, whenever that is, and after a restart within a day.
TIMETABLE = """
jobs:
  - name: refresh-test
    cron: "{minute} {hour} * * *"
    command: >-
      python -c "import os; print('snapshot s3://bucket/set@00007-0123456789ab: made by', os.environ['WHO'])"
    working_dir: {folder}
    misfire_grace_minutes: 60
    environment_from: [WHO]
"""


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The address of a Ray head with a dashboard, on loopback, with this session's token."""
    # Sockets lie below this folder and their paths have to be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    sockets = [socket.socket() for _ in range(5)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    gcs, dashboard, client, agent, metrics = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", f"--port={gcs}"]
    words += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    words += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", "--num-cpus=1", "--num-gpus=0"]
    words += ["--object-store-memory=104857600"]
    environment = {**os.environ, "WHO": "nobody"}
    log = open(f"{folder}/head.log", "wb")
    head = subprocess.Popen([Path(sys.executable).parent / "ray", *words], env=environment, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{dashboard}"
    head.terminate()
    head.wait(30)
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_smoke_shows_coming_fires(job: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert job("schedule", "smoke") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("refresh-drawn") and "Sun" in line for line in lines)


@pytest.mark.slow
@pytest.mark.alone
def test_a_fire_is_submitted_to_ray_once(
    job: Type, job_server: str, tmp_path: Path, own_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHO", "me")
    now = datetime.now(UTC)
    code = tmp_path / "code"
    code.mkdir()
    (code / "empty.py").touch()
    (tmp_path / "times.yaml").write_text(TIMETABLE.format(minute=now.minute, hour=now.hour, folder=code))
    words = ["run", "times.yaml", "--once", "--address", job_server, "--tracking-uri", own_store]
    wait_for(lambda: job("schedule", *words) == 0)
    client = MlflowClient(own_store)
    experiment = client.get_experiment_by_name("clipmill-schedule")
    assert experiment is not None

    def ended() -> bool:
        assert job("schedule", *words) == 0
        (run,) = client.search_runs([experiment.experiment_id])
        return run.info.status not in ("RUNNING", "SCHEDULED")

    wait_for(ended)
    (run,) = client.search_runs([experiment.experiment_id])
    tags = run.data.tags
    assert run.info.status == "FINISHED", tags
    assert tags["schedule.submission_id"] == f"refresh-test-{now:%Y%m%dT%H%MZ}" == run.info.run_name
    assert tags["schedule.snapshot"] == "s3://bucket/set@00007-0123456789ab"
    assert tags["schedule.exit_code"] == "0" and run.data.metrics["schedule/duration_seconds"] > 0
    # A new history, as after a loss of MLflow's disk: Ray's own list stops a second submission.
    other = f"sqlite:///{tmp_path}/other.db"
    assert job("schedule", *words[:-1], other) == 0
    from ray.job_submission import JobSubmissionClient

    (submitted,) = (one for one in JobSubmissionClient(job_server).list_jobs() if one.submission_id)
    assert submitted.metadata is not None and submitted.metadata["clipmill.schedule"] == "refresh-test"
    assert "me" in json.dumps(submitted.runtime_env)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "missing.yaml"], "missing.yaml"),
        (["show", "wrong.yaml"], "colour"),
        (["run", ""], "file"),
        (["run", "right.yaml", "--poll-seconds", "0"], "--poll-seconds: got 0"),
        (["run", "right.yaml", "--once", "--address", "http://127.0.0.1:9"], "a Ray job server that answers"),
    ],
)
def test_wrong_options_are_one_sentence(
    words: list[str], sentence: str, job: Type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = "jobs: [{name: a, cron: '0 3 * * *', command: x"
    (tmp_path / "right.yaml").write_text(right + "}]")
    (tmp_path / "wrong.yaml").write_text(right + ", colour: red}]")
    assert job("schedule", *words) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in " ".join(error.replace("│", " ").split()) and "Traceback" not in error
