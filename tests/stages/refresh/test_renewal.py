"""Refreshing from a parent: rows are fetched once, kept unchanged, hidden when removed; stops do not matter."""

import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.codecs.image_encoding import ImageOptions
from pipeline.codecs.options import MediaOptions
from pipeline.errors import SettingError, SnapshotError, TooManyFailures
from pipeline.shards.lease import LEASE
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot, publish_shards, read_snapshot, snapshot_ids
from pipeline.shards.storage import Folder
from pipeline.sources.folder import ImageFolder
from pipeline.sources.urls import UrlTable
from pipeline.stages.crawl.download import DownloadOptions
from pipeline.stages.refresh.make_shard import ShardOptions
from pipeline.stages.refresh.progress import Floor
from pipeline.stages.refresh.refresh import refresh
from pipeline.stages.refresh.settings import Renewal
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)
LATEST = Renewal(parent="latest")
OPTIONS = ShardOptions(
    media=MediaOptions(image=ImageOptions(image_size=32)),
    downloads=DownloadOptions(allow_hosts=("127.0.0.1",), timeout=5.0),
    number_sample_per_shard=4,
)


def image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60)).save(file, "JPEG")
    return file.getvalue()


class World:
    """A web server with images 0 to 99, some of them missing, and a url table that changes."""

    def __init__(self, tmp_path: Path, serve: Any) -> None:
        self.missing: set[int] = set()
        self.busy: set[int] = set()
        self._reply = serve.Reply
        self.server = serve({f"{number}.jpg": self._answer(number) for number in range(30)})
        self.list, self.out = tmp_path / "list.parquet", tmp_path / "out"
        self.folder = Folder(self.out)

    def _answer(self, number: int) -> Any:
        def answer(_: int) -> Any:
            if number in self.busy:
                return self._reply(b"busy", status=503)
            return self._reply(b"gone", status=404) if number in self.missing else image(number)

        return answer

    def url(self, number: int) -> str:
        return f"{self.server.url}/{number}.jpg"

    def source(self, numbers: Sequence[int], captions: dict[int, str] | None = None) -> UrlTable:
        said = captions or {}
        rows = [
            {"url": self.url(number), "caption": said.get(number, f"number {number}"), "n": number}
            for number in numbers
        ]
        pandas.DataFrame(rows).to_parquet(self.list)
        return UrlTable(url_list=str(self.list), caption_col="caption", save_additional_columns=("n",))

    def refresh(
        self, numbers: Sequence[int], renewal: Renewal = LATEST, captions: dict[int, str] | None = None, **more: Any
    ) -> Snapshot:
        return refresh(self.source(numbers, captions), self.folder, OPTIONS, HERE, renewal=renewal, **more)

    def asked(self) -> list[int]:
        """The images fetched since the last call, sorted."""
        numbers = sorted(int(path.strip("/").removesuffix(".jpg")) for path in self.server.requests)
        self.server.requests.clear()
        return numbers

    def opt_out(self, *lines: str) -> Renewal:
        path = self.list.with_name("opt-out.txt")
        path.write_text("# who asked\n\n" + "\n".join(lines))
        return Renewal(parent="latest", opt_out=str(path))


@pytest.fixture
def world(tmp_path: Path, serve: Any) -> World:
    return World(tmp_path, serve)


def captions(snapshot: Snapshot) -> list[str]:
    folder = Folder(snapshot.folder)
    found = [sample.fields["txt"].decode() for shard in snapshot.shards for sample in read_samples(folder, shard)]
    assert len(found) == snapshot.samples
    return found


def numbers(snapshot: Snapshot) -> list[int]:
    return sorted(int(caption.split()[-1]) for caption in captions(snapshot))


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    files = [
        *folder.glob("*.tar"),
        *folder.glob("*.parquet"),
        *folder.glob("_selections/*"),
        *folder.glob("_plan/**/hidden*"),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def changes(snapshot: Snapshot, **expected: int) -> bool:
    plain = {"added": 0, "removed": 0, "changed": 0, "failed": 0}
    return dict(snapshot.changes) == {**plain, **expected}


def test_only_what_differs_is_fetched(world: World) -> None:
    first = world.refresh(range(10))
    assert world.asked() == list(range(10))
    before = shard_bytes(world.out)
    second = world.refresh([*range(2, 12)], captions={5: "another 5"})
    assert world.asked() == [5, 10, 11]
    assert changes(second, added=2, removed=2, changed=1, kept=7)
    assert second.parent == first.id and second.rows == 10 and numbers(second) == list(range(2, 12))
    assert captions(second).count("another 5") == 1 and "number 5" not in captions(second)
    assert [shard.name for shard in second.shards] == ["00000", "00001", "00002", "00003"]
    after = shard_bytes(world.out)
    assert {name: after[name] for name in before} == before
    assert numbers(read_snapshot(first.uri)) == list(range(10))


def test_nothing_new_writes_nothing(world: World) -> None:
    world.missing = {3}
    renewal = world.opt_out(world.url(1))
    world.refresh(range(6))
    for _ in range(2):
        last = world.refresh(range(1, 9), renewal)
    before = listing(world.out)
    world.asked()
    assert world.refresh(range(1, 9), renewal) == last and world.asked() == []
    assert world.refresh(range(1, 9), Renewal(parent="latest", retry_failed=True)) == last
    assert world.refresh(range(1, 9), Renewal(parent=last.uri, purge=False)) == last
    assert listing(world.out) == before and world.asked() == []


@pytest.mark.parametrize("lost", ["00001.tar", "00001.parquet", "00001_stats.json"])
def test_a_parent_that_has_lost_a_file_is_refused(world: World, lost: str) -> None:
    """Without new rows, too: the refresh would otherwise report success over a data set that cannot be read."""
    world.refresh(range(10))
    world.asked()
    (world.out / lost).unlink()
    for rows in (range(10), range(12)):
        with pytest.raises(SnapshotError, match=rf"1 files of its shards are gone \({re.escape(lost)}\)"):
            world.refresh(rows)
    assert world.asked() == []


def test_a_row_that_comes_back_is_shown_again_without_fetching(world: World) -> None:
    world.refresh(range(6))
    assert numbers(world.refresh([0, 1, 5])) == [0, 1, 5]
    world.asked()
    back = world.refresh(range(6))
    assert numbers(back) == list(range(6)) and world.asked() == [] and back.changes["restored"] == 3
    assert all(shard.selection == "" for shard in back.shards)
    # All of the second shard goes and comes back, too.
    assert numbers(world.refresh(range(4))) == list(range(4))
    assert numbers(world.refresh(range(6))) == list(range(6)) and world.asked() == []


def test_repeated_rows_are_counted_one_by_one(world: World) -> None:
    world.refresh([0, 0, 1, 1, 1])
    world.asked()
    assert numbers(world.refresh([0, 0, 0, 1])) == [0, 0, 0, 1] and world.asked() == [0]


def test_failures_are_tried_again_only_when_asked_and_worth_it(world: World) -> None:
    world.missing, world.busy = {1}, {2, 3}
    first = world.refresh(range(6))
    assert first.dropped == {"http_4xx": 1, "http_5xx": 2} and numbers(first) == [0, 4, 5]
    world.asked()
    world.busy = {3}
    assert world.refresh(range(6)) == first and world.asked() == []
    retry = Renewal(retry_failed=True)
    second = world.refresh(range(6), retry)
    assert world.asked() == [2, 3] and changes(second, kept=3, failed=1, retried=2)
    assert second.dropped == {"http_4xx": 1, "http_5xx": 1} and numbers(second) == [0, 2, 4, 5]
    # Trying in vain is work, too: the next start tries again, and the counts stay right.
    third = world.refresh(range(6), retry)
    assert world.asked() == [3] and third.dropped == second.dropped and third.digest == second.digest
    world.busy = set()
    last = world.refresh(range(6), retry)
    assert world.asked() == [3] and numbers(last) == [0, 2, 3, 4, 5] and last.dropped == {"http_4xx": 1}
    assert last.rows == 6


def test_opted_out_rows_are_hidden_and_never_fetched(world: World) -> None:
    first = world.refresh(range(8))
    world.asked()
    table = pq.read_table(world.out / "00000.parquet").to_pylist()
    lines = [world.url(0), world.url(9), hashlib.sha256(image(2)).hexdigest().upper(), table[3]["key"], "", "#x"]
    lines.append(hashlib.sha256(image(10)).hexdigest())
    second = world.refresh(range(11), world.opt_out(*lines))
    # 9 is known by its url before it is fetched, 10 only by what arrives.
    assert world.asked() == [8, 10] and numbers(second) == [1, 4, 5, 6, 7, 8]
    assert second.changes["opt_out"] == 5 and second.dropped == {"opt_out": 5}
    assert (
        world.refresh(
            range(11), Renewal(parent="latest", retry_failed=True, opt_out=str(world.list.with_name("opt-out.txt")))
        )
        == second
    )
    assert numbers(read_snapshot(first.uri)) == list(range(8))
    # Without the list, and with other captions, what was opted out stays out.
    assert world.refresh(range(11), Renewal(retry_failed=True)) == second and world.asked() == []
    said = {0: "other 0", 9: "other 9", 4: "other 4"}
    third = world.refresh(range(11), Renewal(retry_failed=True), said)
    assert world.asked() == [4] and numbers(third) == [1, 4, 5, 6, 7, 8] and third.dropped == {"opt_out": 5}
    purged = world.refresh(range(11), Renewal(purge=True), said)
    assert world.refresh(range(11), Renewal(retry_failed=True), {0: "third 0"}).digest != purged.digest
    assert world.asked() == [4] and numbers(read_snapshot(world.folder.uri)) == [1, 4, 5, 6, 7, 8]


def test_a_whole_host_and_a_prefix_opt_out(world: World) -> None:
    world.refresh(range(4))
    with pytest.raises(SnapshotError, match="no sample is left"):
        world.refresh(range(4), world.opt_out("http://127.0.0.1*"))
    assert numbers(read_snapshot(world.folder.uri)) == list(range(4))
    assert numbers(world.refresh(range(4), world.opt_out(world.url(1)[:-4] + "*"))) == [0, 2, 3]


def test_the_first_refresh_obeys_the_list(world: World) -> None:
    snapshot = world.refresh(range(6), world.opt_out(world.url(2)))
    assert world.asked() == [0, 1, 3, 4, 5] and numbers(snapshot) == [0, 1, 3, 4, 5] and snapshot.parent is None
    assert snapshot.dropped == {"opt_out": 1} and snapshot.rows == 6
    with pytest.raises(SettingError, match="--parent latest"):
        world.refresh(range(6), Renewal())


def test_an_unreadable_list_is_one_sentence(world: World) -> None:
    with pytest.raises(SettingError, match="opt_out: no such file or folder: '/no/such.txt'"):
        world.refresh(range(2), Renewal(opt_out="/no/such.txt"))
    assert world.asked() == [] and not world.out.exists()


def test_only_the_newest_snapshot_is_a_parent_and_only_of_its_own_options(world: World, tmp_path: Path) -> None:
    first = world.refresh(range(4))
    second = world.refresh(range(6), Renewal(parent=first.uri))
    # The same command again is done; another list from the same old snapshot is not.
    assert world.refresh(range(6), Renewal(parent=first.uri)) == second
    for parent, said in (
        (first.uri, "newest"),
        (f"{tmp_path}/other", "output folder"),
        (f"{first.folder}@x", "latest"),
    ):
        with pytest.raises(SettingError, match=said):
            world.refresh(range(7), Renewal(parent=parent))
    other = ShardOptions(
        media=MediaOptions(image=ImageOptions(image_size=48)), downloads=OPTIONS.downloads, number_sample_per_shard=4
    )
    with pytest.raises(SettingError, match="image_size: got 48"):
        refresh(world.source(range(6)), world.folder, other, HERE, renewal=LATEST)


def test_the_first_command_again_leaves_the_newest_snapshot_the_newest(world: World) -> None:
    first = world.refresh(range(4), Renewal())
    second = world.refresh(range(6))
    assert world.refresh(range(4), Renewal()) == first and read_snapshot(world.folder.uri) == second


def test_what_a_filter_hid_stays_hidden(world: World) -> None:
    from pipeline.shards.selection import select

    first = world.refresh(range(6))
    shards = (select(world.folder, first.shards[0], np.array([0, 2, 2])), first.shards[1])
    filtered = publish_shards(
        world.folder, shards, fields=first.fields, card=None, options=first.options, rows=6, dropped={}
    )
    world.asked()
    second = world.refresh(range(1, 7))
    assert world.asked() == [6] and numbers(second) == [2, 2, 4, 5, 6] and second.parent == filtered.id


class Killed(BaseException):
    """Stands for the power going off."""


def stopping(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Allow ``steps`` writes and deletions, then stop."""
    left = steps
    real_write, real_delete = Folder.write_atomic, Folder.delete

    def spend() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def write(self: Folder, name: str, content: bytes | Path) -> None:
        if not self.path.startswith(f"{tempfile.gettempdir()}/clipmill-"):
            spend()
        real_write(self, name, content)

    def delete(self: Folder, name: str) -> None:
        if name != LEASE and self.exists(name):  # a process that is killed does not give it back either
            spend()
        real_delete(self, name)

    monkeypatch.setattr(Folder, "write_atomic", write)
    monkeypatch.setattr(Folder, "delete", delete)


def last_of(world: World) -> Snapshot:
    return read_snapshot(world.folder.uri)


def until_done(monkeypatch: pytest.MonkeyPatch, steps: int, run: Any) -> bool:
    """Stop ``run`` after so many writes, then run it to its end; whether it was stopped."""
    with monkeypatch.context() as patch:
        stopping(patch, steps)
        try:
            run()
            stopped = False
        except Killed:
            stopped = True
    run()
    return stopped


def test_stopped_after_any_write_a_refresh_ends_in_the_same_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.busy = {3}
    first = world.refresh(range(8))
    world.busy = set()
    renewal = Renewal(parent="latest", opt_out=world.opt_out(world.url(1)).opt_out, retry_failed=True)

    def refreshed(steps: int) -> tuple[bool, dict[str, Any]]:
        world.folder = Folder(shutil.copytree(world.out, tmp_path / f"cut-{steps}"))
        stopped = until_done(
            monkeypatch, steps, lambda: world.refresh([*range(2, 13), 1], renewal, captions={6: "six 6"})
        )
        last = read_snapshot(world.folder.uri)
        assert len(snapshot_ids(world.folder)) == 2 and numbers(last) == list(range(2, 13))
        assert last.parent == first.id
        return stopped, {"bytes": shard_bytes(Path(world.folder.path)), "digest": last.digest, "changes": last.changes}

    stopped, whole = refreshed(1000)
    assert not stopped and changes(last_of(world), added=5, changed=1, removed=1, kept=4, opt_out=1, retried=1)
    steps, stopped = 0, True
    while stopped:
        stopped, cut = refreshed(steps)
        assert cut == whole, steps
        steps += 1
    assert steps > 12


def test_a_list_that_changed_before_publication_is_planned_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.refresh(range(4))
    with monkeypatch.context() as patch:
        stopping(patch, 9)  # the rows, the plan, two whole shards of three
        with pytest.raises(Killed):
            world.refresh(range(16))
    world.asked()
    snapshot = world.refresh(range(9))
    # The first new shard is the same in both plans and is kept, the second is made anew.
    assert world.asked() == [8] and numbers(snapshot) == list(range(9))
    assert {path.name for path in world.out.glob("*.tar")} == {shard.tar for shard in snapshot.shards}
    with monkeypatch.context() as patch:
        stopping(patch, 6)
        with pytest.raises(Killed):
            world.refresh(range(16))
    assert world.refresh(range(9)) == snapshot
    assert {path.name for path in world.out.glob("*.tar")} == {shard.tar for shard in snapshot.shards}


def test_a_first_refresh_goes_on_with_what_was_begun_and_follows_a_changed_list(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping(patch, 9)  # the copy of the rows, the plan, two whole shards
        with pytest.raises(Killed):
            world.refresh(range(20), Renewal())
    world.asked()
    with pytest.raises(SettingError, match="--parent latest"):
        world.refresh(range(9), Renewal())
    with monkeypatch.context() as patch:
        stopping(patch, 9)
        with pytest.raises(Killed):
            world.refresh(range(9))
    # Only what the two lists differ in is fetched: the last row of the shorter one.
    assert 0 not in world.asked()
    # An opt-out list at this point makes it another plan, and nothing of the first is left over.
    snapshot = world.refresh(range(5), world.opt_out(world.url(1)))
    assert numbers(snapshot) == [0, 2, 3, 4]
    assert {path.name for path in world.out.glob("*.tar")} == {shard.tar for shard in snapshot.shards}


def test_purge_moves_sidecars_and_keeps_repeats(world: World) -> None:
    import dataclasses

    import pyarrow as pa

    from pipeline.shards.selection import select
    from pipeline.shards.sidecar import read_sidecar, write_sidecar

    first = world.refresh(range(4))
    keys = [sample.key for sample in read_samples(world.folder, first.shards[0])]
    table = pa.table({"key": keys, "length": [0, 1, 2, 3]})
    digest = write_sidecar(world.folder, first.shards[0], "lengths", table, "a rule")
    shard = dataclasses.replace(first.shards[0], sidecars={"lengths": digest})
    shard = select(world.folder, shard, np.array([0, 2, 2]))
    plain = {"fields": first.fields, "card": None, "options": first.options, "rows": 4, "dropped": {}}
    publish_shards(world.folder, (shard,), **plain)
    purged = world.refresh(range(4), Renewal(purge=True))
    assert captions(purged) == ["number 0", "number 2", "number 2"] and purged.shards[0].stored == 2
    moved = read_sidecar(world.folder, purged.shards[0], "lengths", "x", "a rule")
    assert moved["length"].to_pylist() == [0, 2] and not (world.out / "00000.lengths.parquet").exists()
    world.asked()
    # What the filter hid is forgotten as an image, not as a row.
    assert world.refresh(range(4)) == purged and world.asked() == []


def test_purge_takes_the_bytes_from_disk(world: World) -> None:
    world.refresh(range(10))
    hidden = world.opt_out(world.url(1), world.url(4), world.url(5), world.url(6), world.url(7))
    shown = world.refresh(range(9), hidden)
    names = {shard.name for shard in shown.shards}
    purged = world.refresh(range(9), Renewal(opt_out=hidden.opt_out, purge=True))
    assert numbers(purged) == [0, 2, 3, 8] and snapshot_ids(world.folder) == [purged.id]
    assert not names & {shard.name for shard in purged.shards} and purged.changes == {"purged": 6}
    assert all(shard.selection == "" for shard in purged.shards) and not list((world.out / "_selections").glob("*"))
    stored = b"".join(path.read_bytes() for path in world.out.rglob("*.tar"))
    assert b"number 1" not in stored and b"number 9" not in stored and b"number 8" in stored
    assert {path.name for path in world.out.glob("*.tar")} >= {shard.tar for shard in purged.shards}
    # Once is enough; and what was opted out is still known, what was gone is not.
    before = listing(world.out)
    world.asked()
    assert world.refresh(range(9), Renewal(opt_out=hidden.opt_out, purge=True)) == purged
    assert listing(world.out) == before and world.refresh(range(9)) == purged and world.asked() == []
    assert numbers(world.refresh(range(10))) == [0, 2, 3, 8, 9] and world.asked() == [9]
    with pytest.raises(SettingError, match="--parent latest"):
        world.refresh(range(10), Renewal())


def test_stopped_after_any_write_a_purge_is_finished(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(image(number))
        (images / f"{number}.txt").write_text(f"number {number}")
    source = ImageFolder(folder=str(images))
    (tmp_path / "list.txt").write_text("1.jpg\n5.jpg\n4.jpg\n")

    begun = Folder(tmp_path / "begun")
    refresh(source, begun, OPTIONS, HERE)
    refresh(source, begun, OPTIONS, HERE, renewal=Renewal(opt_out=str(tmp_path / "list.txt")))

    def run_in(name: str, steps: int | None, then: Renewal) -> tuple[bool, dict[str, Any]]:
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        folder = Folder(tmp_path / name)
        purge = Renewal(opt_out=str(tmp_path / "list.txt"), purge=True)
        stopped = False
        with monkeypatch.context() as patch:
            if steps is not None:
                stopping(patch, steps)
            try:
                refresh(source, folder, OPTIONS, HERE, renewal=purge)
            except Killed:
                stopped = True
                # Readers always have a whole snapshot.
                patch.undo()
                assert numbers(read_snapshot(folder.uri)) == [0, 2, 3]
        last = refresh(source, folder, OPTIONS, HERE, renewal=then if stopped else purge)
        last = refresh(source, folder, OPTIONS, HERE, renewal=purge)
        assert snapshot_ids(folder) == [last.id] and numbers(last) == [0, 2, 3]
        left = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        return stopped, {"files": left, "bytes": shard_bytes(tmp_path / name), "digest": last.digest}

    _, whole = run_in("whole", None, LATEST)
    assert not [name for name in whole["files"] if "purge.json" in name or name.startswith("00000")]
    steps, stopped = 0, True
    while stopped:
        # Any refresh finishes the purge, not only one that is asked to purge.
        stopped, cut = run_in(f"cut-{steps}", steps, (LATEST, Renewal(purge=True))[steps % 2])
        assert cut == whole, steps
        steps += 1
    assert steps > 15


def test_images_of_a_folder_are_compared_by_their_bytes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(image(number))
        (images / f"{number}.txt").write_text(f"number {number}")
    folder, source = Folder(tmp_path / "out"), ImageFolder(folder=str(images))
    refresh(source, folder, OPTIONS, HERE)
    (images / "2.jpg").write_bytes(image(20))
    (images / "6.jpg").write_bytes(image(6))
    (images / "6.txt").write_text("number 6")
    second = refresh(source, folder, OPTIONS, HERE, renewal=LATEST)
    assert changes(second, added=1, changed=1, kept=5) and numbers(second) == list(range(7))
    plain = [json.loads(sample.fields["json"]) for sample in read_samples(folder, second.shards[-1])]
    assert [row["sha256"] for row in plain] == [hashlib.sha256(image(number)).hexdigest() for number in (20, 6)]
    assert refresh(source, folder, OPTIONS, HERE, renewal=LATEST) == second


def test_a_success_rate_under_the_floor_stops_and_goes_on_with_a_lower_one(world: World) -> None:
    world.missing, world.busy = set(range(8)) - {0}, {8}
    floor = Floor(minimum_success=0.5, minimum_success_after=8)
    with pytest.raises(TooManyFailures, match=r"12.5% of 8 rows.*http_4xx \(7\).*lower --minimum-success"):
        world.refresh(range(12), Renewal(), floor=floor)
    assert world.asked() == list(range(8)) and snapshot_ids(world.folder) == []
    snapshot = world.refresh(range(12), Renewal(), floor=Floor(minimum_success=0.1))
    assert world.asked() == [8, 9, 10, 11] and numbers(snapshot) == [0, 9, 10, 11]
    # Few rows are judged at the end.
    with pytest.raises(TooManyFailures):
        world.missing.add(12)
        world.refresh(range(13), floor=Floor(minimum_success=0.5))


def test_ray_refreshes_to_the_same_bytes(world: World, tmp_path: Path, ray_cluster: Any) -> None:
    world.refresh(range(6))
    there = Folder(tmp_path / "there")
    refresh(world.source(range(6)), there, OPTIONS, Workers())
    here = world.refresh([*range(1, 12)])
    again = refresh(world.source([*range(1, 12)]), there, OPTIONS, Workers(), renewal=LATEST)
    assert again.digest == here.digest and again.changes == here.changes and numbers(again) == list(range(1, 12))
    purged = refresh(world.source([*range(1, 12)]), there, OPTIONS, Workers(), renewal=Renewal(purge=True))
    assert purged.digest == world.refresh([*range(1, 12)], Renewal(purge=True)).digest
    assert shard_bytes(tmp_path / "there") == shard_bytes(world.out)


def test_s3_is_refreshed_and_purged(world: World, s3: str) -> None:
    there = Folder(f"{s3}/data")
    refresh(world.source(range(6)), there, OPTIONS, HERE, renewal=LATEST)
    hidden = world.opt_out(world.url(1))
    second = refresh(world.source(range(8)), there, OPTIONS, HERE, renewal=hidden)
    world.refresh(range(6))
    here = world.refresh(range(8), hidden)
    assert second.digest == here.digest and numbers(second) == [0, 2, 3, 4, 5, 6, 7]
    purged = refresh(world.source(range(8)), there, OPTIONS, HERE, renewal=Renewal(opt_out=hidden.opt_out, purge=True))
    assert numbers(purged) == numbers(here) and "00000.tar" not in there.names()
    assert refresh(world.source(range(8)), there, OPTIONS, HERE, renewal=LATEST) == purged
