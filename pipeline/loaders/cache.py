"""A local cache of remote files, shared by the processes of a node.

A file is downloaded, checked, and then renamed to its final name, so a file with its final name is complete. Processes
that need the same file wait for the first one instead of downloading it again.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DataError
from pipeline.shards.storage import BLOCK, Folder, storage_errors

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """``$CLIPMILL_CACHE``, else ``~/.cache/clipmill``."""
    return Path(os.environ.get("CLIPMILL_CACHE", "~/.cache/clipmill")).expanduser()


class FileCache:
    """Copies of remote files in ``place``, up to ``limit_bytes`` in total; deletes the least recently used first."""

    def __init__(self, place: str | Path = "", limit_bytes: int = 100 << 30) -> None:
        self.place = Path(place).expanduser() if str(place) else default_cache()
        self.limit_bytes = limit_bytes

    def fetch(self, folder: Folder, name: str, sha256: str = "") -> Path:
        """The local path of the file ``name`` of ``folder``; a local folder's own file is used in place.

        ``sha256`` is the expected digest in hex. Without one the cache compares the store's version mark (such as an
        ETag) of the file.

        Raises:
            DataError: the file is missing, or its SHA-256 differs from ``sha256``.
            StorageError: the cache's disk is full.
        """
        if folder.is_local:
            path = Path(folder.path) / name
            if not path.is_file():
                raise DataError(f"{path} is missing; make it again with the job that wrote its folder")
            return path
        target = self.place / self._name(folder, name, sha256)
        with storage_errors(str(self.place)):
            self.place.mkdir(parents=True, exist_ok=True)
        while not _touch(target):
            with self._alone(target):
                if not target.exists():
                    self._download(folder, name, sha256, target)
                    self._make_room(target)
        return target

    def _name(self, folder: Folder, name: str, sha256: str) -> str:
        if sha256:
            return f"{sha256}{Path(name).suffix}"
        try:
            folder.fs.invalidate_cache(folder.path)
            # The store's version mark (ETag): a file written again under the same name is another file.
            identity = f"{folder.join(name)} {folder.fs.ukey(folder.fs._strip_protocol(folder.join(name)))}"
        except FileNotFoundError as error:
            raise DataError(f"{folder.join(name)} is missing") from error
        return hashlib.sha256(identity.encode()).hexdigest() + Path(name).suffix

    def _download(self, folder: Folder, name: str, sha256: str, target: Path) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=self.place)
        digest = hashlib.sha256()
        try:
            with storage_errors(str(target)), os.fdopen(handle, "wb") as file, _remote(folder, name) as remote:
                while block := remote.read(8 * BLOCK):
                    digest.update(block)
                    file.write(block)
            if sha256 and digest.hexdigest() != sha256:
                raise DataError(f"{folder.join(name)} is damaged: its SHA-256 is not {sha256}")
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @contextmanager
    def _alone(self, target: Path) -> Iterator[None]:
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, newest: Path) -> None:
        # A reader that has a deleted file mapped keeps it until it closes the map.
        files = []
        for path in self.place.iterdir():
            with suppress(FileNotFoundError):  # another process makes room too
                if path.suffix != ".lock" and not path.name.startswith("."):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > self.limit_bytes and path != newest:
                path.unlink(missing_ok=True)
                total -= size
        if total > self.limit_bytes:
            logger.warning("%s alone is larger than the cache's limit of %d bytes", newest, self.limit_bytes)


def _touch(path: Path) -> bool:
    """Mark ``path`` as used now; ``False`` where it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _remote(folder: Folder, name: str) -> Iterator[BinaryIO]:
    try:
        with folder.open(name) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{folder.join(name)} is missing") from error
