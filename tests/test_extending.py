"""The files of docs/extending.md, put beside the real parts and used as a user would: each is found by its name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"

# One process for all jobs: importing torch takes most of the time.
SCRIPT = """
import importlib, runpy, sys
from pathlib import Path

root, added = Path(sys.argv[1]), Path(sys.argv[2])
for folder in ("pipeline/sources", "pipeline/models", "pipeline/evaluation/tasks", "pipeline/stages/filters"):
    importlib.import_module(folder.replace("/", ".")).__path__.append(str(added / folder))

def job(path, *words):
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")

job(root / "jobs/refresh_dataset.py", "tones", "--output-folder", "data", "--processes-count", "0",
    "--number-sample-per-shard", "8")
job(added / "jobs/train_tones.py", "smoke", "--data", "data", "--output-folder", "runs",
    "--tone-accuracy", "seen=data,least=0.9", "--tracking-uri", "sqlite:///mlflow.db")
job(root / "jobs/evaluate.py", "sets", "--checkpoint", "runs", "--output", "result.json",
    "--tone-accuracy", "all=data", "few=data,samples=4,least=1.0", "--tone-floor", "0.5")
job(root / "jobs/verify_dataset.py", "snapshot", "data", "--processes-count", "0")

job(root / "jobs/filter_dataset.py", "custom", "--data", "data", "--processes-count", "0",
    "--steps", "length", "no_squares", "--forbidden-word", "square")
"""


def examples() -> dict[str, str]:
    """The page's files: path to content."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found = {}
    for block in blocks:
        named = re.match(r"# (\S+\.py)\n", block)
        assert named, f"a block without the path of its file: {block[:60]}"
        found[named[1]] = block
    return found


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, migrated_store: Path) -> Path:
    """The folder in which the files were used."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copy(migrated_store, folder)
    for path, content in examples().items():
        place = folder / "added" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(ROOT), str(folder / "added")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_a_source_makes_samples_without_images(used: Path) -> None:
    from pipeline.shards.snapshot import read_snapshot

    snapshots = sorted((used / "data" / "_snapshots").glob("00000*"))
    assert snapshots
    latest = read_snapshot(str(used / "data"))
    assert latest.fields == ("json", "npy", "txt")
    # The filter, the last of the jobs, leaves the sixteen sines.
    assert latest.samples == 16


def test_a_method_is_trained_and_its_kind_of_evaluation_has_a_flag(used: Path) -> None:
    metrics = json.loads((used / "result.json").read_text())["metrics"]
    assert metrics["tones/all/samples"] == 32 and metrics["tones/few/samples"] == 4
    assert metrics["tones/all/top1"] > 0.9  # half by chance; the loss falls to nearly nothing
    assert metrics["tones/all/passed"] == 1.0
    record = json.loads((used / "runs" / "run.json").read_text())
    assert record["settings"]["method"] == "tone_classifier"


def test_a_method_draws_its_own_figure_of_samples(used: Path) -> None:
    (drawn,) = used.rglob("figures/samples.png")
    with Image.open(drawn) as image:
        assert image.size == (880, 220)  # four curves in a row, not the table that is the default


@pytest.mark.parametrize("path", sorted(examples()))
def test_each_file_is_written_as_ours_are(path: str, used: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    place = used / "added" / path
    command = [str(ruff), "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I001", str(place)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
