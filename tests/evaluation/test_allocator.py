"""Memory that a worker keeps."""

import ctypes
import subprocess
import sys

import pytest

from pipeline.evaluation.allocator import keep_freed_memory

CODE = """
import resource, sys
from pipeline.evaluation.allocator import keep_freed_memory
applies = sys.argv[1] == "kept" and keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    b"x" * (40 << 20)
print(applies, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    """Whether memory is kept, and page faults of ten blocks, each freed before the next one."""
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    applies, count = done.stdout.split()
    return applies == "True", int(count)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_a_freed_block_needs_no_new_pages() -> None:
    applies, kept = faults("kept")
    assert applies and kept < faults("plain")[1] / 4


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
