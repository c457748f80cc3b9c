"""The documented `ray job submit` commands, as the pinned Ray hands them to the cluster's shell."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages.ray_session import WORKER_ENVIRONMENT, job_environment

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


def documented() -> list[str]:
    """Every command of operations.md and cluster.yaml with a variable of the cluster."""
    texts = [(ROOT / "docs/operations.md").read_text(), (ROOT / "cluster.yaml").read_text().replace("\n#", "\n")]
    found = [one for text in texts for one in re.findall(r"(ray job submit (?:.*\\\n)*.*)\n", text)]
    return [command for command in found if "$CLIPMILL_BUCKET" in command]


def entrypoint_of(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the ray on the user's machine sends."""
    from click.testing import CliRunner
    from ray.dashboard.modules.job import cli

    sent: dict[str, Any] = {}

    class Client:
        _address = ""

        def submit_job(self, **settings: Any) -> str:
            sent.update(settings)
            return "job"

    monkeypatch.setattr(cli, "_get_sdk_client", lambda *_, **__: Client())
    typed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    words = typed.stdout.split("\0")[3:-1]
    done = CliRunner().invoke(cli.submit, [*words[: words.index("--")], "--no-wait", *words[words.index("--") :]])
    assert sent, done.output
    return str(sent["entrypoint"])


@pytest.mark.parametrize("number", range(2))
def test_a_variable_of_the_cluster_is_expanded_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrypoint = entrypoint_of(documented()[number], monkeypatch)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CLIPMILL_BUCKET": "s3://bucket"}
    shown = subprocess.run(entrypoint, shell=True, env=environment, capture_output=True, text=True, check=True)
    words = shown.stdout.split("|")
    assert words[0] == "jobs/refresh_dataset.py"
    assert words[words.index("--url-list") + 1] == "s3://bucket/list.parquet"
    assert words[words.index("--output-folder") + 1] == "s3://bucket/shards/mine"


def test_the_users_variables_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert job_environment() == {}
    for runtime, found in (({"env_vars": {"A": "1"}}, {"A": "1"}), ({"working_dir": "."}, {}), (None, {})):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime, "metadata": {}}))
        assert job_environment() == found


LOOK = """
import json, os, ray, sys
from pipeline.stages.ray_session import connect
connect()
read = ray.remote(num_cpus=1)(lambda names=sys.argv[2:]: {name: os.environ.get(name) for name in names})
open(sys.argv[1], "w").write(json.dumps(ray.get(read.remote())))
"""


@pytest.mark.slow
@pytest.mark.alone
def test_a_cluster_runs_them(tmp_path: Path) -> None:
    """On a Ray of its own: a variable of the cluster in the command, and one of the user that the job sets, too."""
    import runpy

    gcs, dashboard, client, agent, metrics = runpy.run_path(str(ROOT / "jobs/demo.py"))["_free_ports"](5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "CLIPMILL_BUCKET": str(tmp_path / "bucket"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    (tmp_path / "bucket").mkdir()
    scratch = tempfile.mkdtemp(prefix="clipmill-", dir="/tmp")  # Ray's sockets need a short path
    head = subprocess.Popen(
        [TOOLS / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={scratch}"]
        + [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        + [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--num-gpus=0"]
        + [f"--ray-client-server-port={client}", "--object-store-memory=100000000"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        submit = [TOOLS / "ray", "job", "submit", "--address", address, "--working-dir", str(ROOT)]
        listed = [TOOLS / "ray", "job", "list", "--address", address]
        limit = time.monotonic() + 180
        while subprocess.run(listed, env=environment, capture_output=True).returncode:
            assert time.monotonic() < limit and head.poll() is None
            time.sleep(1)
        (tmp_path / "look.py").write_text(LOOK)
        script = shlex.join([sys.executable, str(tmp_path / "look.py")])
        look = f"{script} $CLIPMILL_BUCKET/seen.json {' '.join(WORKER_ENVIRONMENT)}"
        variables = ["--runtime-env-json", json.dumps({"env_vars": {"OMP_NUM_THREADS": "2"}})]
        done = subprocess.run(
            [*submit, *variables, "--", "bash", "-c", look],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        seen = json.loads((tmp_path / "bucket/seen.json").read_text())
        assert seen == {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "2"}
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)
