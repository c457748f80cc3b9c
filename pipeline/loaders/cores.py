"""How many cores this process may use: those it may run on, and no more than its container's share of time.

A container is limited by a quota of CPU time in each period, which says nothing about the cores that it sees. With more
threads than its share, all of them are stopped for the rest of every period.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def cores(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """The cores that this process may use, at least one; a share of 2.5 cores counts as 2."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([seen, *_shares(membership, cgroups)])))


def _shares(membership: Path, cgroups: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of those that they are in."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may be told a path that exists outside of it alone; its own group is then the root that it sees.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = cgroups / ("cpu" if controllers else "") / group.relative_to("/")
            share = _share_of_v1(folder) if controllers else _share_of_v2(folder)
            if share is not None:
                yield share


def _share_of_v2(folder: Path) -> float | None:
    """``cpu.max`` holds microseconds, or max, in a period of so many (kernel, admin-guide/cgroup-v2)."""
    words = _words(folder / "cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _share_of_v1(folder: Path) -> float | None:
    """Microseconds, or -1, and the period (kernel, scheduler/sched-bwc)."""
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
