"""One writer at a time, on a disk and on S3: a live holder blocks, a dead one does not."""

import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.shards import lease as module
from pipeline.shards.lease import LEASE, Holder, lease
from pipeline.shards.storage import Folder


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    place = tmp_path if request.param == "disk" else request.getfixturevalue("s3") + "/lease"
    return Folder(place)


def test_one_at_a_time(folder: Folder) -> None:
    with lease(folder, "a refresh") as held:
        with pytest.raises(StorageError, match=r"a refresh \(process \d+ on .*\) is at work here"), lease(folder, "b"):
            pass
        held.check()
    assert not folder.exists(LEASE)
    with lease(folder, "another"):
        pass
    assert folder.names() == []


def test_a_dead_process_of_this_machine_is_not_waited_for(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from pipeline.shards.lease import Holder, _text; import sys; sys.stdout.buffer.write(_text(Holder(work='x')))"
    )
    root = Path(__file__).resolve().parents[2]
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root).stdout
    folder.write_atomic(LEASE, dead)
    monkeypatch.setattr(module, "_falls_silent", lambda *_: pytest.fail("waited"))
    with lease(folder, "a refresh"):
        assert json.loads(folder.read_bytes(LEASE))["work"] == "a refresh"


def test_a_process_number_that_was_given_again_is_another_process() -> None:
    assert Holder(work="x", born=1.0).is_dead()
    assert not Holder(work="x").is_dead()
    assert not Holder(work="x", host="elsewhere", process=1, born=1.0).is_dead()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]"])
def test_silence_elsewhere_ends_a_lease(folder: Folder, content: bytes | None) -> None:
    theirs = json.dumps({"work": "a refresh", "host": "elsewhere", "process": 1, "born": 0.0, "name": "n", "beat": 7})
    folder.write_atomic(LEASE, theirs.encode() if content is None else content)
    with lease(folder, "mine") as held:
        held.check()
    assert folder.names() == []


def test_who_was_taken_for_dead_stops_before_it_publishes(folder: Folder) -> None:
    with lease(folder, "slow") as slow:
        folder.delete(LEASE)
        with lease(folder, "quick"), pytest.raises(StorageError, match="quick .* has taken over"):
            slow.check()
    assert folder.names() == []


def _try(path: str, start: Any, found: Any) -> None:
    module.SILENCE_SECONDS = 20.0
    inside = Path(path) / "inside"
    start.wait()
    try:
        with lease(Folder(path), "one of many"):
            inside.touch(exist_ok=False)
            threading.Event().wait(0.5)
            inside.unlink()
            found.put("held")
    except StorageError:
        found.put("refused")
    except FileExistsError:
        found.put("both")


def test_of_many_at_once_one_holds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, found = context.Event(), context.Queue()
    processes = [context.Process(target=_try, args=(str(tmp_path), start, found)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    results = sorted(found.get(timeout=5) for _ in processes)
    assert "held" in results and "both" not in results and not (tmp_path / LEASE).exists()
