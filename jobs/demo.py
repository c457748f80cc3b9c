#!/usr/bin/env python
"""The whole pipeline on this machine: draw a data set, train a CLIP, evaluate it, compare it in MLflow.

    python jobs/demo.py demo

Starts its own Ray head and MLflow server on loopback, submits the jobs with `ray job submit` as for a cluster, and
prints a table. It stops what it started, also on Ctrl-C, on errors and when it is killed. The same command resumes,
without repeating finished parts. `make demo` does the same.
"""

import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.config import require, run_job
from pipeline.errors import ClipmillError

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
CORES = os.cpu_count() or 1
# On few cores two processes of one thread each are faster than one process of two threads, above all if other programs
# use the cores: threads wait for each other hundreds of times per step, processes once.
WORKERS = 1 if CORES == 1 else 2 if CORES < 8 else 4
# All processes of the demo have this in their environment, so that the last sweep finds them.
MARK = "CLIPMILL_DEMO"
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "OMP_NUM_THREADS": "1",
    # Ray listens on all of the machine's addresses: without a token, anyone on the network could run code here.
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# The metrics of the table, of sets in datasets/.
SETS = ("drawn_shapes", "drawn_colours", "drawn_textures", "drawn_fine_grained", "drawn_unseen_style")
PAIRS = "drawn_val"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Size and folder of the demo."""

    folder: str = "runs/demo"
    """Folder of data, checkpoints, runs and logs."""
    fresh: bool = False
    """Delete an earlier demo in the folder first."""
    samples: int = 20000
    """Number of images to draw, 64 or more."""
    training: str = "demo"
    """Preset of jobs/pretrain_clip.py."""
    evaluation_samples: int = 500
    """Number of images of each evaluation set."""

    def __post_init__(self) -> None:
        require(self.samples >= 64, "samples", self.samples, "64 or more")


PRESETS = {
    "demo": ("A few minutes on two cores.", Demo()),
    "smoke": (
        "The same with little data: about a minute.",
        Demo(
            folder=f"{tempfile.gettempdir()}/clipmill-smoke/demo", samples=64, training="smoke", evaluation_samples=48
        ),
    ),
}


class StepFailed(ClipmillError):
    """A program of the demo failed."""


class Programs:
    """The programs of the demo: in their own process groups, logged to files, stopped together."""

    def __init__(self, logs: Path, interrupt: "Interrupt") -> None:
        self._logs, self._interrupt = logs, interrupt
        self._mark = uuid.uuid4().hex
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._token = secrets.token_hex(16)
        self._environment = {**os.environ, **ENVIRONMENT, MARK: self._mark, "RAY_AUTH_TOKEN": self._token}
        for name in ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            self._environment.pop(name, None)
        self._environment["PATH"] = f"{TOOLS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        # Loopback must not use a proxy.
        self._environment["no_proxy"] = self._environment["NO_PROXY"] = "127.0.0.1,localhost"

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Start ``command`` in the background; its output goes to ``logs/name.log``."""
        with open(self._logs / f"{name}.log", "wb") as log:
            self._programs[name] = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait_until_up(self, name: str, url: str, seconds: float = 120) -> None:
        """Wait until the server ``name`` answers at ``url``."""
        deadline = time.monotonic() + seconds
        while not _answers(url, self._token):
            self._interrupt.check()
            if self._programs[name].poll() is not None or time.monotonic() > deadline:
                raise StepFailed(f"{name} did not come up\n{self._last_lines(name)}")
            time.sleep(0.2)

    def wait_until_done(self, name: str) -> str:
        """Wait for the end of the program ``name``, printing its last log line at intervals; returns its output."""
        program = self._programs[name]
        with open(self._logs / f"{name}.log", encoding="utf-8", errors="replace") as log:
            shown = time.monotonic()
            while program.poll() is None:
                time.sleep(0.2)
                self._interrupt.check()
                if time.monotonic() - shown > 5 and (news := _progress(log)):
                    print(f"      {news}", flush=True)
                    shown = time.monotonic()
        if program.returncode:
            raise StepFailed(f"{name} failed with exit code {program.returncode}\n{self._last_lines(name)}")
        return (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Stop everything: first the started programs, with a signal, then every process with our mark."""
        for program in self._programs.values():
            if program.poll() is None:
                program.terminate()
        # One deadline for all of them, because on a busy machine each would use its whole time.
        deadline = time.monotonic() + 15
        for program in self._programs.values():
            try:
                program.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        left = self._marked()
        for process in left:
            _quietly(process.terminate)
        _, stubborn = psutil.wait_procs(left, timeout=3)
        for process in stubborn:
            _quietly(process.kill)

    def _marked(self) -> list[psutil.Process]:
        """Every process with our mark; this one lacks it in its own environment."""
        return [process for process in psutil.process_iter() if _environment_of(process).get(MARK) == self._mark]

    def _last_lines(self, name: str, count: int = 25) -> str:
        path = self._logs / f"{name}.log"
        # After this line `ray job submit` repeats everything.
        once = path.read_text(encoding="utf-8", errors="replace").partition("Status message: ")[0]
        lines = [line for line in once.splitlines() if not re.search(r"(INFO|ERR) (cli|sdk|job_manager)\.py", line)]
        return "\n".join(["", *(f"    {line}" for line in lines[-count:]), "", f"all of it: {path}"])


def main(run: Demo) -> None:
    """Start servers, run three jobs, print one table, stop servers."""
    folder = Path(run.folder).expanduser().absolute()
    began = time.monotonic()
    with ExitStack() as stack:
        interrupt = stack.enter_context(_signals_end_the_demo())
        stack.enter_context(_alone_in(folder, run.fresh))
        programs = Programs(_made(folder / "logs"), interrupt)
        stack.callback(_with_signals_ignored, programs.stop)
        ray, mlflow = _start_servers(stack, programs, folder)
        results = _run_jobs(run, programs, folder, ray, mlflow)
        print(_table(results), flush=True)
    print(_what_next(folder, time.monotonic() - began), flush=True)


def _run_jobs(run: Demo, programs: Programs, folder: Path, ray: str, mlflow: str) -> dict[str, Any]:
    """Draw, train, evaluate the trained model and an untrained one; returns the numbers of the table."""
    submit = [TOOLS / "ray", "job", "submit", "--address", ray, "--working-dir", ".", "--"]
    shards, clip = folder / "shards", folder / "clip"

    began = time.monotonic()
    drawing = ["python", "jobs/refresh_dataset.py", "drawn", "--samples", str(run.samples)]
    drawing += ["--number-sample-per-shard", "1000", "--processes-count", str(CORES), "--output-folder", shards]
    programs.start("drawing", [*submit, *drawing])
    drawn = programs.wait_until_done("drawing")
    _say("2/4", f"{run.samples} images drawn by Ray into {shards}", began)

    began = time.monotonic()
    training = ["jobs/pretrain_clip.py", run.training, "--data", shards, "--output-folder", clip]
    training += ["--workers", str(WORKERS), "--loader-workers", "1"]
    training += ["--cpus-per-worker", str(min(max(CORES // WORKERS, 1), 4))]
    training += ["--tracking-uri", mlflow]
    programs.start("training", [*submit, *training])
    programs.wait_until_done("training")
    _say("3/4", f"CLIP trained by Ray Train into {clip}", began)

    began = time.monotonic()
    record = json.loads((clip / "run.json").read_text())
    run_id, architecture = record["tracking_run"], record["settings"]["architecture"]
    trained, untrained = folder / "logs" / "trained.json", folder / "logs" / "untrained.json"
    evaluate = [*submit, "python", "jobs/evaluate.py", "sets", "--zero-shot", *SETS, "--retrieval", PAIRS]
    evaluate += ["--evaluation-samples", str(run.evaluation_samples)]
    own_run = ["--run-id", run_id, "--tracking-uri", mlflow]
    programs.start("evaluation", [*evaluate, "--output", trained, "--checkpoint", clip, *own_run])
    programs.start("untrained", [*evaluate, "--output", untrained, "--checkpoint", f"{architecture}:untrained"])
    programs.wait_until_done("evaluation")
    programs.wait_until_done("untrained")
    _say("4/4", f"evaluated, and an untrained {architecture} beside it", began)
    return {
        "trained": json.loads(trained.read_text())["metrics"],
        "untrained": json.loads(untrained.read_text())["metrics"],
        "drawing": _last_rate(drawn),
        "training": _median_metric(mlflow, run_id, "perf/samples_per_second"),
    }


def _start_servers(stack: ExitStack, programs: Programs, folder: Path) -> tuple[str, str]:
    """A Ray head and an MLflow server; returns their addresses."""
    # Sockets are created below Ray's folder, and their paths must be short.
    scratch = Path(tempfile.mkdtemp(prefix="clipmill-", dir="/tmp"))
    stack.callback(shutil.rmtree, scratch, ignore_errors=True)
    gcs, dashboard, client, agent, metrics, tracking = _free_ports(6)
    began = time.monotonic()
    mlflow_url, ray_url = f"http://127.0.0.1:{tracking}", f"http://127.0.0.1:{dashboard}"
    database = f"sqlite:///{folder}/mlflow.db"
    programs.start(
        "mlflow",
        [TOOLS / "mlflow", "server", "--backend-store-uri", database, "--artifacts-destination", folder / "artifacts"]
        + ["--host", "127.0.0.1", "--port", str(tracking), "--workers", "1"],
    )
    programs.start(
        "ray",
        [TOOLS / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={scratch}"]
        + [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        + [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        + [f"--ray-client-server-port={client}", f"--num-cpus={CORES + 2}", "--num-gpus=0"]
        + ["--object-store-memory=268435456", '--resources={"data_worker": 4, "train_worker": 4}'],
    )
    programs.wait_until_up("ray", f"{ray_url}/api/jobs/")
    programs.wait_until_up("mlflow", f"{mlflow_url}/health")
    _say("1/4", f"Ray and MLflow are up; to look on: {mlflow_url}", began)
    return ray_url, mlflow_url


def _last_rate(log: str) -> float | None:
    """Samples per second in the refresh job's last report; None if all shards existed already."""
    rates = [float(rate) for rate in re.findall(r"rows, (\d+) samples/s", log)]
    return rates[-1] if rates and rates[-1] > 0 else None


def _median_metric(mlflow: str, run_id: str, name: str) -> float | None:
    """The median of a run's metric over its steps, from the MLflow server."""
    url = f"{mlflow}/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key={name}"
    with _loopback().open(url, timeout=30) as reply:
        history = json.load(reply).get("metrics", [])
    return statistics.median(float(point["value"]) for point in history) if history else None


def _table(results: dict[str, Any]) -> str:
    """The evaluations of the trained and the untrained model, and the throughput."""
    trained, untrained = results["trained"], results["untrained"]
    titles = {"top1": "zero-shot top-1", "i2t_r1": "image to text R@1", "t2i_r1": "text to image R@1"}
    lines = ["", f"{'':40}{'trained':>9}{'untrained':>11}{'chance':>8}{'gain':>14}"]
    for name, value in trained.items():
        kind, data, metric = name.split("/")
        if metric in titles:
            before, chance = untrained[name], trained[f"{kind}/{data}/chance"]
            gain = f"{100 * (value - before):+.1f} points"
            lines.append(f"{titles[metric] + ', ' + data:40}{value:>9.1%}{before:>11.1%}{chance:>8.1%}{gain:>14}")
    lines.append("")
    for title, rate in (("drawing and sharding", results["drawing"]), ("training", results["training"])):
        lines.append(f"{title:40}" + (f"{rate:,.0f} samples/s" if rate else "done by an earlier demo"))
    return "\n".join(lines)


def _what_next(folder: Path, seconds: float) -> str:
    shown = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
    ui = "make ui" if folder == ROOT / Demo.folder else f"make ui FOLDER={shown}"
    return f"""
Done in {seconds:.0f} s, and everything is stopped again. To look at the runs and compare them, in another terminal:
    {ui}     then open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning
Next, while that is open, train longer and watch the two runs side by side:
    .venv/bin/python jobs/pretrain_clip.py demo --workers 0 --epochs 20 --data {shown}/shards \\
        --output-folder {shown}/clip-longer --zero-shot {SETS[0]} --retrieval {PAIRS} \\
        --tracking-uri http://127.0.0.1:5000"""


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with _loopback().open(request, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _loopback() -> urllib.request.OpenerDirector:
    """Opens URLs without a proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; held open together, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _progress(log: IO[str]) -> str:
    """The last message that our own code has logged since the last call, without time, module and worker."""
    plain = re.sub(r"\x1b\[\d+m", "", log.read())
    ours = r"^(?:\(\w+ pid=[^)]+\) )?\S+ \S+ (?:INFO|WARNING) pipeline\.[\w.]+: (.+)$"
    lines = re.findall(ours, plain, flags=re.MULTILINE)
    return lines[-1][:110] if lines else ""


def _say(step: str, what: str, began: float) -> None:
    print(f"{step}  {what} ({time.monotonic() - began:.0f} s)", flush=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone_in(folder: Path, fresh: bool) -> Iterator[None]:
    """Lock the demo's folder; a second demo in it would overwrite the first."""
    mark = _made(folder) / ".demo"
    require(
        mark.exists() or not any(folder.iterdir()),
        "folder",
        str(folder),
        "an empty or missing folder, or one of an earlier demo",
    )
    with open(mark, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, "folder", str(folder), "a folder that no other demo is running in")
        if fresh:
            for entry in folder.iterdir():
                if entry != mark:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield


class Interrupt:
    """The received signal, if any: stored by the handler, processed where the demo waits.

    An exception raised in the handler would be lost where Python cannot propagate it, such as in a finaliser.
    """

    def __init__(self) -> None:
        self._number = 0

    def note(self, number: int, _frame: object) -> None:
        """The handler."""
        self._number = number

    def check(self) -> None:
        """Exit the program if a signal came; everything is stopped on exit."""
        if self._number:
            name = signal.Signals(self._number).name
            print(f"\nstopping, on {name}; the same command goes on from here", flush=True)
            raise SystemExit(128 + self._number)


@contextmanager
def _signals_end_the_demo() -> Iterator[Interrupt]:
    """Let INT, TERM and HUP end the demo at its next wait, at most a few seconds later."""
    interrupt = Interrupt()
    before = {
        number: signal.signal(number, interrupt.note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_signals_ignored(stop: Any) -> None:
    """Ignore signals while stopping, which takes a few seconds: a second Ctrl-C must not leave programs running."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stop()


def _end_with_parent() -> None:
    """In the child: get TERM when the demo is killed by KILL, which no handler sees. Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}


def _quietly(action: Any) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        pass


if __name__ == "__main__":
    run_job(PRESETS, main)
