"""The cores of a process in a container, read from made-up files of both versions of control groups."""

import os
from pathlib import Path

import pytest

from pipeline.stages.cores import cores, threads


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


def found(folder: Path, membership: str, files: dict[str, str]) -> int:
    for name, text in {"membership": membership, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return cores(folder / "membership", folder / "sys")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 16), ("6400000 100000", 16)],
)
def test_version_two(tmp_path: Path, limit: str, expected: int) -> None:
    assert found(tmp_path, "0::/\n", {"sys/cpu.max": limit + "\n"}) == expected


def test_version_two_with_groups_within_groups(tmp_path: Path) -> None:
    """The tightest counts; the root of a whole machine has no such file."""
    files = {"sys/kubepods/pod1/cpu.max": "300000 100000\n", "sys/kubepods/pod1/main/cpu.max": "max 100000\n"}
    assert found(tmp_path, "0::/kubepods/pod1/main\n", files) == 3


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4), ("-1", 16), ("10000", 1)])
def test_version_one(tmp_path: Path, quota: str, expected: int) -> None:
    """As Docker has it: the path in the first file is the host's, and the container sees its group as the root."""
    files = {"sys/cpu/cpu.cfs_quota_us": quota + "\n", "sys/cpu/cpu.cfs_period_us": "100000\n"}
    assert found(tmp_path, "3:cpuset:/\n2:cpu,cpuacct:/docker/0123abcd\n0::/docker/0123abcd\n", files) == expected


def test_version_one_in_its_own_group(tmp_path: Path) -> None:
    files = {"sys/cpu/a/cpu.cfs_quota_us": "150000\n", "sys/cpu/a/cpu.cfs_period_us": "50000\n"}
    assert found(tmp_path, "1:cpu:/a\n", files) == 3


def test_without_control_groups(tmp_path: Path) -> None:
    assert cores(tmp_path / "none", tmp_path) == 16
    assert found(tmp_path, "0::/nowhere\n", {}) == 16


def test_here() -> None:
    assert 1 <= cores() <= 16


@pytest.mark.parametrize(("asked", "expected"), [(None, 16), ("3", 3), ("2,1", 2), ("", 16), ("0", 16), ("many", 16)])
def test_a_users_number_of_threads_is_used(asked: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.cores.cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == expected
