"""The number of cores that this process may use: its CPU affinity, limited by its container's CPU quota.

A container's quota of CPU time does not change the number of cores that it sees. A process with more threads than its
quota is throttled: all threads stop for the rest of every period.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def cores(membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """The cores that this process may use, at least one; a quota of 2.5 cores counts as 2."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([seen, *_shares(membership, cgroups)])))


def threads() -> int:
    """CPU threads of a model that computes in this process: ``OMP_NUM_THREADS`` if it is set, else :func:`cores`."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdecimal() and int(asked) else cores()


def _shares(membership: Path, cgroups: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of their parents."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see a path that exists only on its host; the container's own group is then its visible root.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = cgroups / ("cpu" if controllers else "") / group.relative_to("/")
            share = _share_of_v1(folder) if controllers else _share_of_v2(folder)
            if share is not None:
                yield share


def _share_of_v2(folder: Path) -> float | None:
    """``cpu.max`` holds a quota or ``max``, then a period, in microseconds (kernel, admin-guide/cgroup-v2)."""
    fields = _fields(folder / "cpu.max")
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _share_of_v1(folder: Path) -> float | None:
    """The quota in microseconds, or -1, and the period (kernel, scheduler/sched-bwc)."""
    quota, period = _fields(folder / "cpu.cfs_quota_us"), _fields(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
