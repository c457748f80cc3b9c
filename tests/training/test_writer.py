"""Checkpoints written beside the training: what is copied, what waits, what is tried again, what ends the run."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import from_json, to_json
from pipeline.errors import SettingError, StorageError
from pipeline.evaluation.models import trained_steps
from pipeline.models.clip import Clip
from pipeline.shards.storage import Folder
from pipeline.training import writer as writing
from pipeline.training.checkpoint import (
    Checkpoints,
    EvaluationRecord,
    Meta,
    load_method,
    load_optimizer,
    read_weights,
    stored_score,
    write_evaluation,
)
from pipeline.training.loop import run_training
from pipeline.training.optimizer import AdamW, make_optimizer
from pipeline.training.run import prepare
from pipeline.training.writer import CheckpointWriter, Saving, Staging, may_pass

CPU = torch.device("cpu")


@pytest.fixture
def method() -> Clip:
    return Clip(Clip.smallest())


def meta(step: int, evaluate: bool = False) -> Meta:
    return Meta(step=step, samples_seen=8 * step, batch_size=8, lanes=2, seed=0, snapshot="d" * 64, evaluate=evaluate)


def stepped(method: Clip) -> torch.optim.Optimizer:
    optimizer = make_optimizer(AdamW(), method)
    for parameter in method.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    return optimizer


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait until it is set."""
    go, whole = threading.Event(), Folder.write_atomic

    def slow(self: Folder, name: str, content: Any) -> None:
        assert go.wait(60)
        whole(self, name, content)

    monkeypatch.setattr(Folder, "write_atomic", slow)
    return go


def outage(monkeypatch: pytest.MonkeyPatch, failures: int, error: Callable[[], Exception], name: str) -> list[str]:
    """Writes of ``name`` fail so many times; returns the attempts as they happen."""
    tried: list[str] = []
    whole = Folder.write_atomic

    def flaky(self: Folder, written: str, content: Any) -> None:
        if written == name:
            tried.append(written)
            if len(tried) <= failures:
                raise error()
        whole(self, written, content)

    monkeypatch.setattr(Folder, "write_atomic", flaky)
    monkeypatch.setattr(writing, "FIRST_PAUSE", 0.01)
    return tried


@pytest.mark.parametrize("place", ["disk", "memory", "s3"])
def test_training_goes_on_while_a_checkpoint_is_written(
    place: str, method: Clip, held: threading.Event, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What is written is what stood there when it was asked for, whatever later steps do to the same tensors."""
    uris = {"disk": str(tmp_path), "memory": f"memory://{tmp_path.name}"}
    uri = uris.get(place) or f"{request.getfixturevalue('s3')}/run"
    checkpoints, optimizer = Checkpoints(uri), stepped(method)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    writer = CheckpointWriter(checkpoints, Saving(), keep=3, keep_waiting=3)
    writer.save(method, method.state_dict(), optimizer.state_dict(), meta(1), ema=method.state_dict())
    optimizer.step()  # in place
    assert checkpoints.latest() is None  # it is still under way
    held.set()
    writer.finish()
    found = checkpoints.latest()
    assert found is not None and found.meta.step == 1
    for weights in (load_method(uri).state_dict(), read_weights(found.folder), read_weights(found.folder, ema=True)):
        assert set(weights) == set(before)
        assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not torch.equal(method.logit_scale, before["model.logit_scale"])
    again = make_optimizer(AdamW(), method)
    load_optimizer(again, found.folder)
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(again.state.values(), moments, strict=True))


def test_the_next_checkpoint_waits_for_the_one_before(method: Clip, held: threading.Event, tmp_path: Path) -> None:
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), Saving(), keep=3, keep_waiting=3)
    writer.save(method, method.state_dict(), None, meta(1))
    assert set(writer.measures()) == {"perf/checkpoint_wait", "perf/checkpoint_copy"} and not writer.measures()
    threading.Timer(0.3, held.set).start()
    writer.save(method, method.state_dict(), None, meta(2))
    assert [found.meta.step for found in Checkpoints(str(tmp_path)).whole()][0] == 1
    assert writer.measures()["perf/checkpoint_wait"] > 0.1
    writer.close()
    assert [found.meta.step for found in Checkpoints(str(tmp_path)).whole()] == [1, 2]


KILLED = """
import os, signal, sys
from pipeline.models.clip import Clip
from pipeline.shards.storage import Folder
from pipeline.training.checkpoint import Checkpoints, Meta
from pipeline.training.writer import Saving, CheckpointWriter

method, whole = Clip(Clip.smallest()), Folder.write_atomic
writer = CheckpointWriter(Checkpoints(sys.argv[1]), Saving(), keep=1, keep_waiting=1)

def deadly(self, name, content):
    if name == sys.argv[2] and "step-00000002" in self.uri:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, name, content)

Folder.write_atomic = deadly
for step in (1, 2):
    meta = Meta(step=step, samples_seen=8, batch_size=8, lanes=2, seed=0, snapshot="d" * 64)
    writer.save(method, method.state_dict(), {"state": {}}, meta)
writer.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_a_kill_in_mid_write_leaves_the_one_before(name: str, tmp_path: Path) -> None:
    """The thread is killed, with its process, before the first file and before the commit mark."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), name], timeout=120)
    assert process.returncode == -signal.SIGKILL
    checkpoints = Checkpoints(str(tmp_path))
    assert [found.meta.step for found in checkpoints.whole()] == [1]
    assert load_method(str(tmp_path)).logit_scale.isfinite()
    checkpoints.remove_broken()
    assert not checkpoints.at(2).names()


def test_averaged_weights_are_loaded_when_asked_for(method: Clip, tmp_path: Path) -> None:
    average = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in method.state_dict().items()
    }
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), Saving(), keep=1, keep_waiting=1)
    writer.save(method, method.state_dict(), None, meta(1), ema=average)
    writer.finish()
    plain, scale = load_method(str(tmp_path)), method.model.logit_scale
    assert torch.equal(plain.model.logit_scale, scale)
    for averaged in (load_method(str(tmp_path), ema=True), load_method(f"{tmp_path}:ema")):
        assert torch.equal(averaged.model.logit_scale, scale + 1)
    assert trained_steps(f"{tmp_path}:ema") == 1 == trained_steps(str(tmp_path))
    writer.save(method, method.state_dict(), None, meta(2))
    writer.finish()
    with pytest.raises(SettingError, match=r"ema: got True.*no model_ema\.safetensors"):
        load_method(f"{tmp_path}:ema")


def test_an_outage_of_the_store_loses_nothing(
    run: Any, remember: Any, s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second upload fails three times in the middle, with S3's 503; the run ends as if it had not."""
    busy = "An error occurred (SlowDown) when calling the PutObject operation"
    tried = outage(monkeypatch, 3, lambda: StorageError(busy), "state.pt")
    monkeypatch.setattr(writing, "may_pass", lambda error: busy in str(error))
    plan, _ = prepare(Clip.smallest(), run(output_folder=f"{s3}/run", keep_checkpoints=9))
    tracker = remember()
    outcome = run_training(plan, CPU, tracker)
    assert len(tried) == 3 + 3 and sorted(tracker.history) == list(range(1, 11))
    assert [found.meta.step for found in Checkpoints(f"{s3}/run").whole()] == [4, 8, 10]
    assert outcome.steps == 10 and [record.levelname for record in caplog.records].count("WARNING") >= 3


def test_a_server_that_is_away_is_waited_for(method: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real S3 client against a port that nobody listens on, and then against a server."""
    from moto.server import ThreadedMotoServer

    monkeypatch.setattr(writing, "FIRST_PAUSE", 0.05)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("s3://outage")
    checkpoints = Checkpoints("s3://outage/run")
    writer = CheckpointWriter(checkpoints, Saving(), keep=3, keep_waiting=3)
    server.stop()
    failed = threading.Event()
    monkeypatch.setattr(writing.logger, "warning", lambda *_: failed.set())
    writer.save(method, method.state_dict(), None, meta(1))
    assert failed.wait(60)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        s3fs.S3FileSystem(skip_instance_cache=True).mkdirs("s3://outage", exist_ok=True)
        writer.finish()
        assert [found.meta.step for found in checkpoints.whole()] == [1]
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("when", ["at the next checkpoint", "at the end"])
def test_what_waiting_does_not_mend_ends_the_run(
    when: str, run: Any, remember: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = outage(monkeypatch, 9, lambda: _caused(OSError(28, "No space left on device")), "meta.json")
    steps = 10 if when == "at the next checkpoint" else 4
    plan, _ = prepare(Clip.smallest(), run(steps=steps))
    tracker = remember()
    with pytest.raises(StorageError, match="disk is full"):
        run_training(plan, CPU, tracker)
    assert len(tried) == 1 and max(tracker.history) == (8 if steps == 10 else 4) and tracker.closed == 1
    assert Checkpoints(plan.run.output_folder).whole() == []


def test_patience_ends(method: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = outage(monkeypatch, 10**9, lambda: _caused(ConnectionResetError("gone")), "config.json")
    saving = Saving(checkpoint_patience_minutes=0.2 / 60)
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), saving, keep=1, keep_waiting=1)
    writer.save(method, method.state_dict(), None, meta(1))
    with pytest.raises(StorageError):
        writer.finish()
    assert 2 <= len(tried) <= 6  # pauses of 10, 20, 40 and 80 ms
    writer.close()  # the error was raised once


def test_the_end_of_a_failing_run_does_not_wait_for_a_store(
    method: Clip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outage(monkeypatch, 10**9, lambda: _caused(ConnectionResetError("gone")), "config.json")
    monkeypatch.setattr(writing, "FIRST_PAUSE", 50.0)
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), Saving(), keep=1, keep_waiting=1)
    writer.save(method, method.state_dict(), None, meta(1))
    writer.close()
    assert "was not written" in caplog.text and Checkpoints(str(tmp_path)).whole() == []


def test_which_errors_may_pass() -> None:
    from botocore.exceptions import EndpointConnectionError

    away = EndpointConnectionError(endpoint_url="http://x")
    passing = [ConnectionResetError("gone"), TimeoutError(), OSError(16, "SlowDown"), away]
    lasting = [OSError(28, "full"), PermissionError(13, "key"), FileNotFoundError(2, "bucket"), RuntimeError("x")]
    assert all(may_pass(_caused(error)) for error in passing)
    assert not any(may_pass(_caused(error)) for error in lasting) and not may_pass(StorageError("alone"))


def _caused(error: Exception) -> StorageError:
    try:
        raise StorageError("the disk is full" if getattr(error, "errno", 0) == 28 else "refused") from error
    except StorageError as raised:
        return raised


def test_the_best_and_every_nth_are_kept(method: Clip, tmp_path: Path) -> None:
    """Scores 3, 9, 1, none, 9, 2, error at steps 1 to 7: the best two are 2 and 5."""
    checkpoints = Checkpoints(str(tmp_path))
    scores: list[Any] = [3.0, 9.0, 1.0, None, 9.0, 2.0, "error"]
    for step, value in enumerate(scores, 1):
        saved = checkpoints.save(method, stepped(method), meta(step, evaluate=value is not None))
        if isinstance(value, float):
            write_evaluation(saved, EvaluationRecord(step=step, metrics={"zeroshot/x/top1": value}))
        elif value:
            write_evaluation(saved, EvaluationRecord(step=step, error="out of memory"))

    def left(**options: Any) -> list[int]:
        checkpoints.prune(keep=1, keep_waiting=9, **options)
        return [found.meta.step for found in checkpoints.whole()]

    assert left(best=3, metric="zeroshot/x/top1", every_steps=3) == [1, 2, 3, 5, 6, 7]
    assert stored_score(checkpoints.at(5).uri, "zeroshot/x/top1") == 9.0
    assert stored_score(checkpoints.at(7).uri, "zeroshot/x/top1") is None
    assert left(best=1, metric="-zeroshot/x/top1", every_steps=5) == [3, 5, 7]
    assert left(best=2, metric="missing") == [7]


def test_the_best_need_evaluations(run: Any) -> None:
    settings = run(saving=Saving(keep_best=1, keep_best_metric="zeroshot/x/top1"))
    with pytest.raises(SettingError, match="keep_best: got 1.*0 without evaluations"):
        prepare(Clip.smallest(), settings)
    plan, record = prepare(Clip.smallest(), settings, evaluates=True)
    assert not any(name.startswith("saving") for name in record.settings)
    assert prepare(Clip.smallest(), replace(settings, saving=Saving()))[0].run.output_folder == plan.run.output_folder


def test_staging_keeps_order_and_uses_its_memory_again() -> None:
    """The order in memory is the source's; numbers, lists and nothing pass through."""
    image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    tree = {"a": image, "b": [{"c": torch.tensor(1)}, 2.5, None], "d": (True, "e")}
    staging = Staging()
    first, ready = staging.copy(tree)
    assert ready is None and first["a"].stride() == image.stride() and torch.equal(first["a"], image)
    assert first["b"][1:] == [2.5, None] and first["d"] == [True, "e"] and int(first["b"][0]["c"]) == 1
    image.zero_()
    assert first["a"].any()
    second, _ = staging.copy(tree)
    assert second["a"].data_ptr() == first["a"].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_staging_from_a_gpu_is_pinned_and_whole() -> None:
    staging, tensor = Staging(), torch.randn(2000, 2000, device="cuda")
    expected = tensor.cpu()
    copied, ready = staging.copy({"a": tensor})
    tensor.zero_()  # queued behind the copy
    assert ready is not None
    ready.synchronize()
    assert copied["a"].is_pinned() and torch.equal(copied["a"], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_best": 1},
        {"keep_best_metric": "a"},
        {"keep_best": -1},
        {"keep_every_steps": 0},
        {"checkpoint_patience_minutes": -1.0},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as caught:
        Saving(**wrong)
    assert caught.value.field.startswith(("keep", "checkpoint"))
    good = Saving(keep_best=2, keep_best_metric="-a", keep_every_steps=5)
    assert from_json(Saving, to_json(good)) == good
