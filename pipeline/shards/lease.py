"""A lease on a folder: one writer at a time.

The lease is the file ``_lease``. Its holder writes a new heartbeat every few seconds. Another job watches whether the
heartbeat changes, so the clocks need not agree. A dead holder on this machine is detected at once, one on another
machine after ``SILENCE_SECONDS`` without a heartbeat. On stores without exclusive creation (S3 and disks have it) two
jobs that start at the same instant may both begin; the earlier one detects this before it publishes.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from pipeline.errors import StorageError
from pipeline.shards.storage import Folder

logger = logging.getLogger(__name__)

LEASE = "_lease"  # not .json: img2dataset reads every such file beside tars as one of its marks
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 45.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease: ``work`` names its job, ``born`` is the start of the process in seconds since 1970."""

    work: str
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    born: float = field(default_factory=lambda: psutil.Process().create_time())
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0

    def is_dead(self) -> bool:
        """Whether it was a process on this machine and has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True


class Lease:
    """A held lease."""

    def __init__(self, folder: Folder, holder: Holder) -> None:
        self._folder, self._holder = folder, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="clipmill-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``StorageError`` if another job took the lease, which it may do after a long silence."""
        found = _read(self._folder)
        if found is not None and found.name != self._holder.name:
            raise StorageError(
                f"{self._folder.uri}: {_described(found)} has taken over; this job stops, nothing is lost"
            )

    def release(self) -> None:
        """Release the lease."""
        self._ended.set()
        self._thread.join()
        found = _read(self._folder)
        if found is not None and found.name == self._holder.name:
            self._folder.delete(LEASE)
            if self._folder.is_local:
                with suppress(OSError):  # a rejected job that wrote no file leaves no folder
                    os.rmdir(self._folder.path)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                found = _read(self._folder)
                if found is not None and found.name == self._holder.name:
                    self._folder.write_atomic(LEASE, _text(replace(self._holder, beat=beat)))
            except (OSError, StorageError) as error:
                logger.warning("cannot write %s: %s", self._folder.join(LEASE), error)


@contextmanager
def lease(folder: Folder, work: str) -> Iterator[Lease]:
    """Hold the lease of ``folder`` for ``work`` ("a refresh"); does not wait for a live holder.

    Raises:
        StorageError: another job holds the lease, or the file system or store failed.
    """
    held = Lease(folder, _take(folder, Holder(work=work)))
    try:
        yield held
    finally:
        held.release()


def _take(folder: Folder, mine: Holder) -> Holder:
    while not folder.create(LEASE, _text(mine)):
        theirs = _read(folder)
        if theirs is None:
            continue  # released at this moment
        if not theirs.is_dead() and not _falls_silent(folder, theirs):
            raise StorageError(f"{folder.uri}: {_described(theirs)} is at work here; let it end, or stop it")
        logger.info("%s in %s is no more", _described(theirs), folder.uri)
        still = _read(folder)
        if still is not None and still.name == theirs.name:
            folder.delete(LEASE)
    return mine


def _falls_silent(folder: Folder, theirs: Holder) -> bool:
    """Watch the heartbeat; whether it stayed silent."""
    logger.info("%s may be at work in %s: watching for up to %.0f s", _described(theirs), folder.uri, SILENCE_SECONDS)
    until = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENCE_SECONDS / 10))
        if _read(folder) != theirs:
            return False
    return True


def _read(folder: Folder) -> Holder | None:
    try:
        plain: Any = json.loads(folder.read_bytes(LEASE))
        return Holder(**plain)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Not a lease of ours, or truncated by the store: treated as silent.
        return Holder(work="something", host="an unknown host", process=0, born=0.0, name="")


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _described(holder: Holder) -> str:
    return f"{holder.work} (process {holder.process} on {holder.host})"
