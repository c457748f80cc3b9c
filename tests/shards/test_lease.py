"""One writer at a time, on a disk and on S3: a live holder blocks, a dead one does not."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LeaseLost, StorageError
from pipeline.shards import lease as module
from pipeline.shards.lease import LEASE, Holder, lease
from pipeline.shards.snapshot import Shard, publish_shards
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


def stranger(**values: object) -> bytes:
    return json.dumps({"work": "x", "host": "elsewhere", "process": 1, "born": 0.0, "name": "n", **values}).encode()


STRANGE = {
    "whole": stranger(),
    "empty": b"",
    "no keys": b"{}",
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "process": stranger(process=-1),
    "huge process": stranger(process=2**70),
    "no work": stranger(work=None),
    "a path": stranger(name="../../n"),
    "more": stranger(more=1),
}


@pytest.mark.parametrize("what", STRANGE)
def test_silence_elsewhere_ends_a_lease(folder: Folder, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    folder.write_atomic(LEASE, STRANGE[what])
    with lease(folder, "mine") as held:
        held.check()
    assert folder.names() == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_suspended_holder_writes_and_deletes_no_more(
    folder: Folder, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever took over may be at work or have ended; a copy of the folder in another process stops, too."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    with lease(folder, "slow") as slow:
        slow.folder.write_atomic("a", b"1")
        copy = pickle.loads(pickle.dumps(slow.folder)).folder("_plan")
        copy.write_atomic("b", b"1")
        (shard,) = [Shard(name="00000", samples=1, bytes=1024, sha256="0")]
        folder.write_atomic(LEASE, stranger())  # silent, and on another machine
        with lease(folder, "quick") as quick:
            quick.folder.write_atomic("a", b"2")
            if not ended:
                refuse_all(slow.folder, copy, shard)
            assert json.loads(folder.read_bytes(LEASE))["work"] == "quick"
        refuse_all(slow.folder, copy, shard)
    assert folder.names() == ["a"] and folder.read_bytes("a") == b"2" and copy.read_bytes("b") == b"1"


def refuse_all(folder: Folder, copy: Folder, shard: Shard) -> None:
    def scratch() -> None:
        with copy.scratch_file():
            pass

    def publish() -> None:
        publish_shards(folder, (shard,), fields=(), card=None, options={}, rows=1, dropped={})

    for write in (
        lambda: folder.write_atomic("a", b"3"),
        lambda: folder.create("c", b"3"),
        lambda: folder.delete("a"),
        lambda: folder.delete_folder("_plan"),
        lambda: copy.write_atomic("b", b"3"),
        lambda: copy.delete("b"),
        folder.check,
        publish,
        *((scratch, folder.remove_temporary) if folder.is_local else ()),
    ):
        with pytest.raises(StorageError, match=r"has taken over.*this job stops, nothing is lost"):
            write()


def test_a_spaced_guard_reads_the_lease_once_and_again_after_a_suspension(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 60.0)  # its heartbeat reads the lease, too
    with lease(folder, "a training") as held:
        asked: list[str] = []
        monkeypatch.setattr(module, "_read", lambda *place, read=module._read: asked.append("") or read(*place))
        often = Folder(folder.uri, held.spaced).folder("checkpoints")
        for number in range(5):
            often.write_atomic("a", f"{number}".encode())
        assert len(asked) == 1
        folder.write_atomic(LEASE, stranger())
        copy, now = pickle.loads(pickle.dumps(often)), module.time.time()
        monkeypatch.setattr(module.time, "time", lambda: now + module.SPACE_SECONDS)
        for woken in (often, copy):
            with pytest.raises(LeaseLost, match="has taken over"):
                woken.write_atomic("a", b"5")
    assert often.read_bytes("a") == b"4"


def test_the_heartbeat_keeps_a_lease(folder: Folder) -> None:
    with lease(folder, "a refresh") as held:
        for _ in range(2):
            with pytest.raises(StorageError, match="is at work here"), lease(folder, "b"):
                pass
        held.folder.write_atomic("a", b"1")
    assert folder.names() == ["a"]


def dead() -> bytes:
    """The lease of a process of this machine that has ended."""
    return module._text(Holder(work="a refresh", born=1.0, name="dead"))


def test_of_many_that_find_the_same_dead_holder_one_takes_over(folder: Folder) -> None:
    folder.write_atomic(LEASE, dead())
    start, found = threading.Barrier(4), []

    def attempt() -> None:
        start.wait()
        try:
            with lease(folder, "one of many") as held:
                held.folder.write_atomic("a", b"1")
                threading.Event().wait(0.3)
                held.folder.write_atomic("a", b"2")
                found.append("held")
        except StorageError as error:
            found.append("refused" if "at work here" in str(error) else str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["held", "refused", "refused", "refused"]
    assert folder.names() == ["a"]


@pytest.mark.parametrize("after", [False, True])
def test_who_died_while_it_took_over_blocks_nobody(folder: Folder, after: bool) -> None:
    """It had claimed the dead lease, and had or had not written its own."""
    second = module._text(Holder(work="a refresh", born=1.0, name="second"))
    folder.write_atomic(LEASE, second if after else dead())
    folder.write_atomic(f"{LEASE}-dead", second)
    with lease(folder, "the third") as held:
        held.check()
        assert folder.names() == [LEASE]
    assert folder.names() == []


def test_the_holder_deletes_what_dead_ones_left(tmp_path: Path) -> None:
    left = [".tmp-1", "_plan/.tmp-2", "_selections/.tmp-3.parquet", "_snapshots/00000-ab/.tmp-4", "_filters/x/y/.tmp-5"]
    others = ["00000.tar", "_plan/plan.parquet", "images/.tmp-6", "run/_x/.tmp-7"]
    for name in (*left, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def there() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())

    with lease(Folder(tmp_path), "a refresh"):
        assert there() == sorted([LEASE, *others])
        (tmp_path / "_plan" / ".tmp-8").touch()  # of a worker that dies
    assert there() == sorted(others)


def test_a_small_write_survives_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary file is deleted by the next holder just before it gets its name."""
    folder, replace, link = Folder(tmp_path), os.replace, os.link
    swept = [2, 2]

    def sweeping(number: int, finish: Any) -> Any:
        def finished(temporary: Path, target: Path) -> None:
            if swept[number]:
                swept[number] -= 1
                folder.remove_temporary()
            finish(temporary, target)

        return finished

    monkeypatch.setattr(os, "replace", sweeping(0, replace))
    monkeypatch.setattr(os, "link", sweeping(1, link))
    folder.write_atomic("a", b"1")
    assert folder.create("b", b"2") and not folder.create("b", b"3")
    assert folder.names() == ["a", "b"] and folder.read_bytes("b") == b"2"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


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
