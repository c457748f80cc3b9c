"""A lease on a folder: one writer at a time.

``_lease`` names its holder. The holder writes a new heartbeat, ``_lease.beat``, every few seconds. Another job watches
whether the heartbeat changes, so the clocks need not agree. A dead holder on this machine is detected at once, one on
another machine after ``SILENCE_SECONDS`` without a heartbeat.

A suspended holder (a closed laptop, a frozen virtual machine) looks dead, too. So whoever holds a lease writes through
:attr:`Lease.folder`, which reads ``_lease`` before every write, in every process: the suspended job stops when it
continues. A training, which writes often, asks through :class:`SpacedGuard`. What a dead holder left half written is
deleted at the start.

To take over the lease of X, a job first creates the claim ``_lease-X``: of several jobs that find the same dead holder,
one succeeds. A claim is a lease itself, so that of a dead job is taken over in the same way. On stores without
exclusive creation (S3 and disks have it) two jobs that start at the same instant may both begin; the earlier one
detects this before its next write.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

import psutil

from pipeline.config import from_plain, parse_json, require
from pipeline.errors import LeaseLost, StorageError
from pipeline.shards.storage import Folder, Guard, storage_errors

logger = logging.getLogger(__name__)

LEASE = "_lease"  # not .json: img2dataset reads every such file beside tars as one of its marks
BEAT = "_lease.beat"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 45.0
SPACE_SECONDS = 20.0  # less than a silence without its first beat: until then nobody else can have the lease


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease: ``work`` names its job, ``born`` is the start of the process in seconds since 1970."""

    work: str
    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    born: float = field(default_factory=lambda: psutil.Process().create_time())
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        require(0 <= self.process < 2**31, "process", self.process, "a process number")
        require(self.name.isascii() and self.name.isalnum(), "name", self.name, "letters and digits")

    def is_dead(self) -> bool:
        """Whether it was a process on this machine and has ended."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class LeaseGuard:
    """Checks that the lease of ``folder`` still belongs to the holder called ``name``."""

    folder: Folder
    name: str

    def holds(self) -> bool:
        """Whether the lease is still this holder's."""
        found = _read(self.folder, LEASE)
        return found is not None and found.name == self.name

    def check(self) -> None:
        """Raise ``LeaseLost`` if another job took the lease, which it may do after a long silence."""
        if not self.holds():
            found = _read(self.folder, LEASE)
            other = "another job" if found is None else _described(found)
            raise LeaseLost(
                f"{self.folder.uri}: {other} has taken over, since this job was silent for long; this job stops, "
                "nothing is lost; run the same command to continue"
            )


class SpacedGuard:
    """Asks another guard, but not within ``SPACE_SECONDS`` of its last permission; for jobs that write often.

    A suspension that costs a job its lease is longer, and the clock of the machine counts it.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard, self._asked = guard, 0.0

    def __reduce__(self) -> tuple[type["SpacedGuard"], tuple[Guard]]:
        return SpacedGuard, (self._guard,)  # another machine has another clock

    def check(self) -> None:
        """Raise ``LeaseLost`` if another job took the lease, ``StorageError`` if the store does not answer."""
        now = time.time()
        if abs(now - self._asked) >= SPACE_SECONDS:
            self._guard.check()
            self._asked = now


class Lease:
    """A held lease. Write through ``folder``, which refuses when another job has taken the lease."""

    def __init__(self, folder: Folder, holder: Holder) -> None:
        self._plain, self._holder = folder, holder
        self._guard = LeaseGuard(folder, holder.name)
        self.folder = Folder(folder.uri, self._guard)
        self.spaced = SpacedGuard(self._guard)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="clipmill-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``LeaseLost`` if another job took the lease."""
        self._guard.check()

    def release(self) -> None:
        """Delete what killed workers left half written, and release the lease; does nothing if it is lost."""
        self._ended.set()
        self._thread.join()
        if not self._guard.holds():
            return
        self._plain.remove_temporary()
        self._plain.delete(BEAT)
        self._plain.delete(LEASE)
        if self._plain.is_local:
            with suppress(OSError):  # a rejected job that wrote no file leaves no folder
                os.rmdir(self._plain.path)

    def _beat(self) -> None:
        # A file of its own: a beat that was suspended in the middle does not overwrite the next holder's lease.
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if not self._guard.holds():
                    return  # the job's next write says so
                self._plain.write_atomic(BEAT, f"{self._holder.name} {beat}".encode())
            except (OSError, StorageError) as error:
                logger.warning("no heartbeat in %s: %s", self._plain.join(BEAT), error)


@contextmanager
def lease(folder: Folder, work: str) -> Iterator[Lease]:
    """Hold the lease of ``folder`` for ``work`` ("a refresh"); does not wait for a live holder.

    Raises:
        StorageError: another job holds the lease, or the file system or store failed.
    """
    mine = Holder(work=work)
    if _take(folder, LEASE, mine):
        _delete_claims(folder)
    folder.remove_temporary()
    held = Lease(folder, mine)
    try:
        yield held
    finally:
        held.release()


def _take(folder: Folder, file: str, mine: Holder) -> bool:
    """Make ``mine`` the holder in ``file``; returns whether a dead one was there."""
    while not folder.create(file, _text(mine)):
        theirs = _read(folder, file)
        if theirs is None:
            continue  # released at this moment
        if not theirs.is_dead() and not _falls_silent(folder, file, theirs):
            raise StorageError(f"{folder.uri}: {_described(theirs)} is at work here; let it end, or stop it")
        logger.info("%s in %s is no more", _described(theirs), folder.uri)
        claim = f"{LEASE}-{theirs.name}"
        _take(folder, claim, mine)
        try:
            if _read(folder, file) == theirs:
                folder.write_atomic(file, _text(mine))
                return True
        finally:
            folder.delete(claim)
    return False


def _delete_claims(folder: Folder) -> None:
    """Delete the claims of jobs that died while they took over; nobody needs the claim to a lease that has ended."""
    for name in folder.names():
        if name.startswith(f"{LEASE}-"):
            folder.delete(name)


def _falls_silent(folder: Folder, file: str, theirs: Holder) -> bool:
    """Watch the heartbeat; whether it stayed silent."""
    logger.info("%s may be at work in %s: watching for up to %.0f s", _described(theirs), folder.uri, SILENCE_SECONDS)
    beat = _content(folder, BEAT)
    until = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENCE_SECONDS / 10))
        if _read(folder, file) != theirs or _content(folder, BEAT) != beat:
            return False
    return True


def _read(folder: Folder, file: str) -> Holder | None:
    content = _content(folder, file)
    if content is None:
        return None
    try:
        return from_plain(Holder, parse_json(content), file)
    except ValueError:
        # Not a lease of ours, or truncated by the store: treated as silent.
        name = hashlib.sha256(content).hexdigest()
        return Holder(work="something", host="an unknown host", process=0, born=0.0, name=name)


def _content(folder: Folder, file: str) -> bytes | None:
    with storage_errors(folder.join(file)):
        try:
            return folder.read_bytes(file)
        except FileNotFoundError:
            return None


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _described(holder: Holder) -> str:
    return f"{holder.work} (process {holder.process} on {holder.host})"
