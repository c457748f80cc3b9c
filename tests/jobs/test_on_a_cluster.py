"""The jobs on a cluster of several nodes that has the resource names of cluster.yaml."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runs.drawn_data import drawn_snapshot
from pipeline.shards.snapshot import read_snapshot
from pipeline.shards.storage import Folder
from pipeline.shards.tar import TarShard
from tests.jobs.conftest import JOBS

ROOT = JOBS.parent

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# A source whose captions say on which node they were read.
WHERE = """
import os, sys, time
from dataclasses import dataclass
from typing import ClassVar
import cv2, numpy
from pipeline.shards.storage import Folder
from pipeline.sources.source import Part, Row, Slice
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.shard_tasks import Workers

@dataclass(frozen=True, kw_only=True)
class Where:
    kind: ClassVar[str] = "where"
    has_captions: ClassVar[bool] = True
    def slices(self, rows_per_shard, scratch):
        for number in range(12):
            yield Slice(count=1, digest=f"{number:064d}", where={"number": number})
    def rows(self, piece):
        time.sleep(0.3)
        image = cv2.imencode(".jpg", numpy.zeros((64, 64, 3), numpy.uint8))[1].tobytes()
        yield Row(url="", caption=os.environ["TEST_NODE"], parts=(Part("image", image),))
    def schema(self):
        return {}

refresh(Where(), Folder(sys.argv[1]), ShardOptions(number_sample_per_shard=1), Workers())
"""


def test_data_work_goes_to_data_nodes_alone(nodes, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WHERE, str(tmp_path)],
        env=nodes.environment,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert read_snapshot(str(tmp_path)).samples == 12
    assert captions_in(tmp_path) == {b"data"}


def test_a_data_node_that_dies_costs_nothing(nodes, tmp_path):
    """Of two data nodes one is killed in the middle; all shards are there, the rest of them from the other node."""
    doomed = nodes.add("doomed", "data_worker")
    job = subprocess.Popen(
        [sys.executable, "-c", WHERE.replace("sleep(0.3)", "sleep(1)"), str(tmp_path)],
        env=nodes.environment,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        wait_for(lambda: b"doomed" in captions_in(tmp_path), seconds=240)
        nodes.cluster.remove_node(doomed, allow_graceful=False)
        _, errors = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, errors
    assert read_snapshot(str(tmp_path)).samples == 12
    assert captions_in(tmp_path) == {b"data", b"doomed"}
    assert not list(tmp_path.rglob("*.tmp*"))


def test_the_jobs_run_on_the_cluster(nodes, tmp_path, own_store):
    """Refresh, then train with a worker on each training node."""
    shards, run = f"{tmp_path}/shards", f"{tmp_path}/run"
    drawing = ["smoke", "--output-folder", shards, "--processes-count", "2", "--number-sample-per-shard", "32"]
    assert "snapshot" in job(nodes, "refresh_dataset.py", *drawing)
    training = ["smoke", "--data", shards, "--output-folder", run, "--workers", "2", "--tracking-uri", own_store]
    assert "2 processes" in job(nodes, "pretrain_clip.py", *training)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "meta.json").is_file()


def test_training_follows_the_nodes_that_there_are(nodes, tmp_path, own_store):
    """A node of three is lost, another one comes, then the cluster ends; another cluster ends the run, in one run."""
    from mlflow import MlflowClient

    shards, run = f"{tmp_path}/shards", tmp_path / "run"
    drawn_snapshot(Folder(shards))
    words = ["smoke", "--data", shards, "--output-folder", str(run), "--tracking-uri", own_store, "--steps", "300"]
    words += ["--checkpoint-every-steps", "10", "--resize-seconds", "5", "--no-system-metrics"]
    doomed = nodes.add("doomed", "train_worker")
    log = tmp_path / "log"
    with log.open("w") as output:
        training = subprocess.Popen(
            [sys.executable, JOBS / "pretrain_clip.py", *words, "--workers", "1:3", "--cpus-per-worker", "2"],
            env=nodes.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def groups() -> list[str]:
        return re.findall(r"Started training worker group of size (\d)", log.read_text())

    def steps() -> list[int]:
        return [int(mark.parent.name.removeprefix("step-")) for mark in run.rglob("meta.json")]

    try:
        # A slow machine may begin with fewer workers, and a slow node may be taken for one that comes later.
        wait_for(lambda: groups()[-1:] == ["3"] and len(steps()) > 0, seconds=240, log=log)
        nodes.cluster.remove_node(doomed, allow_graceful=False)
        before = max(steps())
        wait_for(lambda: groups()[-1:] == ["2"] and max(steps()) > before, seconds=240, log=log)
        nodes.add("late", "train_worker")
        wait_for(lambda: groups()[-2:] == ["2", "3"], seconds=240, log=log)
        before = max(steps())
        wait_for(lambda: max(steps()) > before, seconds=240, log=log)
    finally:
        training.kill()
        training.wait()
    assert "2 of 3 workers train" in log.read_text()
    before = max(steps())
    assert before < 300
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    last = [sys.executable, JOBS / "pretrain_clip.py", *words, "--workers", "1"]
    ended = subprocess.run(last, env=alone, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    client = MlflowClient(own_store)
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.info.status == "FINISHED" and max(steps()) == 300
    logged = [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")]
    # What a killed process had not sent yet is missing from the curve, not from the training.
    assert len(set(logged)) > 250 and set(range(before + 1, 301)) <= set(logged)
    assert f"steps {before + 1} to 300" in ended.stderr


def test_a_node_with_notice_is_left_with_a_checkpoint(nodes, tmp_path, own_store):
    """No checkpoint is due before the end; one is written when a node is drained, and the run goes on from it."""
    shards, run = f"{tmp_path}/shards", tmp_path / "run"
    drawn_snapshot(Folder(shards))
    words = ["smoke", "--data", shards, "--output-folder", str(run), "--tracking-uri", own_store, "--steps", "2000"]
    words += ["--checkpoint-every-minutes", "600", "--log-every-steps", "20", "--no-system-metrics"]
    spot = nodes.add("spot", "spot")
    log = tmp_path / "log"
    with log.open("w") as output:
        training = subprocess.Popen(
            [sys.executable, JOBS / "pretrain_clip.py", *words, "--workers", "1", "--train-resource", "spot"],
            env=nodes.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: "step 20 of 2000" in log.read_text(), seconds=240, log=log)
        assert not list(run.rglob("meta.json"))
        # The notice first, then the end, as a cloud has it; Ray itself only passes the notice on.
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id", spot.node_id]
        drain = [Path(sys.executable).parent / "ray", "drain-node", "--address", nodes.cluster.address, *notice]
        subprocess.run([*drain, "--deadline-remaining-seconds", "600"], check=True, timeout=60, capture_output=True)
        wait_for(lambda: list(run.rglob("meta.json")), seconds=60, log=log)
        nodes.add("other-spot", "spot")
        nodes.cluster.remove_node(spot, allow_graceful=False)
        (saved,) = (int(mark.parent.name.removeprefix("step-")) for mark in run.rglob("meta.json"))
        wait_for(lambda: f"steps {saved + 1} to 2000" in log.read_text(), seconds=240, log=log)
    finally:
        training.kill()
        training.wait()
    assert "is about to be removed: writing a checkpoint now" in log.read_text()


def captions_in(folder: Path) -> set[bytes]:
    """The captions of the finished shards."""
    return {TarShard(path.parent / f"{path.name[:5]}.tar")[0].fields["txt"] for path in folder.glob("*_stats.json")}


def wait_for(condition: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
    """Wait until ``condition`` holds; a failure shows the end of ``log``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-5000:] if log else "it did not happen in time"
        time.sleep(0.1)


def job(nodes, name: str, *arguments: str) -> str:
    """Run a job on the cluster; its output."""
    done = subprocess.run(
        [sys.executable, JOBS / name, *arguments],
        env=nodes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
