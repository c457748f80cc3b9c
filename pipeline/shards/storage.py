"""Access to local and remote files: a folder with whole-file reads and atomic writes.

A write leaves either the complete file or none. On a local disk it uses a temporary name, ``fsync`` and a rename; on an
object store a put is atomic. So readers never see a partial file.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import fsspec

from pipeline.errors import ClipmillError, ReadError, StorageError

BLOCK = 1 << 20
TEMPORARY = ".tmp-"
SWEPT = 5  # attempts at a small write whose temporary file the next holder of a lease may delete
S3_ATTEMPTS = 10
# The optional dependencies of pyproject.toml, and the schemes that need them.
EXTRAS = {"gcs": ("gs", "gcs"), "azure": ("az", "abfs", "abfss", "adl")}
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",
    errno.EFBIG: "the file is longer than the disk or a limit of this process (ulimit -f) allows",
}
# Packages whose exceptions are those of a store.
_POSSIBLE = "a path, s3://, gs:// or az:// is possible"
_CLIENTS = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "s3fs",
    "gcsfs",
    "google",
    "adlfs",
    "azure",
    "requests",
    "urllib3",
    "httpx",
    "huggingface_hub",
)


class Guard(Protocol):
    """Permission to write, asked before every write; picklable."""

    def check(self) -> None:
        """Raise ``StorageError`` if the permission is lost."""
        ...


class Folder:
    """A folder at a local path or any fsspec URI (``s3://bucket/path``, ``memory://path``).

    ``uri`` is the form for users, ``path`` the form for the file system ``fs``. Nothing is created until the first
    write. Picklable, so a worker on another node opens the same folder. Every method that reads raises ``ReadError``
    where the disk or store refuses. With a ``guard``, every write and deletion here and in the folders below asks it
    first (see ``lease.py``).
    """

    def __init__(self, uri: str | Path, guard: Guard | None = None) -> None:
        text = str(uri)
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        self.uri = text.rstrip("/") or "/"
        self.fs, self.path = file_system(self.uri)
        self.is_local = self.fs.protocol in ("file", "local", ("file", "local"))
        self.guard = guard

    def __reduce__(self) -> tuple[type["Folder"], tuple[str, Guard | None]]:
        return Folder, (self.uri, self.guard)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def join(self, name: str) -> str:
        """The URI of ``name`` in this folder."""
        return f"{self.uri}/{name}"

    def folder(self, name: str) -> "Folder":
        """The folder ``name`` below this one, with the same guard."""
        return Folder(self.join(name), self.guard)

    def check(self) -> None:
        """Raise ``StorageError`` if the guard no longer permits writes."""
        if self.guard is not None:
            self.guard.check()

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the files directly in this folder that end in ``suffix``, without temporary files."""
        try:
            with read_errors(self.uri):
                self.fs.invalidate_cache(self.path)
                entries = self.fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith(TEMPORARY))

    def exists(self, name: str) -> bool:
        """Whether the file or folder ``name`` exists."""
        with read_errors(self.join(name)):
            self.fs.invalidate_cache(self.path)
            return bool(self.fs.exists(self._at(name)))

    def size(self, name: str) -> int:
        """Size of the file ``name`` in bytes; raises ``FileNotFoundError``."""
        with read_errors(self.join(name)):
            return int(self.fs.size(self._at(name)))

    def info(self, name: str) -> dict[str, Any]:
        """fsspec's facts about the file ``name``; raises ``FileNotFoundError``."""
        with read_errors(self.join(name)):
            return dict(self.fs.info(self._at(name)))

    def kind(self) -> Literal["file", "directory"] | None:
        """Whether ``uri`` is a folder or, after all, a file; ``None`` where there is neither."""
        # info() asks a store for the object first; isdir() would list, which public buckets often do not allow.
        try:
            with read_errors(self.uri):
                self.fs.invalidate_cache(self.path)  # the hub's asks the hub
                return "directory" if self.fs.info(self.path)["type"] == "directory" else "file"
        except (FileNotFoundError, NotADirectoryError):
            return None

    def find(self, depth: int | None = None) -> dict[str, dict[str, Any]]:
        """fsspec's facts about the files below this folder, up to ``depth`` levels, by path relative to it, sorted."""
        with read_errors(self.uri):
            found = self.fs.find(self.path, maxdepth=depth, detail=True)
        files = {str(path)[len(self.path) :].lstrip("/"): found[path] for path in sorted(found)}
        # Consoles of object stores make empty objects in place of folders.
        return {name: info for name, info in files.items() if name and not name.endswith("/")}

    def open(self, name: str) -> BinaryIO:
        """The file ``name`` for binary reading; raises ``FileNotFoundError``."""
        with read_errors(self.join(name)):
            opened: BinaryIO = self.fs.open(self._at(name), "rb")
        return opened

    def read_bytes(self, name: str) -> bytes:
        """The whole file ``name``; raises ``FileNotFoundError``."""
        with read_errors(self.join(name)):
            content: bytes = self.fs.cat_file(self._at(name))
        return content

    def digest(self, name: str) -> str:
        """SHA-256 (hex) of a file, which is read in parts."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # fsspec's are such files

    def read_text(self, name: str) -> str:
        """The whole file ``name`` as UTF-8 text, without the byte-order mark that Windows' editors write."""
        return self.read_bytes(name).decode("utf-8-sig")

    def write_atomic(self, name: str, content: bytes | Path) -> None:
        """Write ``content`` (bytes, or the path of a local file, which is moved or uploaded) as ``name``.

        Raises:
            StorageError: the disk is full, the store failed, or the guard refused; no partial file is left under
                ``name``.
        """
        self.check()
        with storage_errors(self.join(name)):
            if self.is_local:
                self._write_local(name, content)
            elif isinstance(content, Path):
                self.fs.put_file(str(content), self._at(name))
                content.unlink()
            else:
                self.fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Create the file ``name`` unless it exists; returns whether this call wrote it.

        On local disks and S3 exactly one of several concurrent callers succeeds.

        Raises:
            StorageError: the disk is full or the store failed.
        """
        self.check()
        with storage_errors(self.join(name)):
            try:
                if self.is_local:
                    _place(Path(self._at(name)), content, os.link)  # atomic, and never replaces an existing file
                else:
                    self.fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        """Delete the file ``name``, if it exists."""
        self.check()
        try:
            self.fs.rm_file(self._at(name))
        except FileNotFoundError:
            pass

    def delete_folder(self, name: str) -> None:
        """Delete the folder ``name`` below this one with all its files, if it exists."""
        self.check()
        try:
            self.fs.rm(self._at(name), recursive=True)
        except FileNotFoundError:
            pass

    def remove_temporary(self) -> None:
        """Delete temporary files of killed local writers, also those in the folders of records (``_snapshots``, …)."""
        if not self.is_local:
            return
        self.check()
        for place, folders, files in os.walk(self.path):
            if place == self.path:
                folders[:] = [name for name in folders if name.startswith("_")]
            for name in files:
                if name.startswith(TEMPORARY):
                    Path(place, name).unlink(missing_ok=True)

    @contextmanager
    def scratch_file(self, suffix: str = "") -> Iterator[Path]:
        """A new local file to fill and pass to :meth:`write_atomic`.

        For a local folder it is in the folder itself, so that the final rename stays on one disk. It is deleted at the
        end unless it was moved.
        """
        self.check()
        place = None
        if self.is_local:
            with storage_errors(self.uri):
                os.makedirs(self.path, exist_ok=True)
            place = self.path
        with storage_errors(self.uri):
            handle, path = tempfile.mkstemp(prefix=TEMPORARY, suffix=suffix, dir=place)
            os.close(handle)
        try:
            yield Path(path)
        finally:
            Path(path).unlink(missing_ok=True)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def _write_local(self, name: str, content: bytes | Path) -> None:
        target = Path(self._at(name))
        if isinstance(content, bytes):
            _place(target, content, os.replace)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(content, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(content, 0o644)
        os.replace(content, target)


def _place(target: Path, content: bytes, finish: Callable[[Path, Path], None]) -> None:
    """Write ``content`` to a temporary file, and ``finish`` it as ``target``; repeats if another job deletes the file.

    The next holder of a folder's lease deletes temporary files, also those of jobs that only ask for the lease.
    """
    for attempt in range(1, SWEPT + 1):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            finish(temporary, target)
            return
        except FileNotFoundError:
            if attempt == SWEPT:
                raise
        finally:
            temporary.unlink(missing_ok=True)


def split_file(place: str) -> tuple[Folder, str]:
    """The folder and the name of the file at ``place``, an absolute or relative path or an fsspec URI."""
    folder, _, name = place.rpartition("/")
    return Folder(folder or ("/" if place.startswith("/") else ".")), name


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the local file at ``path``."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(info: Mapping[str, Any]) -> str:
    """Size and modification time or ETag of a file, from fsspec's ``info``."""
    changed = next(
        (info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if name in info),
        "",
    )
    return f"{info.get('size', '')}/{changed}"


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Convert the errors of disks and object stores to :class:`StorageError`, with the path."""
    try:
        yield
    except Exception as error:  # stores' errors share no base; ``_reason`` tells them from others
        reason = _reason(error)
        if reason is None:
            raise
        raise StorageError(f"cannot write {place}: {reason}; fix this and run the same command again") from error


@contextmanager
def read_errors(place: str) -> Iterator[None]:
    """Convert the errors of disks and object stores to :class:`ReadError`, with the path; not ``FileNotFoundError``."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:  # as in ``storage_errors``
        reason = _reason(error)
        if reason is None:
            raise
        raise ReadError(f"cannot read {place}: {reason}") from error


def _reason(error: Exception) -> str | None:
    """The likely cause of the error of a disk or store; ``None`` for any other error.

    The errors of the stores' clients do not share a base with ``OSError``, and importing the clients only to name them
    costs 0.3 s.
    """
    if isinstance(error, ClipmillError):
        return None  # says its reason already
    if isinstance(error, NotImplementedError):
        return "its kind of store cannot list or read that"
    name, client = type(error).__name__, type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and client not in _CLIENTS:
        return None
    said = " ".join(str(error).split()) or repr(error)
    if "Credential" in name or "Token" in name or "Authentication" in name:
        return f"no credentials for this store ({said})"
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    if isinstance(error, PermissionError):
        return f"access denied ({said})"
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return f"no answer in time ({said})"
    if isinstance(error, ConnectionError) or "Connect" in name or "ProxyError" in name:
        return f"no connection, or it was refused ({said})"
    return said


def store_options(scheme: str, seconds: float = 60.0) -> dict[str, Any]:
    """Options for fsspec's file system of ``scheme``, with more retries than its defaults.

    S3 requests are retried (throttling, 5xx, broken connections) for about a minute and a half; botocore's own
    environment variables take precedence. ``seconds`` is the time-out of one request.
    """
    if scheme not in ("s3", "s3a"):
        return {}
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", S3_ATTEMPTS))
    retries = {"mode": os.environ.get("AWS_RETRY_MODE", "standard"), "total_max_attempts": attempts}
    return {"config_kwargs": {"retries": retries, "connect_timeout": min(10.0, seconds), "read_timeout": seconds}}


def file_system(uri: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URI, and the path there.

    Raises:
        StorageError: an unknown scheme, or one whose package is not installed.
    """
    scheme = uri.partition("://")[0] if "://" in uri and "::" not in uri else ""
    try:
        fs, path = fsspec.core.url_to_fs(uri, **store_options(scheme))
    except ImportError as error:
        extra = next((name for name, schemes in EXTRAS.items() if scheme in schemes), "")
        remedy = f'pip install "clipmill[{extra}]"' if extra else str(error)
        raise StorageError(f"{uri}: {scheme}:// needs another package: {remedy}") from error
    except ValueError as error:
        if scheme in fsspec.available_protocols():
            raise
        raise StorageError(f"{uri}: unknown scheme {scheme}://; {_POSSIBLE}") from error
    except (OSError, EOFError) as error:  # some connect, or load a library, when they are made
        said = next(iter(str(error).splitlines()), "") or repr(error)
        raise StorageError(f"{uri}: this store cannot be opened ({said}); {_POSSIBLE}") from error
    except TypeError as error:
        raise StorageError(f"{uri}: {scheme}:// needs settings that a path does not have; {_POSSIBLE}") from error
    return fs, str(path)
