"""The tracking store: its URI, its client, and whether it answers."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from pipeline.config import require
from pipeline.errors import SettingError
from pipeline.shards.privacy import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
PROBE_SECONDS = 3.0


def default_uri() -> str:
    """``MLFLOW_TRACKING_URI``, else a sqlite file under the user's data folder, with an absolute path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return uri
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"{SQLITE}{Path(data).absolute() / 'clipmill' / 'mlflow' / 'mlflow.db'}"


def checked_uri(uri: str) -> str:
    """The tracking URI to use for the setting ``uri``; empty means :func:`default_uri`.

    Raises:
        SettingError: a kind of store that MLflow no longer supports, or a server that does not answer.
    """
    resolved = uri or default_uri()
    scheme = resolved.partition(":")[0] if ":" in resolved else ""
    allowed = "http://..., https://..., sqlite:///FILE, postgresql://..., mysql://... or databricks"
    kinds = ("http", "https", "sqlite", "databricks", "postgresql", "mysql", "mssql", "uc")
    require(scheme.partition("+")[0] in kinds or resolved == "databricks", "tracking_uri", masked(resolved), allowed)
    if resolved.startswith(SQLITE):
        path = Path(resolved.removeprefix(SQLITE)).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        resolved = f"{SQLITE}{path}"
    require(answers(resolved), "tracking_uri", masked(resolved), "an MLflow server that answers (is it started?)")
    return resolved


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
def spoken_to(uri: str) -> Iterator[None]:
    """Convert failures of the store at ``uri`` within the block to a one-sentence ``SettingError``."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        if is_refusal(error):
            raise
        why = masked((str(error).strip() or repr(error)).splitlines()[0])
        allowed = f"an MLflow store that answers (this one does not: {why})"
        raise SettingError("tracking_uri", masked(uri), allowed) from error


def client(uri: str) -> "MlflowClient":
    """A client of the store at ``uri`` that changes no global setting of MLflow."""
    # MLflow reports usage statistics by default; they are disabled here, because a job's activity is private.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # By default it retries a dead server for more than four minutes without interruption; Writer retries by itself.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
