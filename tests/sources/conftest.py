"""The Tux Paint stamps of the Debian package, for tests with the mark ``real``."""

import os
from pathlib import Path

import pytest

from pipeline.sources.stamps import INSTALLED


@pytest.fixture
def package() -> str:
    """The folder of the stamps: of the package, or of the variable ``TUXPAINT_STAMPS``; skips where there is none."""
    folder = os.environ.get("TUXPAINT_STAMPS", INSTALLED)
    if not Path(folder).is_dir():
        pytest.skip("the Debian package tuxpaint-stamps-default is not here")
    return folder
