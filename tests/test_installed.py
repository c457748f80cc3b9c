"""The wheel, installed beside its dependencies, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.config import SHIPPED, shipped_folder

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "jobs", "datasets")

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path, code: int = 0) -> str:
    unset = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", "."],
        folder,
    )
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and the packages of this one behind it; returns its bin folder."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], place)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def test_the_wheel_holds_cards_and_jobs(wheel: Path) -> None:
    names = {name.partition("/data/")[2] or name for name in zipfile.ZipFile(wheel).namelist()}
    for folder in SHIPPED:
        for path in shipped_folder(folder).glob("*.[py]*"):
            assert f"share/clipmill/{folder}/{path.name}" in names
    assert not [name for name in names if name.startswith(("datasets/", "jobs/", "tests/"))]


def test_the_command_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Draw, train, evaluate: as a user types it after `pip install`."""
    clipmill = str(installed / "clipmill")
    listed = run([clipmill], tmp_path)
    assert "refresh-dataset" in listed and "Pre-train CLIP" in listed
    assert "did you mean evaluate?" in run([clipmill, "evaluat3"], tmp_path, code=2)
    store = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    run(
        [clipmill, "refresh", "drawn", "--samples", "48", "--size", "64", "--processes-count", "0"]
        + ["--output-folder", "data"],
        tmp_path,
    )
    run(
        [clipmill, "train", "smoke", "--data", "data", "--output-folder", "runs", "--no-system-metrics", *store],
        tmp_path,
    )
    found = run([clipmill, "evaluate", "smoke", "--checkpoint", "runs", "--zero-shot", "drawn_shapes"], tmp_path)
    assert "drawn_shapes" in found
    where = run([str(installed / "python"), "-c", "import pipeline; print(pipeline.__file__)"], tmp_path)
    assert str(installed.parent) in where
