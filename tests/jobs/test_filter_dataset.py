"""The filter job as its users start it."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.config import from_json, to_json
from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.stages.filters.datacomp import UID
from tests.jobs.conftest import Type, load_job


def test_smoke_ends_with_the_funnel(job: Type, capsys):
    assert job("filter_dataset", "smoke") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "parent" and lines[1].split()[-3:] == ["64", "100.0", "%"]
    assert "near_duplicates" in lines[-2] and "samples" in lines[-1]


def test_several_filters_in_the_order_given(job: Type, make_snapshot: Callable[..., Snapshot], tmp_path, capsys):
    parent = make_snapshot(sizes=(7, 5, 8), folder=tmp_path / "data")
    (tmp_path / "entries.txt").write_text("very\nyellow\n")
    steps = ("custom", "--steps", "metaclip", "size", "length", "--entries", str(tmp_path / "entries.txt"))
    options = ("--min-side", "72", "--min-words", "6", "--processes-count", "0", "--captions-sidecar")
    assert job("filter_dataset", *steps, *options, "--data", parent.folder) == 0
    snapshot = read_snapshot(parent.folder)
    # Caption n is "a very … very COLOUR image number n" with n % 5 times "very"; every fourth is yellow.
    named = [number for number in range(20) if number % 5 or number % 4 == 3]
    assert snapshot.dropped["metaclip.no_entry"] == 20 - len(named)
    assert snapshot.samples == sum(number % 5 >= 1 for number in named)
    assert [one["name"] for one in snapshot.options["filters"]] == ["metaclip", "size", "length"]
    assert all(set(shard.sidecars) == {"captions"} for shard in snapshot.shards)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:5]] == ["parent", "metaclip", "size", "length"]


def test_uid_lists_out(job: Type, make_snapshot: Callable[..., Snapshot], tmp_path):
    parent = make_snapshot(sizes=(3, 2), folder=tmp_path / "data")
    place = str(tmp_path / "uids.npy")
    # The images' numbers stand in for uids: 0 to 4, as hex.
    arguments = ("--data", parent.folder, "--write-uids", place, "--uid-column", "number", "--processes-count", "0")
    assert job("filter_dataset", "custom", "--steps", "length", "--min-words", "1", *arguments) == 0
    assert np.load(place).tolist() == np.array([(0, number) for number in range(5)], UID).tolist()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["laion"], "data: nothing given"),
        (["laion", "--data", "/no/such"], "has no snapshot"),
        (["custom", "--data", "DATA"], "steps: nothing given"),
        (["custom", "--data", "DATA", "--steps", "lenght"], "--steps: got 'lenght'"),
        (["metaclip", "--data", "DATA", "--entries", "/no/such"], "--entries: no such file or folder: '/no/such'"),
        (["laion", "--data", "DATA", "--processes-count", "0"], "jobs/embed_dataset.py"),
        (["datacomp-basic", "--data", "DATA", "--max-aspect", "0"], "--max-aspect: got 0"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments, said, job: Type, make_snapshot: Callable[..., Snapshot], tmp_path, capsys
):
    parent = make_snapshot(sizes=(2,), folder=tmp_path / "data")
    code = job("filter_dataset", *[parent.folder if part == "DATA" else part for part in arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code in (1, 2) and error.startswith("error: ") and said in error


def test_presets_are_plain_json():
    for _, preset in load_job("filter_dataset")["PRESETS"].values():
        assert from_json(type(preset), to_json(preset)) == preset
