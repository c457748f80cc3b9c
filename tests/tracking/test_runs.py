"""Runs as MLflow's own client reads them back from a sqlite store."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from pipeline.config import from_json, run_job
from pipeline.errors import SettingError
from pipeline.shards.snapshot import Shard, Snapshot
from pipeline.tracking.runs import MlflowTracker, NoTracker, RunHandle, Tracking, attach, start
from pipeline.tracking.store import create_sqlite


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class Job:
    data: str = "s3://bucket/data@00001-abc"
    steps: int = 10
    resume: str | None = None
    hub_token: str = "hunter2"
    optimizer: Optimizer = field(default_factory=Optimizer)
    tracking: Tracking = field(default_factory=Tracking)


SNAPSHOT = Snapshot(
    id="00001-abc",
    digest="0123456789abcdef" * 4,
    created="2026-01-01T00:00:00+00:00",
    parent=None,
    folder="/data/drawn",
    shards=(Shard(name="00000", samples=7, bytes=1, sha256="0"),),
    fields=("jpg", "txt"),
    card="drawn",
    options={},
    rows=9,
    dropped={"x": 2},
)


@pytest.fixture
def settings(store: str, request: pytest.FixtureRequest) -> Tracking:
    return Tracking(tracking_uri=store, experiment=request.node.name, run_name="first", system_metrics=False)


def begin(settings: Tracking, run_id: str = "", **changes: object) -> MlflowTracker:
    return start(settings, replace(Job(tracking=settings), **changes), run_id)  # type: ignore[arg-type]


def test_a_run_records_what_it_is_made_from(settings: Tracking, store: str) -> None:
    with begin(settings) as tracker:
        tracker.log_dataset(SNAPSHOT)
        tracker.log_dataset(SNAPSHOT)
        tracker.log({"train/loss": 2.5, "train/lr": 1e-3}, 1)
        tracker.log({"train/loss": 2.0}, 2)
        tracker.set_tags({"note": "http://u:hunter2@host"})
    run = MlflowClient(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.98]"
    assert run.data.params["resume"] == "None"
    assert run.data.params["hub_token"] == "***"
    assert not [name for name in run.data.params if name.startswith("tracking.")]
    assert run.data.metrics == {"train/loss": 2.0, "train/lr": 1e-3}
    assert run.data.tags["note"] == "http://***@host"
    assert run.data.tags["training.digest"] == SNAPSHOT.digest
    assert run.data.tags["host"] == socket.gethostname()
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("drawn", SNAPSHOT.digest[:36])
    assert json.loads(given.dataset.profile) == {"samples": 7, "shards": 1, "rows": 9}
    assert "/data/drawn@00001-abc" in given.dataset.source
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_the_experiment_says_what_matters(settings: Tracking, store: str) -> None:
    begin(settings).finish()
    experiment = MlflowClient(store).get_experiment_by_name(settings.experiment)
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "zeroshot/drawn_shapes/top1"
    assert experiment.tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "True"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.artifact_location.startswith("file:///")


def test_the_config_artifact_runs_again(settings: Tracking, store: str) -> None:
    job = Job(tracking=settings, hub_token="", steps=77, optimizer=Optimizer(lr=5e-4))
    with start(settings, job) as tracker:
        pass
    artifact = MlflowClient(store).get_run(tracker.run_id).info.artifact_uri + "/config.json"
    assert from_json(Job, load_text(artifact)) == job
    with begin(settings) as secret:
        pass
    text = load_text(MlflowClient(store).get_run(secret.run_id).info.artifact_uri + "/config.json")
    assert "hunter2" not in text and '"hub_token": "***"' in text


def test_many_and_long_params_are_all_logged(settings: Tracking, store: str) -> None:
    job = {"many": dict.fromkeys(map(str, range(4000)), 1)}
    wide = replace_many_fields(250)
    with start(settings, wide) as tracker:
        pass
    assert len(MlflowClient(store).get_run(tracker.run_id).data.params) == 250

    @dataclass(frozen=True)
    class Long:
        names: dict[str, int]

    with start(settings, Long(job["many"])) as tracker:
        pass
    assert len(MlflowClient(store).get_run(tracker.run_id).data.params["names"]) == 6000


def replace_many_fields(count: int) -> object:
    from dataclasses import make_dataclass

    return make_dataclass("Wide", [(f"f{number}", int, number) for number in range(count)], frozen=True)()


def test_a_resumed_run_goes_on_as_itself(settings: Tracking, store: str, caplog: pytest.LogCaptureFixture) -> None:
    first = begin(settings)
    first.log({"train/loss": 3.0}, 1)
    first.finish("KILLED")
    client = MlflowClient(store)
    assert client.get_run(first.run_id).info.status == "KILLED"
    second = begin(replace(settings, run_name="other"), first.run_id, steps=20)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log({"train/loss": 2.0}, 2)
    second.finish()
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert [point.step for point in client.get_metric_history(first.run_id, "train/loss")] == [1, 2]
    assert run.data.params["steps"] == "10"
    assert json.loads(run.data.tags["changed_on_resume"])["steps"] == "10 -> 20"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_run_whose_id_was_not_stored_is_found_by_its_token(settings: Tracking, store: str) -> None:
    """Another token is another run, and so is no token; a stored id counts more than a token."""
    job = Job(tracking=settings)
    first = start(settings, job, token="a" * 32)  # its driver is killed now
    again = start(settings, job, token="a" * 32)
    assert again.run_id == first.run_id
    others = [start(settings, job, token="b" * 32), start(settings, job), start(settings, job)]
    known = start(settings, job, others[1].run_id, token="a" * 32)
    assert known.run_id == others[1].run_id
    for tracker in (again, *others):
        tracker.finish()
    runs = MlflowClient(store).search_runs([MlflowClient(store).get_run(first.run_id).info.experiment_id])
    assert sorted(run.info.run_id for run in runs) == sorted({first.run_id, *(one.run_id for one in others)})


def test_steps_that_are_repeated_are_logged_once(settings: Tracking, store: str) -> None:
    """Of each metric by itself: what the killed job had not sent is logged. Without ``once`` every step is."""
    first = start(settings, Job(tracking=settings), once=True)
    for step in range(1, 8):
        first.log({"train/loss": 1 / step, **({"train/lr": 0.1} if step < 6 else {})}, step)
    first.log({"system/cpu": 1.0}, 3)
    assert first.flush()
    second = pickle.loads(pickle.dumps(start(settings, Job(tracking=settings), first.run_id, once=True)))
    for step in range(4, 11):
        second.log({"train/loss": 2 / step, "train/lr": 0.2, "train/new": float("nan")}, step)
    second.log({"system/cpu": 2.0}, 3)
    second.close()
    client = MlflowClient(store)

    def history(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(first.run_id, name)]

    assert sorted(history("train/loss")) == [(s, 1 / s) for s in range(1, 8)] + [(s, 2 / s) for s in range(8, 11)]
    assert sorted(history("train/lr")) == [(s, 0.1) for s in range(1, 6)] + [(s, 0.2) for s in range(6, 11)]
    assert [step for step, _ in sorted(history("train/new"))] == list(range(4, 11))
    assert len(history("system/cpu")) == 2
    with attach(settings, first.run_id) as later:  # an evaluation of a step is a new value
        later.log({"train/loss": 9.0}, 5)
    assert len(history("train/loss")) == 11


def test_a_model_that_was_logged_without_a_version_gets_it(
    settings: Tracking, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was killed between the two."""
    from pipeline.tracking import records

    with begin(settings) as tracker:
        with monkeypatch.context() as broken:
            broken.setattr(records, "_create_version", lambda *_: 1 / 0)
            tracker.register_checkpoint("file:///ckpt/step-00000010", {"a": 0.5}, step=10, name="killed-test")
            tracker.flush()
        tracker.register_checkpoint("file:///ckpt/step-00000010", {"a": 0.5}, step=10, name="killed-test")
    client = MlflowClient(store)
    (model,) = client.search_logged_models([client.get_run(tracker.run_id).info.experiment_id])
    (version,) = client.search_model_versions("name = 'killed-test'")
    assert model.params["checkpoint"] == version.tags["checkpoint"] == "file:///ckpt/step-00000010"


def test_a_run_that_is_gone_is_replaced_by_a_new_one(settings: Tracking, store: str) -> None:
    gone = begin(settings)
    gone.finish()
    MlflowClient(store).delete_run(gone.run_id)
    for old in (gone.run_id, "0" * 32):
        with begin(settings, old) as tracker:
            pass
        assert tracker.run_id != old
        assert MlflowClient(store).get_run(tracker.run_id).data.tags["continues"] == old


def test_an_error_fails_the_run_and_an_interrupt_kills_it(settings: Tracking, store: str) -> None:
    for error, status in ((RuntimeError(), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        tracker = begin(settings)
        with pytest.raises(type(error)), tracker:
            raise error
        assert MlflowClient(store).get_run(tracker.run_id).info.status == status


def write_from_elsewhere(pickled: bytes) -> None:
    tracker = pickle.loads(pickled)
    tracker.log({"train/loss": 1.0}, 5)
    tracker.finish()


def test_a_worker_writes_into_the_run_without_ending_it(settings: Tracking, store: str) -> None:
    with begin(settings) as tracker:
        process = multiprocessing.get_context("spawn").Process(
            target=write_from_elsewhere, args=(pickle.dumps(tracker),)
        )
        process.start()
        process.join(60)
        assert process.exitcode == 0
        run = MlflowClient(store).get_run(tracker.run_id)
        assert run.info.status == "RUNNING"
        assert run.data.metrics == {"train/loss": 1.0}


def test_a_checkpoint_becomes_a_model_version_once(settings: Tracking, store: str) -> None:
    metrics = {"zeroshot/drawn_shapes/top1": 0.5}
    with begin(settings) as tracker:
        tracker.log(metrics, step=10)
        for uri in ("file:///ckpt/step-00000010", "s3://bucket/ckpt/step-00000020", "file:///ckpt/step-00000010"):
            tracker.register_checkpoint(uri, metrics, step=int(uri[-2:]), name="checkpoint-test")
    client = MlflowClient(store)
    versions = client.search_model_versions("name = 'checkpoint-test'", order_by=["version_number ASC"])
    assert [version.source for version in versions] == ["file:///ckpt/step-00000010", "s3://bucket/ckpt/step-00000020"]
    assert {version.run_id for version in versions} == {tracker.run_id}
    assert versions[0].tags["step"] == "10"
    assert "| zeroshot/drawn_shapes/top1 | 0.5 |" in versions[0].description
    outputs = client.get_run(tracker.run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [10, 20]
    models = client.search_logged_models([client.get_run(tracker.run_id).info.experiment_id])
    assert {model.params["checkpoint"] for model in models} == {version.source for version in versions}
    assert models[0].metrics[0].value == 0.5
    history = client.get_metric_history(tracker.run_id, "zeroshot/drawn_shapes/top1")
    assert [point.step for point in history] == [10, 20]  # the model's value is the run's, not a second point


def test_figures_and_texts_become_artifacts(settings: Tracking, store: str) -> None:
    from matplotlib.figure import Figure

    with begin(settings) as tracker:
        tracker.log_figure("samples", Figure())
        tracker.log_text("notes/a.txt", "hello")
        tracker.log_file("profiles/trace.json.gz", b"\x1f\x8b")
        tracker.log_file("top.bin", b"123")
    client = MlflowClient(store)
    names = {"config.json", "figures", "notes", "profiles", "top.bin"}
    assert {file.path for file in client.list_artifacts(tracker.run_id)} == names
    assert Path(client.download_artifacts(tracker.run_id, "profiles/trace.json.gz")).read_bytes() == b"\x1f\x8b"
    (figure,) = client.list_artifacts(tracker.run_id, "figures")
    assert figure.path == "figures/samples.png" and figure.file_size > 500


def test_system_metrics_have_mlflows_names_and_go_on_after_a_resume(
    settings: Tracking, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    settings = replace(settings, system_metrics=True)
    with begin(settings) as tracker:
        time.sleep(1.3)
    with begin(settings, tracker.run_id):
        time.sleep(1.3)
    history = MlflowClient(store).get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    steps = [point.step for point in history]
    assert len(steps) >= 4 and steps == sorted(steps) and steps[-1] >= 2
    assert "system/system_memory_usage_percentage" in MlflowClient(store).get_run(tracker.run_id).data.metrics


def test_values_that_are_no_numbers_do_not_end_the_logging(settings: Tracking, store: str) -> None:
    with begin(settings) as tracker:
        tracker.log({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 1)
        tracker.log({"train/loss": 1.0, "bad\nname": 1.0}, 2)
        tracker.log({"train/loss": 0.5}, 3)
    assert MlflowClient(store).get_run(tracker.run_id).data.metrics["train/loss"] == 0.5


def test_a_servers_experiment_is_not_written_to_through_its_database(settings: Tracking, store: str) -> None:
    """Its files go through the server: one sentence, for a new run, a continued one and one that is added to."""
    client = MlflowClient(store)
    experiment = client.create_experiment(settings.experiment, artifact_location="mlflow-artifacts:/7")
    run_id = client.create_run(experiment).info.run_id
    remedy = "as --tracking-uri the address of the server"
    with pytest.raises(SettingError, match=f"^experiment: got '{settings.experiment}', .* name, or {remedy}"):
        begin(settings)
    for goes_on in (begin, attach):
        with pytest.raises(SettingError, match=f"^run_id: got '{run_id}', .* this store, or {remedy}"):
            goes_on(settings, run_id)
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run_id]


def test_adding_to_a_run_that_is_not_there(settings: Tracking) -> None:
    with pytest.raises(SettingError, match="run_id: got '0+', expected a run of sqlite"):
        attach(settings, "0" * 32)


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "/tmp/mlruns", "ftp://x", "memory"])
def test_other_kinds_of_store_are_refused(uri: str) -> None:
    with pytest.raises(SettingError, match="tracking_uri"):
        start(Tracking(tracking_uri=uri), Job())


def test_a_server_that_is_not_there_is_known_at_once() -> None:
    began = time.perf_counter()
    with pytest.raises(SettingError, match=r"\*\*\*@127.0.0.1:9.*MLflow server that answers"):
        start(Tracking(tracking_uri="http://me:hunter2@127.0.0.1:9"), Job())
    assert time.perf_counter() - began < 10


def test_a_server_that_goes_away_does_not_hold_training_up(caplog: pytest.LogCaptureFixture) -> None:
    tracker = RunHandle(uri="http://127.0.0.1:9", run_id="0" * 32).open()
    began = time.perf_counter()
    for step in range(500):
        tracker.log({"train/loss": 1.0}, step)
    tracker.register_checkpoint("s3://b/c", {}, 1)
    assert time.perf_counter() - began < 1
    with caplog.at_level(logging.WARNING):
        tracker.finish(seconds=0.5)
    assert time.perf_counter() - began < 5
    assert "500 values of metrics at steps 0 to 499, model version for s3://b/c" in caplog.text


class _Broken(BaseHTTPRequestHandler):
    """Accepts every connection and answers no request; a server that is dying, or a proxy before a dead one."""

    def do_GET(self) -> None:
        self.close_connection = True

    do_POST = do_GET


@pytest.mark.parametrize("goes_on", [begin, attach])
def test_a_server_that_dies_at_the_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch, goes_on: Any) -> None:
    """Also for a run that is remembered: it is not taken for one that the store has lost."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = Tracking(tracking_uri=f"http://127.0.0.1:{server.server_port}", system_metrics=False)
        with pytest.raises(SettingError, match=r"^tracking_uri: .*an MLflow store that answers \(this one.*\)$"):
            goes_on(settings, "0" * 32)
    finally:
        server.shutdown()
        server.server_close()


class _Refusing(BaseHTTPRequestHandler):
    """Answers everything with one status and body, as a login page, a proxy or another program would."""

    answer: tuple[int, bytes] = (200, b"")

    def do_GET(self) -> None:
        status, body = self.answer
        self.send_response(status)
        if status in (301, 302):
            self.send_header("Location", "/login")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("goes_on", [begin, attach])
@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, b"", "401.*MLFLOW_TRACKING_USERNAME"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no access"}', "no access; MLFLOW_TRACKING_USERNAME"),
        (404, b"<html>not here</html>", "404"),
        (500, b"", "500"),
        (302, b"", "redirect|302"),
        (200, b"<html>log in</html>", "this one: "),
        (200, b"", "this one: |a run of"),
    ],
)
def test_a_server_that_refuses_or_is_another_program_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, goes_on: Any, status: int, body: bytes, sentence: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    handler = type("Handler", (_Refusing,), {"answer": (status, body)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = Tracking(tracking_uri=f"http://127.0.0.1:{server.server_port}", system_metrics=False)
        with pytest.raises(SettingError, match=sentence) as caught:
            goes_on(settings, "0" * 32)
        assert "\n" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("location", "environment", "sentence"),
    [
        ("s3://bucket/mlflow", {}, "s3://bucket/mlflow.*credentials"),
        (
            "s3://bucket/mlflow",
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9"},
            "127.0.0.1:9",
        ),
        ("gs://bucket/mlflow", {}, "google"),
        ("/proc/no-such-folder/artifacts", {}, "/proc/no-such-folder"),
    ],
)
def test_artifacts_that_cannot_be_written_are_one_sentence(
    own_store: str, monkeypatch: pytest.MonkeyPatch, location: str, environment: dict[str, str], sentence: str
) -> None:
    """And the run is not left as running."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(own_store)
    experiment = client.create_experiment("elsewhere", artifact_location=location)
    settings = Tracking(tracking_uri=own_store, experiment="elsewhere", system_metrics=False)
    with pytest.raises(SettingError, match=f"^experiment: got 'elsewhere'.*{sentence}") as caught:
        start(settings, Job())
    assert "\n" not in str(caught.value)
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]


def test_a_file_that_is_no_store_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, though it has some length" * 100)
    with pytest.raises(SettingError, match="not a database"):
        start(Tracking(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), Job())
    with pytest.raises(SettingError, match="tracking_uri"):
        start(Tracking(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db/below/mlflow.db"), Job())


def _starts(store: str, barrier: Any, answers: Any) -> None:
    barrier.wait(120)
    try:
        with start(Tracking(tracking_uri=store, system_metrics=False), Job()) as tracker:
            tracker.log({"train/loss": 1.0}, 1)
        answers.put("started")
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.slow
@pytest.mark.alone
def test_processes_that_start_at_once_on_a_new_store_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for attempt in range(3):
        uri = f"sqlite:///{tmp_path}/{attempt}/mlflow.db"
        barrier, answers = context.Barrier(3), context.Queue()
        processes = [context.Process(target=_starts, args=(uri, barrier, answers)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [answers.get(timeout=200) for _ in processes] == ["started"] * 3
        for process in processes:
            process.join()
        runs = MlflowClient(uri).search_runs(["1"])
        assert [run.info.status for run in runs] == ["FINISHED"] * 3


def test_a_store_is_made_once_and_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables appear under the store's name as a whole; what a killed process left is not used."""
    made: list[str] = []

    class Slow:
        def __init__(self, uri: str, artifacts: str) -> None:
            path = Path(uri.removeprefix("sqlite:///"))
            assert not path.exists() and not (tmp_path / "mlflow.db").exists()
            made.append(artifacts)
            path.write_bytes(b"half")
            time.sleep(0.2)
            path.write_bytes(b"tables")
            self.engine = self

        def dispose(self) -> None:
            pass

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", Slow)
    (tmp_path / ".tmp-mlflow.db").write_bytes(b"of a killed process")
    threads = [threading.Thread(target=create_sqlite, args=(tmp_path / "mlflow.db",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(tmp_path / "artifacts").as_uri()]
    assert (tmp_path / "mlflow.db").read_bytes() == b"tables"


def test_the_default_store_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.tracking.store import default_uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_uri() == f"sqlite:///{tmp_path}/clipmill/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_uri() == "http://mlflow:5000"


def test_a_handle_does_not_show_its_password() -> None:
    assert "hunter2" not in repr(RunHandle(uri="http://me:hunter2@h", run_id="1"))


def test_no_tracker_has_every_method_of_the_real_one() -> None:
    public = {name for name in vars(MlflowTracker) if not name.startswith("_")}
    assert public - {"handle", "owns"} <= {name for name in dir(NoTracker())}


@pytest.fixture(scope="module")
def server(migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server as users start it."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_store, folder)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "art")]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, cwd=folder, env=dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_gets_everything_that_a_sqlite_store_gets(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    monkeypatch.chdir(tmp_path)
    settings = Tracking(tracking_uri=server, experiment="served", system_metrics=False)
    with begin(settings) as tracker:
        tracker.log({"train/loss": 2.5, "train/nan": float("nan")}, 1)
        tracker.log_dataset(SNAPSHOT)
        tracker.log_figure("samples", Figure())
        tracker.register_checkpoint("file:///ckpt/a", {"zeroshot/x/top1": 0.5}, 1)
        tracker.register_checkpoint("s3://bucket/ckpt/a", {"zeroshot/x/top1": 0.5}, 1)
        assert tracker.where.startswith(server) and tracker.run_id in tracker.where
    client = MlflowClient(server)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 2.5
    assert run.inputs.dataset_inputs[0].dataset.name == "drawn"
    assert [file.path for file in client.list_artifacts(tracker.run_id, "figures")] == ["figures/samples.png"]
    versions = client.search_model_versions("name = 'clip'", order_by=["version_number ASC"])
    assert [version.tags["checkpoint"] for version in versions] == ["file:///ckpt/a", "s3://bucket/ckpt/a"]
    assert versions[0].source.startswith("models:/m-") and versions[1].source == "s3://bucket/ckpt/a"
    assert not list(tmp_path.iterdir())  # no stray store in the working folder
    with begin(settings, tracker.run_id):
        assert client.get_run(tracker.run_id).info.status == "RUNNING"


@dataclass(frozen=True, kw_only=True)
class Method:
    architecture: str = "ViT-B-32"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: str = "s3://bucket/data@00001-abc"
    steps: int = 10


@dataclass(frozen=True, kw_only=True)
class Training:
    method: Method = field(default_factory=Method)
    run: Recipe = field(default_factory=Recipe)
    tracking: Tracking = field(default_factory=Tracking)


def test_a_run_is_called_by_what_it_is_and_describes_itself(
    settings: Tracking, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that MLflow's page shows: method, preset, data, changes, command; at the end the table and links."""
    Method.__module__ = "pipeline.models.clip"
    monkeypatch.setattr(sys, "argv", ["train.py", "demo", "--steps", "5"])
    job: list[Training] = []
    run_job({"demo": ("A demo.", Training(tracking=replace(settings, run_name="")))}, job.append)
    with start(job[0].tracking, job[0]) as tracker:
        tracker.describe("zero-shot  top1\nshapes     0.5", "/runs/first/step-5")
    run = MlflowClient(store).get_run(tracker.run_id)
    assert run.info.run_name == "clip demo ViT-B-32 data"
    assert run.data.tags["preset"] == "demo" and run.data.tags["differs_from_preset"] == "run.steps=5"
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**clip**, preset `demo`, model `ViT-B-32`, data `s3://bucket/data@00001-abc`\n")
    assert "train.py demo --steps 5" in note and "shapes     0.5" in note and "`/runs/first/step-5`" in note
    assert f"runs/{tracker.run_id}/artifacts/figures" in note


def test_an_attached_tracker_leaves_the_description(settings: Tracking, store: str) -> None:
    with begin(settings) as tracker:
        pass
    before = MlflowClient(store).get_run(tracker.run_id).data.tags["mlflow.note.content"]
    with attach(settings, tracker.run_id) as other:
        other.describe("another table")
    assert MlflowClient(store).get_run(tracker.run_id).data.tags["mlflow.note.content"] == before
