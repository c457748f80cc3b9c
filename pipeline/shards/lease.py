"""One writer at a time: a job that changes a folder holds its lease while it works.

The lease is the file ``_lease``. Its holder writes a new beat into it every few seconds; whoever finds it watches
whether the beat changes, which needs no clocks that agree. A holder that died on this machine is known at once, any
other after ``SILENCE_SECONDS`` without a beat. Stores that cannot refuse to overwrite (S3 and disks can) let two jobs
that start in the same instant both begin; the later one is noticed by the earlier one before it publishes.
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

LEASE = "_lease"  # not .json: img2dataset takes every such file beside tars for a mark of its own
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 45.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease: ``work`` is what for, ``born`` the start of the process in seconds since 1970."""

    work: str
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    born: float = field(default_factory=lambda: psutil.Process().create_time())
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0

    def is_dead(self) -> bool:
        """Whether it was on this machine and is no more."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True


class Lease:
    """A lease that is held."""

    def __init__(self, folder: Folder, holder: Holder) -> None:
        self._folder, self._holder = folder, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="clipmill-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``StorageError`` if another job has taken the lease meanwhile, as it may after a long silence."""
        found = _read(self._folder)
        if found is not None and found.name != self._holder.name:
            raise StorageError(
                f"{self._folder.uri}: {_described(found)} has taken over; this job stops, nothing is lost"
            )

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        self._thread.join()
        found = _read(self._folder)
        if found is not None and found.name == self._holder.name:
            self._folder.delete(LEASE)
            if self._folder.is_local:
                with suppress(OSError):  # a job that was refused before it wrote anything leaves no folder
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
    """Hold the lease of ``folder`` for ``work`` ("a refresh"); waits for no one who is alive.

    Raises:
        StorageError: another job is at work there, or the store refused.
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
            continue  # given back this moment
        if not theirs.is_dead() and not _falls_silent(folder, theirs):
            raise StorageError(f"{folder.uri}: {_described(theirs)} is at work here; let it end, or stop it")
        logger.info("%s in %s is no more", _described(theirs), folder.uri)
        still = _read(folder)
        if still is not None and still.name == theirs.name:
            folder.delete(LEASE)
    return mine


def _falls_silent(folder: Folder, theirs: Holder) -> bool:
    """Watch for a beat; whether there was none for a while."""
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
        # Not ours, or cut short by a store that does: as good as silent.
        return Holder(work="something", host="an unknown host", process=0, born=0.0, name="")


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _described(holder: Holder) -> str:
    return f"{holder.work} (process {holder.process} on {holder.host})"
