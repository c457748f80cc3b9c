"""The tracking store: its URI, its client, and whether it answers."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from pipeline.config import require
from pipeline.errors import ClipmillError, SettingError
from pipeline.shards.privacy import masked
from pipeline.shards.storage import TEMPORARY

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
SQLITE_STARTS = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html, 1.3.1
PROBE_SECONDS = 3.0


def default_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else a sqlite file under the user's data folder, with an absolute path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"{SQLITE}{Path(data).absolute() / 'clipmill' / 'mlflow' / 'mlflow.db'}"


def checked_uri(uri: str) -> str:
    """The tracking URI to use for the setting ``uri``; empty means :func:`default_uri`. Creates a new sqlite store.

    Raises:
        SettingError: a kind of store that MLflow no longer supports, a server that does not answer, or a file that
            cannot be created.
    """
    resolved = uri or default_uri()
    scheme = resolved.partition(":")[0] if ":" in resolved else ""
    allowed = "http://..., https://..., sqlite:///FILE, postgresql://..., mysql://... or databricks"
    kinds = ("http", "https", "sqlite", "databricks", "postgresql", "mysql", "mssql", "uc")
    require(scheme.partition("+")[0] in kinds or resolved == "databricks", "tracking_uri", masked(resolved), allowed)
    if resolved.startswith(SQLITE):
        path = Path(resolved.removeprefix(SQLITE)).absolute()
        resolved = f"{SQLITE}{path}"
        with store_errors(resolved):
            create_sqlite(path)
            _check_sqlite(path)
    require(answers(resolved), "tracking_uri", masked(resolved), "an MLflow server that answers (is it started?)")
    return resolved


def create_sqlite(path: Path) -> None:
    """Create MLflow's tables in the file ``path``, unless it exists.

    MLflow makes and migrates them without a lock: several processes at once, or one that is killed, would leave a file
    that no job can use. Here one process makes them in a temporary file, which is then renamed; the others wait.
    """
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size:
            return
        new = path.with_name(f"{TEMPORARY}{path.name}")
        new.unlink(missing_ok=True)  # of a killed process
        _set_up()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(f"{SQLITE}{new}", (path.parent / "artifacts").as_uri()).engine.dispose()
        os.replace(new, path)


def _check_sqlite(path: Path) -> None:
    """Raise ``OSError`` for a file that SQLite has not written; SQLAlchemy may retry to open one for minutes."""
    with open(path, "rb") as file:
        if file.read(len(SQLITE_STARTS)) != SQLITE_STARTS:
            raise OSError("the file is not a database")


def artifact_location(uri: str, experiment: str) -> str | None:
    """The artifact folder of a new experiment: beside a sqlite file; ``None`` if the server decides."""
    if not uri.startswith(SQLITE):
        return None
    folder = Path(uri.removeprefix(SQLITE)).parent / "artifacts"
    return (folder / "".join(letter if letter.isalnum() else "-" for letter in experiment)).as_uri()


def needs_a_server(uri: str, location: str) -> bool:
    """Whether the artifact ``location`` requires a server, and the store at ``uri`` is not one.

    This is the case for experiments that a server created, when they are opened through its database.
    """
    parsed = urlparse(location)
    return parsed.scheme == "mlflow-artifacts" and not parsed.netloc and not uri.startswith("http")


def answers(uri: str) -> bool:
    """Whether a server listens at an ``http`` URI; always true for stores without a server or behind a proxy."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        return True
    if parsed.scheme in getproxies() and not proxy_bypass(parsed.hostname):
        return True
    try:
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        with socket.create_connection((parsed.hostname, port), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def is_refusal(error: Exception) -> bool:
    """Whether a retry cannot help: the store refused, or the request was invalid."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)
    return not isinstance(error, OSError)  # network errors of requests and urllib3 are OSErrors


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Convert failures of the store at ``uri`` within the block to a one-sentence ``SettingError``."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        allowed = f"an MLflow store that answers (this one: {reason(error)})"
        raise SettingError("tracking_uri", masked(uri), allowed) from error


@contextmanager
def artifact_errors(experiment: str, location: str) -> Iterator[None]:
    """Convert failures of an experiment's artifact store within the block to a one-sentence ``SettingError``."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        allowed = (
            f"an experiment with artifacts that this machine can write; those of this one go to {masked(location)}"
        )
        raise SettingError("experiment", experiment, f"{allowed} ({reason(error)})") from error


def is_ours(error: Exception) -> bool:
    """Whether ``error`` is a sentence already, or a fault of the program.

    Every other one is the store's: MLflow passes on the errors of requests, SQLAlchemy, and the libraries of S3, Google
    and Azure, which share no base.
    """
    return isinstance(error, ClipmillError | TypeError | NameError | AssertionError)


def reason(error: Exception) -> str:
    """The first line of an error of the store, with what to do where it refuses a login."""
    from mlflow.exceptions import MlflowException

    first = masked((str(error).strip() or repr(error)).splitlines()[0])
    if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):
        return f"{first}; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, give access"
    return first


def client(uri: str) -> "MlflowClient":
    """A client of the store at ``uri`` that changes no global setting of MLflow."""
    _set_up()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _set_up() -> None:
    """Set MLflow's environment, before it is imported."""
    # MLflow reports usage statistics by default; they are disabled here, because a job's activity is private.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # By default it retries a dead server for more than four minutes without interruption; Writer retries by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
