"""Draw, embed, filter and report on an object store, the filter killed on its way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.shards.snapshot import Snapshot, read_snapshot
from pipeline.shards.storage import Folder
from pipeline.stages.annotate.embeddings import read_features
from pipeline.stages.filters.run import read_reasons
from tests.jobs.conftest import JOBS

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def start(name: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(JOBS / f"{name}.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(name: str, *words: str) -> str:
    process = start(name, *words)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def scores(snapshot: Snapshot) -> dict[str, float]:
    """The cosine of every stored pair, by key."""
    folder = Folder(snapshot.folder)
    found = {}
    for shard in snapshot.shards:
        features = read_features(folder, shard)
        image, text = (features.by_medium[medium].astype(np.float64) for medium in ("image", "text"))
        cosines = (image * text).sum(axis=1)
        found |= dict(zip(features.keys, cosines.tolist(), strict=True))
    return found


def test_features_filters_and_report(s3: str) -> None:
    data = f"{s3}/drawn"
    run("embed_dataset", "smoke", "--data", data)
    embedded = read_snapshot(data)
    words = ["custom", "--data", data, "--steps", "clip_score", "semantic_duplicates", "--clip-fraction", "0.5"]
    words += ["--processes-count", "0", "--epsilon", "0.01"]

    process = start("filter_dataset", *words)
    tables = Folder(f"{data}/_filters")
    until = time.monotonic() + 120
    while process.poll() is None and len(list(tables.fs.glob(f"{tables.path}/**/*.parquet"))) < 3:
        tables.fs.invalidate_cache()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert read_snapshot(data) == embedded  # readers have seen nothing of it
    run("filter_dataset", *words)
    filtered = read_snapshot(data)

    found = scores(embedded)
    wanted = set(sorted(found, key=lambda key: found[key])[-32:])
    reasons = {
        key: reason
        for _, table in read_reasons(filtered)
        for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True)
    }
    dropped = {key for key, reason in reasons.items() if reason.startswith("clip_score")}
    # float16 features: pairs at the very edge may change places
    assert len(dropped) == 32 and len(dropped & wanted) <= 1
    assert filtered.parent == embedded.id and filtered.samples == 32 - filtered.dropped.get(
        "semantic_duplicates.semantic_duplicate", 0
    )

    page = f"{s3}/pages/report.html"
    run("report_dataset", "snapshot", "--data", data, "--output", page, "--no-track", "--processes-count", "0")
    text = Folder(f"{s3}/pages").read_text("report.html")
    assert "clip_score" in text and filtered.id in text and text.count("data:image/jpeg") == filtered.samples
