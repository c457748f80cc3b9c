"""jobs/demo.py: it leaves no process behind, however it ends, and its folder is its own."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.jobs.conftest import JOBS, load_job

JOB = JOBS / "demo.py"


@pytest.fixture(scope="module")
def demo() -> dict:
    return load_job("demo")


class Run:
    """A demo in a sub-process; all that it starts inherits our mark."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, JOB, "smoke", "--folder", str(folder), *arguments],
            env={**os.environ, "TEST_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_servers(self) -> None:
        line = self.process.stdout.readline()
        assert "Ray and MLflow are up" in line, line + self.process.stdout.read()

    def left(self) -> list[psutil.Process]:
        """The demo's processes that are still there."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def end(self) -> None:
        for process in self.left():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def run(tmp_path):
    runs = []

    def start(*arguments: str, folder: Path = tmp_path / "demo") -> Run:
        runs.append(Run(folder, *arguments))
        return runs[-1]

    yield start
    for one in runs:
        one.end()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupt_leaves_no_process(run, name):
    number = getattr(signal, name)
    interrupted = run()
    interrupted.wait_for_servers()
    assert len(interrupted.left()) > 5
    interrupted.process.send_signal(number)
    try:
        code = interrupted.process.wait(timeout=100)
    except subprocess.TimeoutExpired:
        left = [" ".join(process.cmdline())[:100] for process in interrupted.left()]
        interrupted.process.kill()
        pytest.fail(f"still there: {left}; it said {interrupted.process.stdout.read()}")
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    # After SIGKILL nobody waits for the servers: the system tells them, and they take their seconds.
    deadline = time.monotonic() + (30 if number == signal.SIGKILL else 0)
    while (left := interrupted.left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


@pytest.mark.slow
@pytest.mark.alone
def test_a_failing_job_ends_the_demo_with_its_last_words(run, tmp_path):
    """A file is in the place of the shards' folder; the demo shows the error of the refresh job."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / ".demo").touch()
    (folder / "shards").touch()
    failing = run()
    output, _ = failing.process.communicate(timeout=200)
    assert failing.process.returncode == 1, output
    assert "drawing failed" in output and f"{folder}/shards" in output and "drawing.log" in output
    assert not failing.left()


def test_a_folder_with_other_things_is_refused(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    refused = run("--fresh", folder=tmp_path)
    output, _ = refused.process.communicate(timeout=60)
    assert refused.process.returncode == 2 and "Traceback" not in output and str(tmp_path) in output
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_two_demos_in_one_folder_are_refused(demo, tmp_path):
    with demo["_alone_in"](tmp_path, fresh=False):
        with pytest.raises(ValueError, match="no other demo"), demo["_alone_in"](tmp_path, fresh=True):
            pass
    with demo["_alone_in"](tmp_path, fresh=False):
        pass


def test_fresh_empties_the_folder(demo, tmp_path):
    folder = tmp_path / "demo"
    with demo["_alone_in"](folder, fresh=False):
        (folder / "shards").mkdir()
        (folder / "shards" / "00000.tar").touch()
        (folder / "mlflow.db").touch()
    with demo["_alone_in"](folder, fresh=True):
        assert [entry.name for entry in folder.iterdir()] == [".demo"]


def test_free_ports_differ(demo):
    assert len(set(demo["_free_ports"](20))) == 20
