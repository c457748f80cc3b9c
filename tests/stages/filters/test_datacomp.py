"""DataComp's uid lists: repeats repeat samples, and an exported list has the visible samples."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, SettingError
from pipeline.shards.selection import read_samples
from pipeline.shards.snapshot import Snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.filters.datacomp import UID, UidList, bisect, parse_uids, write_uids
from pipeline.stages.filters.length import Length
from pipeline.stages.filters.run import filter_snapshot
from pipeline.stages.shard_tasks import Workers

HERE = Workers(processes_count=0)


def uid(number: int) -> str:
    return np.random.default_rng(number).bytes(16).hex()


def as_list(texts: list[str]) -> np.ndarray:
    return np.array(sorted((int(text[:16], 16), int(text[16:], 16)) for text in texts), UID)


def captions_seen(snapshot: Snapshot) -> list[str]:
    folder = Folder(snapshot.folder)
    return [one.fields["txt"].decode() for shard in snapshot.shards for one in read_samples(folder, shard)]


def test_bisect_is_pythons():
    random = np.random.default_rng(0)
    listed = as_list([f"{random.integers(0, 3):016x}{random.integers(0, 5):016x}" for _ in range(40)])
    wanted = parse_uids([f"{high:016x}{low:016x}" for high in range(4) for low in range(6)])
    pairs, sought = listed.tolist(), wanted.tolist()
    assert bisect(listed, wanted).tolist() == [sum(pair < one for pair in pairs) for one in sought]
    assert bisect(listed, wanted, right=True).tolist() == [sum(pair <= one for pair in pairs) for one in sought]
    assert bisect(listed[:0], wanted).tolist() == [0] * 24


def test_a_list_goes_in_and_comes_out(make_data: Any, tmp_path):
    uids = [uid(number) for number in range(10)]
    times = {0: 1, 3: 2, 4: 1, 9: 3}
    wanted = as_list([uids[number] for number, count in times.items() for _ in range(count)] + [uid(99)])
    np.save(tmp_path / "wanted.npy", wanted)
    snapshot = make_data([f"caption number {number}" for number in range(10)], columns={"uid": uids}, per_shard=4)
    outcome = filter_snapshot(snapshot, [UidList(uids=str(tmp_path / "wanted.npy"))], HERE)
    assert Counter(captions_seen(outcome.snapshot)) == {f"caption number {n}": count for n, count in times.items()}
    assert outcome.snapshot.samples == 7 and outcome.dropped == {"uids.not_listed": 6}
    assert outcome.snapshot.changes == {"kept": 4, "removed": 6, "added": 3}
    for rows in (1_000, 2):
        assert write_uids(outcome.snapshot, str(tmp_path / "out.npy"), range_rows=rows) == 7
        written = np.load(tmp_path / "out.npy")
        assert written.dtype == UID and written.tolist() == [pair for pair in wanted.tolist() if pair != wanted_extra()]


def wanted_extra() -> tuple[int, int]:
    return as_list([uid(99)]).tolist()[0]


def test_repeats_survive_later_filters_and_later_runs(make_data: Any, tmp_path):
    uids = [uid(number) for number in range(4)]
    np.save(tmp_path / "wanted.npy", as_list([uids[0], uids[0], uids[1], uids[2], uids[2]]))
    snapshot = make_data(
        ["a long caption", "short", "another long caption", "not listed at all"], columns={"uid": uids}
    )
    outcome = filter_snapshot(snapshot, [UidList(uids=str(tmp_path / "wanted.npy")), Length()], HERE)
    assert captions_seen(outcome.snapshot) == ["a long caption"] * 2 + ["another long caption"] * 2
    again = filter_snapshot(outcome.snapshot, [Length(min_characters=16)], HERE)
    assert captions_seen(again.snapshot) == ["another long caption"] * 2


def test_lists_that_are_none_are_refused(make_data: Any, tmp_path):
    snapshot = make_data(["a"], columns={"uid": [uid(0)]})
    np.save(tmp_path / "wrong.npy", np.zeros(3))
    np.save(tmp_path / "unsorted.npy", as_list([uid(0), uid(1)])[::-1])
    for file, allowed in (("wrong.npy", "u8,u8"), ("unsorted.npy", "sorted"), ("none.npy", "no such file")):
        with pytest.raises(SettingError, match=f"uids: .*{allowed}"):
            filter_snapshot(snapshot, [UidList(uids=str(tmp_path / file))], HERE)


@pytest.mark.parametrize("text", ["xyz", None, "-1", "f" * 33])
def test_what_is_no_uid_is_named(text):
    with pytest.raises(DataError, match="is not a uid"):
        parse_uids([text])
