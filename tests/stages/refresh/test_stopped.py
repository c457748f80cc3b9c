"""Real signals: a purge that is killed at its renames, and a refresh that sleeps while another takes its folder."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import StorageError
from pipeline.shards import lease as module
from pipeline.shards.lease import LEASE
from pipeline.shards.snapshot import Snapshot, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.shards.verify import folder_problems
from pipeline.sources.drawn.source import Drawn
from pipeline.sources.source import Row, Slice
from pipeline.stages.refresh.make_shard import AS_IT_IS, ShardOptions
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import FROM_NOTHING, Renewal
from pipeline.stages.shard_tasks import Workers

pytestmark = [pytest.mark.slow, pytest.mark.alone]

HERE = Workers(processes_count=0)
OPTIONS = ShardOptions(media=AS_IT_IS.media, number_sample_per_shard=4)
LATEST = Renewal(parent="latest")
CONTEXT: Any = multiprocessing.get_context("forkserver")  # imports once, then each process starts in a few ms
CONTEXT.set_forkserver_preload(["pipeline.stages.refresh.refresh", "pipeline.sources.drawn.source"])


@dataclass(frozen=True, kw_only=True)
class Slowly(Drawn):
    """Drawn samples that take their time in a process that sets ``seconds``."""

    kind: ClassVar[str] = "slowly"
    seconds: ClassVar[float] = 0.0

    def rows(self, piece: Slice) -> Iterator[Row]:
        for row in Drawn.rows(self, piece):
            time.sleep(self.seconds)
            yield row


def make(folder: Folder, samples: int, renewal: Renewal = FROM_NOTHING) -> Snapshot:
    return refresh(Drawn(samples=samples, size=64), folder, OPTIONS, HERE, renewal=renewal)


def purge_until(place: str, renewal: Renewal, renames: int) -> None:
    """Purge, and die before the rename of this number."""
    replace, done = os.replace, count(1)

    def counted(*paths: Any) -> None:
        if next(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counted
    make(Folder(place), 12, renewal)


def content(folder: Folder) -> dict[str, bytes]:
    """Every file below the folder, but for the times in the shards' stats and in the manifests."""
    found = folder.fs.find(folder.path)
    names = [name.removeprefix(folder.path.rstrip("/") + "/") for name in found]
    return {name: folder.read_bytes(name) for name in names if not name.endswith(".json")}


def test_a_purge_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    snapshot = make(Folder(base), 12)
    assert snapshot.samples == 12
    listed = tmp_path / "opt-out.txt"
    listed.write_text("\n".join(f"drawn://train/0/{number}" for number in (0, 1, 5, 8, 9, 10, 11)))
    asks = Renewal(parent="latest", opt_out=str(listed), purge=True)
    whole = Folder(shutil.copytree(base, tmp_path / "whole"))
    last = make(whole, 12, asks)
    assert last.samples == 5 and last.changes == {"purged": 7}
    killed = 0
    for renames in count(1, 5):
        place = shutil.copytree(base, tmp_path / f"cut-{renames}")
        process = CONTEXT.Process(target=purge_until, args=(str(place), asks, renames))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += bool(list(place.rglob(".tmp-*")))
        folder = Folder(place)
        make(folder, 12, asks)  # finishes it
        assert not list(place.rglob(".tmp-*")) and not (place / LEASE).exists()
        assert read_snapshot(str(place)).digest == last.digest
        assert folder_problems(folder, read_snapshot(str(place))) == []
    assert killed >= 4


def sleeper(place: str, environment: dict[str, str], told: Any) -> None:
    os.environ.update(environment)
    module.BEAT_SECONDS, Slowly.seconds = 0.1, 0.25
    try:
        refresh(Slowly(samples=24, size=64), Folder(place), OPTIONS, HERE)
        told.put("published")
    except StorageError as error:
        told.put(str(error))


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "at-work"])
def test_a_refresh_that_sleeps_is_overtaken(
    where: str, ended: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up when the other has published and begun or ended another refresh, and says one sentence."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    folder = Folder(tmp_path / "data" if where == "disk" else request.getfixturevalue("s3") + "/data")
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    told = CONTEXT.Queue()
    process = CONTEXT.Process(target=sleeper, args=(folder.uri, keys, told))
    process.start()
    try:
        until = time.monotonic() + 60
        while "00001_stats.json" not in folder.names() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        first = refresh(Slowly(samples=24, size=64), folder, OPTIONS, HERE)
        assert first.samples == 24
        if ended:
            last = refresh(Slowly(samples=28, size=64), folder, OPTIONS, HERE, renewal=LATEST)
            assert last.samples == 28
            check(folder, process, told)
        else:
            with module.lease(folder, "another refresh"):
                check(folder, process, told)
    finally:
        process.kill()
        process.join()


def check(folder: Folder, process: Any, told: Any) -> None:
    before, ids = content(folder), snapshot_ids(folder)
    os.kill(process.pid, signal.SIGCONT)
    said = told.get(timeout=60)
    process.join(60)
    assert "has taken over" in said and said.endswith("run the same command to continue") and "\n" not in said
    after = content(folder)
    before.pop("_lease.beat", None), after.pop("_lease.beat", None)
    assert after == before and snapshot_ids(folder) == ids
