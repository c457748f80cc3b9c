"""One sqlite store for all tests here: creating its tables takes seconds. Tests keep apart by experiment."""

from pathlib import Path

import pytest

from pipeline.tracking.store import client


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a sqlite store whose tables exist."""
    folder: Path = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client(uri).search_experiments()
    return uri
