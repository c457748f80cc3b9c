"""Images in object stores and on local disks, for tables with such urls.

Stores and files are read only where the options allow it: an untrusted table must not use our credentials to read a
bucket or file that its author cannot. A store is allowed by its scheme (``s3``: every bucket) or by a prefix
(``s3://bucket/images``); local files by one folder. Symbolic links cannot leave that folder.
"""

import functools
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from pipeline.config import require
from pipeline.shards.storage import store_options
from pipeline.stages.crawl.failure import Failure, http_failure

THREADS = 64
_PLACE = re.compile(r"([a-z][a-z0-9+.\-]*)://([^/?#:@]+)(?:/(.*))?", re.DOTALL)
# These read local files or the web under other schemes, or wrap another file system.
_NO_STORES = frozenset({"", "file", "local", "http", "https", "ftp", "sftp", "ssh", "smb", "data", "generic", "dir"})


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete file. ``etag`` and ``last_modified`` are the store's, if it has them."""

    body: bytes
    etag: str | None
    last_modified: str | None


class Stores:
    """Reads urls of stores and local files allowed by ``allow_stores`` and ``allow_local_root``.

    Raises:
        SettingError: an entry that is not a store, or a root that is not a folder.
    """

    def __init__(self, allow_stores: tuple[str, ...], allow_local_root: str | None, max_bytes: int) -> None:
        self._places = tuple(_place(entry) for entry in allow_stores)
        self._schemes = {scheme for scheme, _ in self._places}
        self._root = None if allow_local_root is None else _root(allow_local_root)
        self._most = max_bytes

    def serve(self, text: str) -> bool:
        """Whether ``text`` is a url of an allowed kind; :meth:`read` checks whether this url is allowed."""
        scheme, mark, _ = text.partition("://")
        if not mark:
            return self._root is not None and ":" not in text.partition("/")[0] and text.strip() != ""
        return scheme.lower() in self._schemes or (self._root is not None and scheme.lower() == "file")

    def host(self, text: str) -> str:
        """The key of rate limits: the bucket, or the disk."""
        return "/".join(text.split("/")[:3]) if "://" in text else "file://"

    def read(self, text: str, seconds: float) -> Stored:
        """The file at ``text``; ``seconds`` is the time-out of one request to a store.

        Raises:
            Failure: as for a download; "policy" for a url that is not allowed, "missing" for a missing file.
        """
        scheme = text.partition("://")[0].lower() if "://" in text else "file"
        if scheme == "file":
            return self._read_local(text)
        return self._read_store(scheme, text, seconds)

    def _read_local(self, text: str) -> Stored:
        assert self._root is not None
        path = unquote(text[7:].removeprefix("localhost")) if "://" in text else text
        try:
            handle = _open_below(self._root, path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Failure("missing", "no such file") from error
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            raise Failure("policy", "not a file that may be read") from error
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(handle)
            if about.st_size > self._most:
                raise Failure("too_large", "body too large")
            body = file.read(self._most)
        return Stored(body, f'"{about.st_mtime_ns:x}-{about.st_size:x}"', None)

    def _read_store(self, scheme: str, text: str, seconds: float) -> Stored:
        path = self._path(scheme, text)
        try:
            fs = fsspec.filesystem(scheme, **store_options(scheme, seconds))
            about = fs.info(path)
            size = int(about.get("size") or 0)
            if about.get("type") == "directory":
                raise FileNotFoundError(path)
            if size > self._most:
                raise Failure("too_large", "body too large")
            body: bytes = fs.cat_file(path, start=0, end=size) if size else b""
        except Failure:
            raise
        except Exception as error:
            # The sample boundary: every store has its own family of exceptions.
            raise _classify(error) from error
        if len(body) != size:
            raise Failure("short_read", "incomplete body")
        return Stored(body, _text(about, "ETag", "etag"), _text(about, "LastModified", "updated", "mtime"))

    def _path(self, scheme: str, text: str) -> str:
        match = _PLACE.fullmatch(scheme + text[len(scheme) :].strip())
        if match is None or not match[3] or "::" in text or ".." in match[3].split("/"):
            raise Failure("bad_url", "not a url")
        path = f"{match[2]}/{match[3]}"
        if not any(scheme == opened and f"{path}/".startswith(prefix) for opened, prefix in self._places):
            raise Failure("policy", "refused: not a store that was opened")
        return path


@functools.cache
def store_threads() -> ThreadPoolExecutor:
    """The thread pool of this process for stores and disks."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="store")


def _place(entry: str) -> tuple[str, str]:
    """Scheme and prefix (ending in "/", empty for all) of an entry of ``allow_stores``."""
    allowed = "a scheme of fsspec such as s3 or gs, or a prefix such as s3://bucket/images"
    scheme, mark, rest = entry.strip().partition("://")
    scheme = scheme.lower()
    known = scheme in fsspec.available_protocols() and scheme not in _NO_STORES
    require(known and "::" not in entry, "allow_stores", entry, allowed)
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        require(False, "allow_stores", entry, f"a scheme whose package is installed ({error})")
    return scheme, f"{rest.strip('/')}/" if mark and rest.strip("/") else ""


def _root(folder: str) -> Path:
    root = Path(folder).expanduser()
    require(root.is_dir(), "allow_local_root", folder, "a folder")
    resolved = root.resolve()
    require(resolved != Path("/"), "allow_local_root", folder, "a folder other than /")
    return resolved


def _open_below(root: Path, path: str) -> int:
    """A descriptor of the regular file at ``path`` (absolute, or relative to ``root``), which must be in ``root``."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise PermissionError("outside the root")
    resolved = resolved.resolve(strict=True)
    # Without following links and without blocking: a pipe without a writer must not hang the worker.
    handle = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    opened = os.fstat(handle)
    # A folder may have been moved between the two steps: check that the opened file is the checked one.
    again = resolved.resolve()
    if stat.S_ISREG(opened.st_mode) and again.is_relative_to(root) and os.path.samestat(opened, os.stat(again)):
        return handle
    os.close(handle)
    raise PermissionError("not a regular file below the root")


def _text(about: Mapping[str, Any], *names: str) -> str | None:
    value = next((about[name] for name in names if about.get(name)), None)
    return None if value is None else str(value)


def _classify(error: Exception) -> Failure:
    status = _http_status(error)
    if status is not None:
        return http_failure(status)
    match error:
        case FileNotFoundError():
            return http_failure(404)
        case PermissionError():
            return http_failure(403)
        case TimeoutError():
            return Failure("timeout", "timed out")
        case ConnectionError():
            return Failure("reset", "connection reset")
    name = type(error).__name__
    if "Credentials" in name:
        return http_failure(403)
    if "Timeout" in name:
        return Failure("timeout", "timed out")
    if "Connect" in name:
        return Failure("connect", "connection failed")
    return Failure("store", f"the store failed ({name})")


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of botocore or gcsfs, or in one that it caused."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) and status >= 400 else None
        error = error.__cause__
    return None
